"""What a judge says of two models' responses to the same instructions, and the numbers that follow from it.

    base.jsonl, new.jsonl ── same instruction ──> Duel ── /compare in both orders ──> pairwise/items.jsonl
                                                      └── /score of each ───────────> pointwise/items.jsonl

The work and its files are the benchmarks' (client/benchmarks/run.py), with the new model's response as `chosen` and the
base's as `rejected`: a rerun asks only for what is missing. Equal responses are a tie and are not asked about. A pair
with an empty response, or one that could not be judged, is in no win rate and is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from client.benchmarks.plan import Question
from client.benchmarks.results.records import Mode, Row
from client.benchmarks.results.records import Sample as Entry
from client.benchmarks.run import (
    TEMPLATES,
    Asking,
    RunError,
    RunFolder,
    judge_identity,
    judge_samples,
    template_digests,
)
from client.errors import JudgeError
from client.schema import ModelInfo, Truncation
from client.stats import mean
from client.texts import is_blank
from trainer.errors import StageError
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
from trainer.labels.labelers import JUDGE_OF_ARM, JudgeOptions, connected, lost, shown_url
from trainer.labels.labeling import OnProgress
from trainer.run.records import GENERAL, Instruction, Record, Sample, count_by

MODES: Final[tuple[Mode, ...]] = ("pairwise", "pointwise")
# Openings by which a refusal is told, in lower case: a crude list, in English, that also finds some who are only sorry.
REFUSALS: Final = (
    "i'm sorry",
    "i am sorry",
    "sorry, but",
    "i apologize",
    "i cannot",
    "i can't",
    "i can not",
    "i'm not able to",
    "i am not able to",
    "i'm unable to",
    "i am unable to",
    "i won't",
    "i will not",
    "as an ai",
    "as a language model",
)
# So much of a response is looked at: what stands later seldom refuses.
REFUSAL_CHARACTERS: Final = 120


@dataclass(frozen=True, slots=True)
class Duel:
    """Two responses to one instruction."""

    instruction: Instruction
    base: Sample
    new: Sample

    @property
    def identical(self) -> bool:
        """Whether there is nothing to prefer."""
        return self.base.response.strip() == self.new.response.strip()

    @property
    def empty(self) -> bool:
        """Whether one of the two says nothing."""
        return is_blank(self.base.response) or is_blank(self.new.response)

    @property
    def length_difference(self) -> int:
        """New minus base, in characters."""
        return len(self.new.response) - len(self.base.response)


@dataclass(frozen=True, slots=True)
class VerdictOptions:
    """Who compares, and how patiently; `max_failures` is the share of comparisons that may fail."""

    judge: JudgeOptions
    truncation: Truncation = "error"
    max_failures: float = 0.02


class ResponseStats(Record):
    """A model's responses. `refusals` is the share that opens with one of REFUSALS; lengths are means."""

    responses: int
    empty: int
    cut_off: float | None
    refusals: float | None
    characters: float | None
    tokens: float | None


class Position(Record):
    """Comparisons whose winner changed with the order, and the mean log-odds for what is shown first."""

    flips: int
    flip_rate: float
    first_log_odds: float


