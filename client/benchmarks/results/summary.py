"""What summary.json holds: all numbers of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import Field

from client.benchmarks.rows import FrozenModel, TiePolicy

SUMMARY_FILE: Final = "summary.json"


class SubsetScore(FrozenModel):
    """One subset. `accuracy` is the mean credit of its judged samples, `low` and `high` its 95% Wilson interval, and
    `chance` what random scores would get (older summaries lack it).

    These and `label_mass` (the mean over its answers) are None if every sample failed. `ties` counts samples with a
    margin of exactly 0. `section` is the part of the official score that the subset belongs to, if any.
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
    chance: float | None = None


class Counts(FrozenModel):
    """Numbers of samples: `truncated` counts judged ones with a cut text, `failures` the failed ones by error code."""

    samples: int
    judged: int
    failed: int
    ties: int
    truncated: int
    failures: dict[str, int]


class Cost(FrozenModel):
    """The run's tokens, as the service counts them over answered judgements, and wall-clock seconds.

    `cached_tokens` are the prompt tokens that came from a cache, `completion_tokens` were written by a judge that
    answers in text. For `without_tokens` samples some judgement was not answered, so their tokens are not all known.
    `seconds` adds up the parts of an interrupted run, and is None if the rows have no times.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    without_tokens: int
    seconds: float | None


class LabelMass(FrozenModel):
    """P(Yes) + P(No) over all judged answers: mean, 5th percentile, share of answers below one half."""

    mean: float
    p05: float
    share_below_half: float


class CalibrationFit(FrozenModel):
    """How far `n` probabilities are from the truth: ECE over 10 equal-width bins, Brier score from 0 to 1."""

    ece: float
    brier: float
    n: int


class AnswerCalibration(CalibrationFit):
    """`calibrated` says whether these are the service's calibrated probabilities or its raw scores."""

    calibrated: bool


class CalibrationErrors(FrozenModel):
    """`pairs`: the probability p = sigmoid(margin) that the chosen answer is better. `answers` (pointwise only): the
    probability that an answer is good, against 1 for chosen and 0 for rejected ones. None if nothing was judged.

    The ECE of pairs takes the confidence max(p, 1-p) in whichever answer the judge prefers, with a tie half right:
    against p itself every outcome would be 1. The Brier score is the mean of (1-p)².
    """

    pairs: CalibrationFit | None
    answers: AnswerCalibration | None


class Position(FrozenModel):
    """Pairwise mode: how many comparisons change their winner with the order in which the answers are shown.

    `first_log_odds` is the mean log-odds for whichever answer is shown first: 0 without position bias.
    """

    comparisons: int
    flips: int
    flip_rate: float
    first_log_odds: float


class Length(FrozenModel):
    """Whether the judge goes by length, over all verdicts on answers of different length in characters.

    `chosen_longer` is the share where the chosen answer is the longer one, which is also the accuracy of always
    preferring the longer. The accuracies are None without such a verdict.
    """

    chosen_longer: float
    accuracy_when_chosen_longer: float | None
    accuracy_when_chosen_shorter: float | None


class Level(FrozenModel):
    """A share of `samples`, its 95% interval, and what random scores would get on average."""

    value: float
    low: float
    high: float
    chance: float
    samples: int


class JudgeName(FrozenModel):
    """Who judged, by which templates; None if nothing was judged and the configuration does not say either."""

    model: str | None
    fingerprint: str | None
    templates: list[str]


class Summary(FrozenModel):
    """All numbers of a run. Shares are from 0 to 1, and failed samples enter no accuracy.

    `sections`, `mean`, `tables` and `matrices` are the benchmark's own: see OfficialScores. `official` is the mean with
    its interval, None where it is not a weighted mean of the samples' credits; `levels` are the sections' of which that
    is true; `accuracy` is the mean credit of all judged samples alike. Older summaries have none of these.
    """

    benchmark: str
    mean: float | None
    official: Level | None = None
    accuracy: Level | None = None
    levels: dict[str, Level] = Field(default_factory=dict)
    sections: dict[str, float]
    tables: dict[str, dict[str, float]]
    matrices: dict[str, list[list[float]]]
    subsets: dict[str, SubsetScore]
    counts: Counts
    cost: Cost | None = None
    label_mass: LabelMass | None
    calibration: CalibrationErrors
    position: Position | None
    length: Length | None
    judge: JudgeName
    ties: TiePolicy
    config: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> Summary:
        """Read a summary.json. Raises OSError, and pydantic.ValidationError (a ValueError) for anything else."""
        return cls.model_validate_json(path.read_bytes())
