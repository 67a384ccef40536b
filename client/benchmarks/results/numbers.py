"""What summary.json holds: all numbers of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from client.benchmarks.results.records import TiePolicy


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class SubsetScore(_Part):
    """One subset. `accuracy` is the mean credit of its judged samples, `low` and `high` its 95% Wilson interval.

    These and `label_mass` (the mean over its answers) are None where every sample failed. `ties` counts samples with a
    margin of exactly 0. `section` is the part of the official score that the subset belongs to, where there is one.
    """

    section: str | None
    samples: int
    judged: int
    failed: int
    ties: int
    accuracy: float | None
    low: float | None
    high: float | None
    label_mass: float | None


class Counts(_Part):
    """Numbers of samples; `truncated` are judged ones of which a text was cut, `failures` failed ones by error code."""

    samples: int
    judged: int
    failed: int
    ties: int
    truncated: int
    failures: dict[str, int]


class Cost(_Part):
    """What the run took: tokens of the judgements that were answered, as the service counts them, and seconds.

    `cached_tokens` of the prompts' came from a cache, `completion_tokens` were written by a judge that answers in text.
    Of `without_tokens` samples no judgement was answered, or not all: what those cost in tokens is not known. `seconds`
    are of the clock, those of a run that was interrupted summed up. None where the rows do not say it.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    without_tokens: int
    seconds: float | None


class LabelMass(_Part):
    """P(Yes)+P(No) over all judged answers: the mean, the 5th percentile, the share of answers below one half."""

    mean: float
    p05: float
    share_below_half: float


class CalibrationFit(_Part):
    """How well `n` probabilities meet the truth; less is better. ECE of 10 equal-width bins, Brier from 0 to 1."""

    ece: float
    brier: float
    n: int


class AnswerCalibration(CalibrationFit):
    """`calibrated` says whether the service's calibrated probabilities were held against the truth, or its scores."""

    calibrated: bool


class Calibration(_Part):
    """`pairs`: the probability sigmoid(margin) that the chosen answer is better. `answers` (pointwise only): the
    probability that an answer is good, against 1 for chosen and 0 for rejected ones. None where nothing was judged.

    The ECE of pairs is of the confidence max(p, 1-p) in whichever answer the judge prefers, and a tie is right by half:
    as p alone it would have an outcome of 1 everywhere. The Brier score is the mean of (1-p)².
    """

    pairs: CalibrationFit | None
    answers: AnswerCalibration | None


class Position(_Part):
    """Pairwise mode: how many of the comparisons change their winner with the order in which the answers are shown.

    `first_log_odds` is the mean log-odds for whichever answer is shown first, 0 for a judge without position bias.
    """

    comparisons: int
    flips: int
    flip_rate: float
    first_log_odds: float


class Length(_Part):
    """Does the judge go by length? Over all verdicts on answers of different length in characters.

    `chosen_longer` is the share where the chosen answer is the longer one: what always picking the longer would score.
    The accuracies are None where there is no such verdict.
    """

    chosen_longer: float
    accuracy_when_chosen_longer: float | None
    accuracy_when_chosen_shorter: float | None


class JudgeName(_Part):
    """Who judged, by which templates; None where nothing was judged and the configuration does not say either."""

    model: str | None
    fingerprint: str | None
    templates: list[str]


class Summary(_Part):
    """All numbers of a run: what summary.json holds. Shares are from 0 to 1.

    `sections`, `mean`, `tables` and `matrices` are the benchmark's own (see Standing). No accuracy has failed samples.
    """

    benchmark: str
    mean: float | None
    sections: dict[str, float]
    tables: dict[str, dict[str, float]]
    matrices: dict[str, list[list[float]]]
    subsets: dict[str, SubsetScore]
    counts: Counts
    cost: Cost | None = None
    label_mass: LabelMass | None
    calibration: Calibration
    position: Position | None
    length: Length | None
    judge: JudgeName
    ties: TiePolicy
    config: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Read a summary.json; raises OSError, and pydantic.ValidationError (a ValueError) where it is none."""
        return cls.model_validate_json(path.read_bytes())
