"""Any pairwise or best-of-N file, and RewardBench 2, whose arithmetic it follows (allenai/reward-bench, run_v2).

Best of N: 1 / (number tied at the maximum) where the chosen answer is among them. The subset `Ties` asks instead
whether the judge tells several equally good answers from bad ones by more than from each other; its samples come in
twos, `tied:<n>` with several good answers and `ref:<n>` with one, and the subset has one score for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from client.benchmarks import rewardbench
from client.benchmarks.results.records import Row, TiePolicy, credit
from client.benchmarks.results.scores import grouped, margins_of, mean
from client.benchmarks.standing import Benchmark, Standing

_TIES: Final = "ties"
_TIES_ID: Final = re.compile(r"(?:.*/)?(ref|tied):(\d+)", re.DOTALL)

_CATEGORIES: Final[dict[str, str]] = {
    "chat*": "chat",
    "focus": "chat",
    "code*": "code",
    "humaneval*": "code",
    "math*": "math",
    "gsm8k*": "math",
    "safety*": "safety",
}


def category_of(subset: str) -> str:
    """The kind of question by the subset's name: RewardBench 2's, RewardBench's, or one that begins with a category."""
    name = subset.lower()
    found = next((category for pattern, category in _CATEGORIES.items() if fnmatchcase(name, pattern)), None)
    return found or rewardbench.category_of(subset)


def best_of_credit(row: Row, ties: TiePolicy) -> float:
    """The chance that an answer drawn from those on top is a good one.

    With one good answer this is RewardBench 2's rule, whatever `ties` says. A pair's tie counts by `ties`: as nothing
    in RewardBench and the paper. An answer is on top when no answer of the other side is above it. A sample of `Ties`
    is right when all of its good answers are above all bad ones.
    """
    margins = margins_of(row)
    if _is_of_ties(row):
        return credit(min(min(line) for line in margins), ties)
    if len(margins) == len(margins[0]) == 1:
        return credit(margins[0][0], ties)
    unbeaten = [line for line in margins if min(line) >= 0]
    if any(min(line) > 0 for line in unbeaten):
        return 1.0
    level = {j for line in unbeaten for j, margin in enumerate(line) if margin == 0}
    return len(unbeaten) / (len(unbeaten) + len(level)) if unbeaten else 0.0


@dataclass(frozen=True, slots=True)
class TiesSample:
    """A sample of `Ties` in log-odds: `gap` from the worst good answer down to the best bad one, `spread` from the
    best good answer down to the worst good one (0 where there is one)."""

    gap: float
    spread: float

    @classmethod
    def of(cls, row: Row) -> TiesSample:
        """Pairwise, good answers are compared with bad ones only: `spread` is then that of their means."""
        good = [answer.log_odds for answer in row.chosen_answers]
        return cls(min(min(line) for line in margins_of(row)), max(good) - min(good))


def ties_score(rows: Sequence[Row], ties: TiePolicy = "strict") -> float | None:
    """RewardBench 2's score of its subset `Ties`, from about 0 to 1.01; None where no prompt has both of its samples.

    0.3 tied accuracy + 0.3 reference accuracy + 0.2 preference + 0.2 hard preference + 0.01 margin. Over the prompts
    that have both samples: preference is the share where the tied sample's gap exceeds its spread, hard preference the
    share where the smaller of both samples' gaps does, margin the mean of tanh(smaller gap / spread - 1).
    """
    rows_of: dict[str, dict[int, Row]] = {"ref": {}, "tied": {}}
    for row in rows:
        if (match := _TIES_ID.fullmatch(row.id)) is not None:
            rows_of[match[1]][int(match[2])] = row
    both = sorted(rows_of["ref"].keys() & rows_of["tied"].keys())
    if not both:
        return None
    accuracy = {kind: mean(best_of_credit(row, ties) for row in known.values()) for kind, known in rows_of.items()}
    tied = [TiesSample.of(rows_of["tied"][number]) for number in both]
    smaller = [
        min(TiesSample.of(rows_of["ref"][number]).gap, sample.gap) for number, sample in zip(both, tied, strict=True)
    ]
    preference = mean(sample.gap > sample.spread for sample in tied)
    hard = mean(gap > sample.spread for gap, sample in zip(smaller, tied, strict=True))
    margin = mean(_relative(gap, sample.spread) for gap, sample in zip(smaller, tied, strict=True))
    return 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * preference + 0.2 * hard + 0.01 * margin


def standing(rows: Sequence[Row], ties: TiePolicy) -> Standing:
    """Subsets as sections, and their unweighted mean, RewardBench 2's own; "all" has the accuracy over all samples.

    The subset `Ties` is no section where it has no score: see `ties_score`.
    """
    scores = {subset: _subset_score(group, ties) for subset, group in grouped(rows, lambda subset: subset).items()}
    sections = {subset: score for subset, score in scores.items() if score is not None}
    table = {"accuracy": mean(best_of_credit(row, ties) for row in rows)} if rows else {}
    return Standing(sections, mean(sections.values()) if sections else None, {"all": table} if table else {})


def _subset_score(rows: Sequence[Row], ties: TiePolicy) -> float | None:
    if all(_is_of_ties(row) for row in rows):
        return ties_score(rows, ties)
    return mean(best_of_credit(row, ties) for row in rows)


def _is_of_ties(row: Row) -> bool:
    return row.subset.lower() == _TIES and _TIES_ID.fullmatch(row.id) is not None


def _relative(gap: float, spread: float) -> float:
    """tanh(gap / spread - 1), and its limit where the good answers are all level; nothing for 0 / 0."""
    if spread == 0:
        return 0.0 if gap == 0 else math.copysign(1.0, gap)
    return math.tanh(gap / spread - 1)


PAIRS: Final = Benchmark("pairs", best_of_credit, standing)
