"""What the policy is asked: read from a file or a data set, made distinct, categorised, and chosen from.

    source ── reading.py ──> distinct ── categories.py, where none is given ──> chosen ──> instructions.jsonl
                                                                            └─ held out ─> held_out.jsonl

Which are chosen depends on the seed and the instructions' ids alone. No two have the same prompt (but for white space),
so that none held out for evaluation is trained on; paraphrases are not found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client.benchmarks.data.samples import SampleError, choose
from client.benchmarks.results.records import Sample as Entry
from trainer.errors import StageError
from trainer.instructions.categories import Categories, CategoryOptions, categorise
from trainer.instructions.reading import Source, read_instructions
from trainer.labels.labelers import JudgeOptions
from trainer.labels.labeling import OnProgress
from trainer.run.files import write_record, write_records
from trainer.run.records import (
    GENERAL,
    HELD_OUT_FILE,
    INSTRUCTIONS_FILE,
    INSTRUCTIONS_STATS_FILE,
    Instruction,
    Record,
    count_by,
)

CATEGORIES_FILE: Final = "categories.jsonl"
# What the stage leaves; the answers about categories are there to go on with, and empty where none were needed.
INSTRUCTION_OUTPUTS: Final = (INSTRUCTIONS_FILE, HELD_OUT_FILE, INSTRUCTIONS_STATS_FILE, CATEGORIES_FILE)
# So many instructions are asked about for each one wanted, where there are more.
POOL_FACTOR: Final = 4


@dataclass(frozen=True, slots=True)
class InstructionOptions:
    """Where instructions come from and which are taken.

    `limit` are trained on (None: all there are) and `held_out` others kept for evaluation. Both are shared out over the
    categories in proportion to their sizes, or, with `balanced`, in equal parts as far as they reach. Without a
    `judge`, every instruction must have a category. `recategorise` asks the judge even where one is given.
    """

    source: str
    limit: int | None = field(default=None, metadata={"help": "instructions to train on; none: all there are"})
    held_out: int = field(default=0, metadata={"help": "further instructions to keep for evaluation"})
    seed: int = 0
    balanced: bool = field(
        default=False, metadata={"help": "take equally many of each category, not as many as there are in proportion"}
    )
    skip_bad: bool = field(
        default=False,
        metadata={"help": "count empty and broken instructions and leave them out, not stop at the first"},
    )
    recategorise: bool = field(
        default=False, metadata={"help": "have the judge say the category even where one is given"}
    )
    judge: JudgeOptions | None = None
    max_failures: float = 0.02

    def described(self) -> dict[str, object]:
        """The part of a run's configuration that decides the instructions; the source's contents are not in it."""
        names = ("limit", "held_out", "seed", "balanced", "skip_bad", "recategorise")
        return {"source": self.source, **{name: getattr(self, name) for name in names}}


class InstructionStats(Record):
    """How a source became instructions.

    `records = bad + duplicates + passed_over + uncategorised + those there were to choose from`. `bad` are empty or
    broken (the first few in `problems`), `passed_over` were not needed and not asked about, `uncategorised` could not
    be judged (`failures` counts the questions by error code). `categorised` got their category from the judge. The
    categories are counted over all there were to choose from, the chosen and the held out.
    """

    source: str
    records: int
    bad: int
    problems: list[str]
    duplicates: int
    passed_over: int
    categorised: int
    uncategorised: int
    failures: dict[str, int]
    by_category: dict[str, int]
    chosen: dict[str, int]
    held_out: dict[str, int]


def prepare_instructions(
    options: InstructionOptions, folder: Path, on_progress: OnProgress | None = None
) -> InstructionStats:
    """Write INSTRUCTION_OUTPUTS into `folder`: instructions.jsonl, held_out.jsonl and how they came about.

    Raises SampleError for a source that cannot be read or holds too little, and StageError as `categorise` does.
    """
    source = read_instructions(options.source, skip_bad=options.skip_bad)
    given, asked, passed_over = _to_be_asked(source, options)
    answers = _answers(asked, options, folder / CATEGORIES_FILE, on_progress)
    order = {one.instruction.id: number for number, one in enumerate(source.instructions)}
    told = [one.model_copy(update={"category": answers.found[one.id]}) for one in asked if one.id in answers.found]
    instructions = sorted([*given, *told], key=lambda instruction: order[instruction.id])
    chosen, held_out = choose_instructions(instructions, options)
    stats = InstructionStats(
        source=options.source,
        records=source.records,
        bad=source.bad,
        problems=list(source.problems),
        duplicates=source.duplicates,
        passed_over=passed_over,
        categorised=len(told),
        uncategorised=len(asked) - len(told),
        failures=dict(answers.failures),
        by_category=_by_category(instructions),
        chosen=_by_category(chosen),
        held_out=_by_category(held_out),
    )
    write_record(folder / INSTRUCTIONS_STATS_FILE, stats)
    write_records(folder / HELD_OUT_FILE, held_out)
    write_records(folder / INSTRUCTIONS_FILE, chosen)
    return stats


def choose_instructions(
    instructions: Sequence[Instruction], options: InstructionOptions
) -> tuple[list[Instruction], list[Instruction]]:
    """Those to train on and those held out, each in the order of `instructions`. Raises SampleError for too few."""
    if options.held_out < 0 or (options.limit is not None and options.limit < 1):
        raise SampleError("give 1 or more instructions to train on, and 0 or more to hold out")
    wanted = options.held_out + (1 if options.limit is None else options.limit)
    if wanted > len(instructions):
        raise SampleError(
            f"{options.source}: {len(instructions)} usable instructions, and {wanted} are wanted, {options.held_out} "
            "of them held out for evaluation: give more, or ask for fewer"
        )
    held_out = _stratified(instructions, options.held_out, options)
    kept = {instruction.id for instruction in held_out}
    rest = [instruction for instruction in instructions if instruction.id not in kept]
    return _stratified(rest, len(rest) if options.limit is None else options.limit, options), held_out


def equal_shares(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`total` shared out in equal parts, none over its size; what one cannot take goes to the others."""
    shares = dict.fromkeys(sorted(sizes), 0)
    left = min(total, sum(sizes.values()))
    while left:
        hungry = [name for name in shares if shares[name] < sizes[name]]
        part, odd = divmod(left, len(hungry))
        for number, name in enumerate(hungry):
            given = min(part + (number < odd), sizes[name] - shares[name])
            shares[name] += given
            left -= given
    return shares


