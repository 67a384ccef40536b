"""Calibration files: for each template, how log-odds become the probability that the response is good.

`sigmoid(log_odds / temperature + bias)`, after Platt (1999) and Guo et al. (arXiv 1706.04599). Of two responses the
probability that one is better has a temperature of its own, and no bias. `python -m client.calibrate` fits and writes
a file, and the service reads it (`--calibration-file`). A file belongs to one model's weights, identified by their
fingerprint. It is JSON:

    {"format": 1, "model": "…", "fingerprint": "…",
     "templates": {"general@1": {"temperature": 2.5, "bias": -0.4, "pairs": 300,
                                 "before": {"nll": …, "ece": …, "brier": …}, "after": {…},
                                 "pair": {"temperature": 0.7, "before": {…}, "after": {…}}}},
     "fitted_on": {"sources": ["…"], "seed": 0, "left_out": {"truncated": 3}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, StringConstraints, ValidationError

from client.runtime.files import write_whole
from client.runtime.validation import first_problem
from client.schema import Digest
from client.stats import sigmoid

FORMAT: Final = 1

# A template's id in results, name and version. It excludes `inline`, which may stand for any text.
TEMPLATE_ID: Final = r"^\S+@[1-9][0-9]*$"

Filled = Annotated[str, StringConstraints(min_length=1)]
TemplateId = Annotated[str, StringConstraints(pattern=TEMPLATE_ID)]
Loss = Annotated[FiniteFloat, Field(ge=0)]


class CalibrationError(ValueError):
    """An unusable calibration file; the message names it."""


class _FileModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Quality(_FileModel):
    """How well probabilities match outcomes: mean negative log-likelihood in nats, ECE of 10 bins, Brier score."""

    nll: Loss
    ece: Loss
    brier: Loss


class PairFit(_FileModel):
    """How a difference of log-odds becomes the probability that the first response is the better one. `before` and
    `after` are as in TemplateCalibration, of pairs, each of which counts in both orders.
    """

    temperature: Annotated[FiniteFloat, Field(gt=0)]
    before: Quality
    after: Quality

    def apply(self, difference: float) -> float:
        """The fitted probability that a response which leads by so many log-odds is the better one."""
        return sigmoid(difference / self.temperature)


class TemplateCalibration(_FileModel):
    """One template's fit. Half of `pairs` were fitted to; `before` (the raw score) and `after` measure the other half.

    `asked_with` is that of the judgements fitted to, as in ScoreResult; older files lack it, and `pair`, which is also
    None where greater differences do not make a right verdict likelier.
    """

    temperature: Annotated[FiniteFloat, Field(gt=0)]
    bias: FiniteFloat
    pairs: NonNegativeInt
    before: Quality
    after: Quality
    asked_with: Digest = None
    pair: Annotated[PairFit | None, Field(exclude_if=lambda pair: pair is None)] = None

    def apply(self, log_odds: float) -> float:
        """The fitted probability that a response with these log-odds is good."""
        return sigmoid(log_odds / self.temperature + self.bias)


class FittedOn(_FileModel):
    """The data behind a fit: folders of runs or files of pairs, and how many samples were left out, by reason."""

    sources: list[str]
    seed: int
    left_out: dict[str, NonNegativeInt] = {}


class Calibration(_FileModel):
    """The contents of a calibration file."""

    format: Literal[1] = FORMAT
    model: Filled
    fingerprint: Filled
    templates: Annotated[dict[TemplateId, TemplateCalibration], Field(min_length=1)]
    fitted_on: FittedOn


def load(path: Path) -> Calibration:
    """Read and check a file. Raises CalibrationError if it cannot be read or is not a calibration file."""
    try:
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
        return Calibration.model_validate(data)
    except ValidationError as exc:
        problem = first_problem(exc, whole="file")
        raise CalibrationError(f"{path}: not a calibration file of format {FORMAT}: {problem}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise CalibrationError(f"{path}: cannot be read as a calibration file: {exc}") from exc


def save(calibration: Calibration, path: Path) -> None:
    """Create or replace the file. If it raises OSError, nothing has changed."""
    write_whole(path, calibration.model_dump_json(indent=2) + "\n")


def _unique_names(members: Sequence[tuple[str, Any]]) -> Mapping[str, Any]:
    """A JSON object without duplicate names; json.loads would silently keep the last one."""
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} is given twice")
    return dict(members)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")
