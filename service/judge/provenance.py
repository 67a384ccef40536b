"""Who judged, and how: what results say of their model, judge, template and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256

from client.calibration import TemplateCalibration
from service.judge.judges import YES_NO, Judge
from service.judge.templates import Panel, Template

# Of the digests that say how a judgement was asked for.
_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Provenance:
    """The judge, and what results say of its model; its calibrations by template id (single responses only).

    `settings` is the digest of the settings that decide judgements besides; see `settings_digest`.
    """

    model: str
    fingerprint: str
    calibrations: Mapping[str, TemplateCalibration] = field(default_factory=dict)
    judge: Judge = YES_NO
    settings: str = ""

    def calibrated(self, template: str, log_odds: float) -> float | None:
        """The fitted probability that the response is good; None for a template (its id) without a calibration."""
        calibration = self.calibrations.get(template)
        return calibration.apply(log_odds) if calibration else None

    def calibrated_wins(self, template: str, log_odds: Sequence[float]) -> list[list[float]] | None:
        """n by n: the fitted probability that one response is better than another; None without a fit of pairs."""
        calibration = self.calibrations.get(template)
        if calibration is None or calibration.pair is None:
            return None
        return [[calibration.pair.apply(ours - theirs) for theirs in log_odds] for ours in log_odds]

    def asked_with(self, template: Template | Panel | None) -> str:
        """See ScoreResult."""
        return _digest(self.settings, template.digest if template else None)


def settings_digest(judge: Judge, floor: float | None) -> str:
    """Of the settings that decide judgements besides the model and the template; `floor` is an upstream's."""
    return _digest(judge.name, judge.reader.settings, floor)


@lru_cache  # every result names one
def _digest(*parts: str | float | None) -> str:
    return sha256(json.dumps(parts).encode()).hexdigest()[:_DIGITS]
