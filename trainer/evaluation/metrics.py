"""The numbers of an evaluation (metrics.json), computed from duels and what the judge said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from client.benchmarks.rows import Mode, Row
from client.labels.records import count_by
from client.stats import mean
from trainer.evaluation.responses import ResponseStats, response_stats
from trainer.evaluation.tasks.results import TaskMetrics
from trainer.evaluation.verdicts import MODES, Duel
from trainer.evaluation.winrate import (
    Estimate,
    Outcome,
    WinRate,
    by_category,
    length_controlled,
    mean_estimate,
    outcome_of,
    win_rate,
)
from trainer.run.records import Record


class Position(Record):
    """Comparisons whose winner changed with the order, and the mean log-odds of the response shown first."""

    flips: int
    flip_rate: float
    first_log_odds: float


class Metrics(Record):
    """Base against new on held-out instructions; a mean over nothing is null.

    `instructions = compared + empty + missing + failed` (pairwise); `identical` of the compared pairs are equal texts.
    `pairwise` is the new model's win rate by the mean of both orders' log-odds. `both_orders` counts a winner that
    flips with the order as a tie (Zheng et al., arXiv:2306.05685). `pointwise` goes by each response's own score.
    `length_controlled` belongs to the pairwise rate: see trainer.evaluation.winrate. `gain` is the mean difference,
    new minus base, of the pointwise log-odds. `failures` are by mode and code. With `same_weights` the new model is
    the base, and rates and gain are null, as they are if no comparison told the two apart.
    """

    base: str
    new: str
    judge: dict[str, object]
    judge_is_labeler: bool | None = None
    instructions: int
    compared: int
    identical: int
    empty: int
    missing: int
    failed: int
    failures: dict[str, dict[str, int]]
    pairwise: WinRate | None
    length_controlled: Estimate | None
    both_orders: WinRate | None
    pointwise: WinRate | None
    gain: Estimate | None
    by_category: dict[str, WinRate]
    position: Position | None
    label_mass: dict[str, float | None]
    responses: dict[Literal["base", "new"], ResponseStats]
    lm_eval: dict[str, object] | None = None
    tasks: TaskMetrics | None = None
    same_weights: bool = False

    @property
    def summary(self) -> str:
        """The main number in a sentence, or why there is none."""
        rate, controlled = self.pairwise, self.length_controlled
        if self.same_weights:
            return f"{self.new} has the weights of {self.base}: training changed nothing, and there is no win rate"
        if rate is None and self.compared:
            return (
                f"no win rate: in none of {self.compared} comparisons was {self.new} better or worse than {self.base} "
                f"({self.identical} pairs of equal answers)"
            )
        if rate is None or rate.low is None or rate.high is None:
            return f"nothing could be compared: {self.empty} empty, {self.missing} missing, {self.failed} failed"
        error = "" if rate.standard_error is None else f" ± {100 * rate.standard_error:.1f} (standard error)"
        text = (
            f"{self.new} against {self.base}: win rate {100 * rate.value:.1f}%{error} on {rate.count} instructions, "
            f"95% interval {100 * rate.low:.1f} to {100 * rate.high:.1f}"
        )
        return text + (f"; length-controlled {100 * controlled.value:.1f}%" if controlled is not None else "")

    def without_rates(self) -> Metrics:
        """The metrics of two models with the same weights: whatever tells their responses apart is not training."""
        rates = ("pairwise", "length_controlled", "both_orders", "pointwise", "gain")
        return self.model_copy(update={**dict.fromkeys(rates), "by_category": {}, "same_weights": True})


def measure(
    duels: Sequence[Duel], rows: Mapping[Mode, Sequence[Row]], names: tuple[str, str], judge: Mapping[str, object]
) -> Metrics:
    """The metrics of base and new (their `names`, in this order), as far as they follow from the duels alone."""
    answered = [duel for duel in duels if not duel.empty]
    pairwise, pointwise = (_paired(answered, rows[mode]) for mode in MODES)
    outcomes = _outcomes(pairwise, preference)
    gains = [gain for gain in (preference(*judged) for judged in pointwise) if gain is not None]
    return Metrics(
        base=names[0],
        new=names[1],
        judge=dict(judge),
        instructions=len(duels),
        compared=len(outcomes),
        identical=sum(duel.identical for duel in answered),
        empty=len(duels) - len(answered),
        missing=0,
        failed=sum(row.error is not None for row in rows["pairwise"]),
        failures={mode: count_by(row.error.code for row in rows[mode] if row.error is not None) for mode in MODES},
        pairwise=win_rate(outcomes),
        length_controlled=length_controlled(outcomes),
        both_orders=win_rate(_outcomes(pairwise, _consistent_preference)),
        pointwise=win_rate(_outcomes(pointwise, preference)),
        gain=mean_estimate(gains) if any(gains) else None,
        by_category=by_category(outcomes),
        position=_position([row for row in rows["pairwise"] if row.error is None]),
        label_mass={mode: _label_mass(rows[mode]) for mode in MODES},
        responses={
            "base": response_stats([duel.base for duel in duels]),
            "new": response_stats([duel.new for duel in duels]),
        },
    )


def preference(duel: Duel, row: Row | None) -> float | None:
    """The log-odds that the new response is better: 0 for equal texts, None if the judge has not said."""
    if duel.identical:
        return 0.0
    return row.margins[0][0] if row is not None and row.margins is not None else None


def _consistent_preference(duel: Duel, row: Row | None) -> float | None:
    """`preference`, but a tie if the winner flips with the order."""
    return 0.0 if row is not None and row.flips else preference(duel, row)


def _paired(duels: Iterable[Duel], rows: Sequence[Row]) -> list[tuple[Duel, Row | None]]:
    by_id = {row.id: row for row in rows}
    return [(duel, by_id.get(duel.instruction.id)) for duel in duels]


def _outcomes(
    judged: Iterable[tuple[Duel, Row | None]], log_odds_of: Callable[[Duel, Row | None], float | None]
) -> list[Outcome]:
    return [
        outcome_of(duel.instruction.category, log_odds, duel.length_difference)
        for duel, row in judged
        if (log_odds := log_odds_of(duel, row)) is not None
    ]


def _position(compared: Sequence[Row]) -> Position | None:
    if not compared:
        return None
    flips = sum(row.flips or 0 for row in compared)
    return Position(
        flips=flips,
        flip_rate=flips / len(compared),
        first_log_odds=mean([row.first_log_odds or 0.0 for row in compared]),
    )


def _label_mass(rows: Iterable[Row]) -> float | None:
    masses = [answer.label_mass for row in rows for answer in (*row.chosen_answers, *row.rejected_answers)]
    return mean(masses) if masses else None
