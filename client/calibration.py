"""A judge's calibration: from log-odds to the probability that the response is good, for each template.

`sigmoid(log_odds / temperature + bias)`, after Platt (1999) and Guo et al. (arXiv 1706.04599). `python -m
client.calibrate` fits the numbers and writes the file, the service reads it (`--calibration-file`). A file belongs to
one model's weights, named by their fingerprint. It is JSON:

    {"format": 1, "model": "…", "fingerprint": "…",
     "templates": {"general@1": {"temperature": 2.5, "bias": -0.4, "pairs": 300,
                                 "before": {"nll": …, "ece": …, "brier": …}, "after": {…}}},
     "fitted_on": {"sources": ["…"], "seed": 0, "left_out": {"truncated": 3}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, StringConstraints, ValidationError

from client.runtime.files import write_whole
from client.schema import Digest
from client.stats import sigmoid

FORMAT: Final = 1

# A template's id as results have it, name and version. `inline`, which any text may be, is none.
TEMPLATE_ID: Final = r"^\S+@[1-9][0-9]*$"

Filled = Annotated[str, StringConstraints(min_length=1)]
TemplateId = Annotated[str, StringConstraints(pattern=TEMPLATE_ID)]
Loss = Annotated[FiniteFloat, Field(ge=0)]


class CalibrationError(ValueError):
    """A calibration file that cannot be used; the message names the file."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Quality(_Part):
    """How far probabilities are from outcomes: mean negative log-likelihood in nats, ECE of 10 bins, Brier score."""

    nll: Loss
    ece: Loss
    brier: Loss


class TemplateCalibration(_Part):
    """One template's fit, made on half of `pairs`; `before` (the raw score) and `after` are of the other half.

    `asked_with` is as in ScoreResult, for the answers that it was fitted to; older files lack it.
    """

    temperature: Annotated[FiniteFloat, Field(gt=0)]
    bias: FiniteFloat
    pairs: NonNegativeInt
    before: Quality
    after: Quality
    asked_with: Digest = None

    def apply(self, log_odds: float) -> float:
        """The fitted probability that the response is good."""
        return sigmoid(log_odds / self.temperature + self.bias)


class FittedOn(_Part):
    """Where the numbers come from: folders of runs or files of pairs, and how many samples were left out, by reason."""

    sources: list[str]
    seed: int
    left_out: dict[str, NonNegativeInt] = {}


class Calibration(_Part):
    """A calibration file."""

    format: Literal[1] = FORMAT
    model: Filled
    fingerprint: Filled
    templates: Annotated[dict[TemplateId, TemplateCalibration], Field(min_length=1)]
    fitted_on: FittedOn


def load(path: Path) -> Calibration:
    """Read and check a file; raises CalibrationError where it cannot be read or is not one."""
    try:
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        return Calibration.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise CalibrationError(f"{path}: not a calibration file of format {FORMAT}: {where}: {first['msg']}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise CalibrationError(f"{path}: cannot be read as a calibration file: {exc}") from exc


def save(calibration: Calibration, path: Path) -> None:
    """Write the file as a whole or not at all, in place of one that is there; raises OSError."""
    write_whole(path, calibration.model_dump_json(indent=2) + "\n")


def _without_repeats(members: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    """A JSON object; json.loads by itself would let the last of two equal names win."""
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is given twice")
    return dict(members)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")
