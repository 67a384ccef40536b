"""Two models' responses to the same instructions, compared by a judge.

    base.jsonl, new.jsonl ── same instruction ──> Duel ── /compare in both orders ──> pairwise/items.jsonl
                                                      └── /score of each ───────────> pointwise/items.jsonl

The benchmarks' runner does the work and writes the files (client/benchmarks/run.py), with the new model's response as
`chosen` and the base's as `rejected`; a rerun asks only for what is missing. Equal responses are a tie and are not sent
to the judge. A pair with an empty response, or one that could not be judged, is counted but enters no win rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.benchmarks.questions import Question
from client.benchmarks.rows import Mode, Row
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.data.samples import Sample as Entry
from client.errors import JudgeError
from client.labels.records import GENERAL
from client.runs.config import TEMPLATES, judge_identity, template_digests
from client.runs.progress import OnProgress
from client.runs.resumable import RunError
from client.schema import ModelInfo, Truncation
from client.texts import is_blank
from trainer.errors import StageError
from trainer.labels.labelers import JUDGE_OF_ARM, JudgeOptions, connected, lost, shown_url
from trainer.run.records import Instruction, Sample

# Pairwise asks in both orders: the winner of a small judge (1.5B) changed with the order in 88% of the comparisons.
MODES: Final[tuple[Mode, ...]] = ("pairwise", "pointwise")


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
        """Whether either response is empty."""
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


def make_duels(instructions: Sequence[Instruction], base: Sequence[Sample], new: Sequence[Sample]) -> list[Duel]:
    """One for each instruction that both models have answered, in the order of the instructions."""
    # Reversed, so that the first of several samples of an instruction is the one that stays.
    by_id = [{sample.id: sample for sample in reversed(samples)} for samples in (base, new)]
    return [
        Duel(one, by_id[0][one.id], by_id[1][one.id]) for one in instructions if all(one.id in ids for ids in by_id)
    ]


def describe_judge(options: JudgeOptions) -> dict[str, object]:
    """The identity of the judge that would compare. Raises StageError within seconds if it cannot."""

    async def described() -> dict[str, object]:
        async with connected(options) as (_, info):
            _require_comparing_judge(info, options)
            return judge_identity(info)

    return asyncio.run(described())


def judge_duels(
    duels: Sequence[Duel], folder: Path, options: VerdictOptions, on_progress: OnProgress | None = None
) -> dict[Mode, list[Row]]:
    """Have all duels judged in both modes, into `folder`/pairwise and `folder`/pointwise; the rows of each mode.

    Raises StageError if the judge stays out of reach, changes, or fails on too many duels.
    """
    entries = [
        Entry(
            duel.instruction.id,
            duel.instruction.category,
            duel.instruction.prompt,
            chosen=(duel.new.response,),
            rejected=(duel.base.response,),
        )
        for duel in duels
        if not duel.empty and not duel.identical
    ]

    async def judged() -> dict[Mode, list[Row]]:
        async with connected(options.judge) as (judge, info):
            _require_comparing_judge(info, options.judge)
            offered = await judge.templates()
            categories, digests = set(offered.categories), template_digests(offered.templates)
            plan = {
                entry.subset: Question(category=entry.subset if entry.subset in categories else GENERAL)
                for entry in entries
            }
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


def _require_comparing_judge(info: ModelInfo, options: JudgeOptions) -> None:
    wanted = JUDGE_OF_ARM["ipo"]
    if info.judge != wanted:
        raise StageError(
            f"an evaluation needs a service whose judge is {wanted}, and {shown_url(options)} runs {info.judge}: give "
            "another --eval-judge-url"
        )