def _stratified(instructions: Sequence[Instruction], count: int, options: InstructionOptions) -> list[Instruction]:
    """So many of them, shared out over the categories, in their order."""
    if not count:
        return []
    entries = [Entry(one.id, one.category, one.prompt, (), ()) for one in instructions]
    if options.balanced:
        shares = equal_shares(count, _by_category(instructions))
        taken = {
            entry.id
            for category, share in shares.items()
            if share
            for entry in choose([entry for entry in entries if entry.subset == category], None, share, options.seed)
        }
    else:
        taken = {entry.id for entry in choose(entries, None, count, options.seed)}
    return [instruction for instruction in instructions if instruction.id in taken]


def _to_be_asked(source: Source, options: InstructionOptions) -> tuple[list[Instruction], list[Instruction], int]:
    """Instructions whose category is given, those to ask the judge about, and how many others there are."""
    given = [one.instruction for one in source.instructions if one.categorised and not options.recategorise]
    open_ones = [one.instruction for one in source.instructions if options.recategorise or not one.categorised]
    if options.limit is None:
        return given, open_ones, 0
    pool = POOL_FACTOR * (options.limit + options.held_out)
    entries = [Entry(one.id, GENERAL, one.prompt, (), ()) for one in open_ones]
    taken = {entry.id for entry in choose(entries, None, pool, options.seed)} if entries else set()
    asked = [one for one in open_ones if one.id in taken]
    return given, asked, len(open_ones) - len(asked)


def _answers(
    asked: Sequence[Instruction], options: InstructionOptions, path: Path, on_progress: OnProgress | None
) -> Categories:
    if not asked:
        write_records(path, [])
        return Categories({}, {})
    if options.judge is None:
        raise StageError(
            f"{len(asked)} instructions have no category, the first one {asked[0].id}: give --judge-url, so that the "
            "judge says it, or a column category"
        )
    how = CategoryOptions(options.judge, options.max_failures)
    return categorise(asked, how, path, on_progress)


def _by_category(instructions: Sequence[Instruction]) -> dict[str, int]:
    return count_by(instruction.category for instruction in instructions)