class Metrics(Record):
    """Base against new on held-out instructions; what would be over nothing is null.

    `instructions = compared + empty + missing + failed` (pairwise); `identical` of the compared ones are equal texts.
    `pairwise` is the win rate of the new model by the mean of both orders' log-odds, `both_orders` the same where a
    winner that flips with the order is a tie (Zheng et al., arXiv:2306.05685), `pointwise` by each response's own
    score. `length_controlled` is of the pairwise one: see trainer.evaluation.winrate. `gain` is the mean difference,
    new minus base, of the pointwise log-odds. `failures` are by mode and code. With `same_weights` the new model is
    the base, and rates and gain are null, as they are where no comparison told the two apart.
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
    same_weights: bool = False

    def without_rates(self) -> Metrics:
        """The same for two models with the same weights: whatever tells their responses apart is no training."""
        rates = ("pairwise", "length_controlled", "both_orders", "pointwise", "gain")
        return self.model_copy(update={**dict.fromkeys(rates), "by_category": {}, "same_weights": True})


def make_duels(instructions: Sequence[Instruction], base: Sequence[Sample], new: Sequence[Sample]) -> list[Duel]:
    """The instructions that both models have answered, in their order."""
    first, second = ({sample.id: sample for sample in reversed(samples)} for samples in (base, new))
    return [Duel(one, first[one.id], second[one.id]) for one in instructions if one.id in first and one.id in second]


def describe_judge(options: JudgeOptions) -> dict[str, object]:
    """The exact judge that would compare. Raises StageError within seconds where it cannot."""

    async def described() -> dict[str, object]:
        async with connected(options) as (_, info):
            _check_kind(info, options)
            return judge_identity(info)

    return asyncio.run(described())


def judge_duels(
    duels: Sequence[Duel], folder: Path, options: VerdictOptions, on_progress: OnProgress | None = None
) -> dict[Mode, list[Row]]:
    """Have all duels judged both ways, into `folder`/pairwise and `folder`/pointwise; the rows of both.

    Raises StageError where the judge stays out of reach or changes, and where too many failed.
    """
    entries = [
        Entry(duel.instruction.id, duel.instruction.category, duel.instruction.prompt, (new,), (base,))
        for duel in duels
        if not duel.empty and not duel.identical
        for base, new in [(duel.base.response, duel.new.response)]
    ]

    async def judged() -> dict[Mode, list[Row]]:
        async with connected(options.judge) as (judge, info):
            _check_kind(info, options.judge)
            offered = await judge.templates()
            known, digests = set(offered.categories), template_digests(offered.templates)
            plan = {entry.subset: Question(category=_category(entry.subset, known)) for entry in entries}
            rows: dict[Mode, list[Row]] = {}
            for mode in MODES:
                asking = Asking(plan, mode, options.truncation, options.max_failures, options.judge.bulk)
                config = {"judge": judge_identity(info), TEMPLATES: digests, **asking.described()}
                run = RunFolder(folder / mode, config)
                rows[mode] = await judge_samples(judge, entries, asking, run, on_progress)
            return rows

    try:
        return asyncio.run(judged())
    except JudgeError as error:
        raise lost(options.judge, error) from error
    except RunError as error:
        raise StageError(str(error)) from error


def measure(
    duels: Sequence[Duel], rows: Mapping[Mode, Sequence[Row]], names: tuple[str, str], judge: Mapping[str, object]
) -> Metrics:
    """The numbers of base and new (their `names`, in this order), as far as they follow from the duels alone."""
    of_id = {mode: {row.id: row for row in rows[mode]} for mode in MODES}
    fought = [duel for duel in duels if not duel.empty]
    outcomes: dict[str, list[Outcome]] = {"pairwise": [], "both_orders": [], "pointwise": []}
    for duel in fought:
        pairwise, pointwise = (of_id[mode].get(duel.instruction.id) for mode in MODES)
        for name, log_odds in (
            ("pairwise", _margin(duel, pairwise)),
            ("both_orders", 0.0 if pairwise is not None and pairwise.flips else _margin(duel, pairwise)),
            ("pointwise", _margin(duel, pointwise)),
        ):
            if log_odds is not None:
                outcomes[name].append(outcome_of(duel.instruction.category, log_odds, duel.length_difference))
    compared = [row for row in rows["pairwise"] if row.error is None]
    flips = sum(row.flips or 0 for row in compared)
    margins = [_margin(duel, of_id["pointwise"].get(duel.instruction.id)) for duel in fought]
    return Metrics(
        base=names[0],
        new=names[1],
        judge=dict(judge),
        instructions=len(duels),
        compared=len(outcomes["pairwise"]),
        identical=sum(duel.identical for duel in fought),
        empty=len(duels) - len(fought),
        missing=0,
        failed=sum(row.error is not None for row in rows["pairwise"]),
        failures={mode: count_by(row.error.code for row in rows[mode] if row.error is not None) for mode in MODES},
        pairwise=win_rate(outcomes["pairwise"]),
        length_controlled=length_controlled(outcomes["pairwise"]),
        both_orders=win_rate(outcomes["both_orders"]),
        pointwise=win_rate(outcomes["pointwise"]),
        gain=mean_estimate([margin for margin in margins if margin is not None]) if any(margins) else None,
        by_category=by_category(outcomes["pairwise"]),
        position=Position(
            flips=flips,
            flip_rate=flips / len(compared),
            first_log_odds=mean([row.first_log_odds or 0.0 for row in compared]),
        )
        if compared
        else None,
        label_mass={mode: _label_mass(rows[mode]) for mode in MODES},
        responses={
            "base": response_stats([duel.base for duel in duels]),
            "new": response_stats([duel.new for duel in duels]),
        },
    )


def response_stats(samples: Sequence[Sample]) -> ResponseStats:
    """See ResponseStats."""
    count = len(samples)
    return ResponseStats(
        responses=count,
        empty=sum(is_blank(sample.response) for sample in samples),
        cut_off=sum(sample.finish == "length" for sample in samples) / count if count else None,
        refusals=sum(is_refusal(sample.response) for sample in samples) / count if count else None,
        characters=mean([len(sample.response) for sample in samples]) if count else None,
        tokens=mean([sample.tokens for sample in samples]) if count else None,
    )


def is_refusal(response: str) -> bool:
    """Whether one of REFUSALS stands in the response's first REFUSAL_CHARACTERS characters."""
    opening = response.strip()[:REFUSAL_CHARACTERS].lower().replace("\u2019", "'")
    return any(marker in opening for marker in REFUSALS)


def _margin(duel: Duel, row: Row | None) -> float | None:
    """By how many log-odds the new response is preferred; None where that is not known."""
    if duel.identical:
        return 0.0
    return row.margins[0][0] if row is not None and row.margins is not None else None


def _label_mass(rows: Sequence[Row]) -> float | None:
    masses = [answer.label_mass for row in rows for answer in (*row.chosen_answers, *row.rejected_answers)]
    return mean(masses) if masses else None


def _category(name: str, known: set[str]) -> str:
    return name if name in known else GENERAL


def _check_kind(info: ModelInfo, options: JudgeOptions) -> None:
    wanted = JUDGE_OF_ARM["ipo"]
    if info.judge != wanted:
        raise StageError(
            f"an evaluation needs a service whose judge is {wanted}, and {shown_url(options)} runs {info.judge}: give "
            "another --eval-judge-url"
        )
