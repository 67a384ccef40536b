"""What the policy is asked: instructions are read, deduplicated, categorised and chosen from.

    source ── reading.py ──> distinct ── categories.py, if none is given ──> chosen ────> instructions.jsonl
                                                                         └─ held out ──> held_out.jsonl

The choice depends only on the seed and the instructions' ids. No two prompts are equal up to white space, so that no
instruction held out for evaluation is trained on; paraphrases are not detected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client.data.samples import Sample as BenchmarkSample
from client.data.samples import choose
from client.data.tables import DataError
from client.labels.records import GENERAL, count_by
from client.runs.progress import OnProgress
from trainer.errors import StageError
from trainer.instructions.categories import CategoryOptions, CategoryResult, categorise
from trainer.instructions.reading import InstructionSource, read_instructions
from trainer.labels.labelers import JudgeOptions
from trainer.run.files import write_record, write_records
from trainer.run.records import HELD_OUT_FILE, INSTRUCTIONS_FILE, INSTRUCTIONS_STATS_FILE, Instruction, Record

CATEGORIES_FILE: Final = "categories.jsonl"
# The stage's files. The judge's answers about categories are kept so that a rerun resumes; the file may be empty.
INSTRUCTION_OUTPUTS: Final = (INSTRUCTIONS_FILE, HELD_OUT_FILE, INSTRUCTIONS_STATS_FILE, CATEGORIES_FILE)
# The judge is asked about at most this many instructions for each one to be chosen.
POOL_FACTOR: Final = 4


@dataclass(frozen=True, slots=True)
class InstructionOptions:
    """Where instructions come from and which are chosen.

    `limit` instructions are trained on (None: all), `held_out` others are kept for evaluation. Both are divided among
    the categories in proportion to their sizes, or equally with `balanced`, as far as each category reaches. Without a
    `judge`, every instruction must have a category. `recategorise` asks the judge even about those that have one.
    """

    source: str
    limit: int | None = field(default=None, metadata={"help": "instructions to train on; none: all"})
    held_out: int = field(default=0, metadata={"help": "further instructions to keep for evaluation"})
    seed: int = 0
    balanced: bool = field(
        default=False, metadata={"help": "choose equally many of each category instead of in proportion to its size"}
    )
    skip_bad: bool = field(
        default=False,
        metadata={"help": "leave out empty and broken instructions and count them, instead of stopping at the first"},
    )
    recategorise: bool = field(
        default=False, metadata={"help": "let the judge choose the category even if one is given"}
    )
    judge: JudgeOptions | None = None
    max_failures: float = 0.02

    def described(self) -> dict[str, object]:
        """The settings that decide which instructions are chosen; a run records the source's contents separately."""
        names = ("limit", "held_out", "seed", "balanced", "skip_bad", "recategorise")
        return {"source": self.source, **{name: getattr(self, name) for name in names}}


class InstructionStats(Record):
    """How a source became instructions.

    `records = bad + duplicates + passed_over + uncategorised + candidates`. `bad` are empty or broken (`problems`
    describes the first few), `passed_over` were not needed, so the judge was not asked about them, `uncategorised`
    could not be judged (`failures` counts the questions by error code). `categorised` got their category from the
    judge. `by_category` counts the candidates, `chosen` and `held_out` what was taken of them.
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
    """Write INSTRUCTION_OUTPUTS into `folder`: instructions.jsonl, held_out.jsonl, statistics, the judge's answers.

    Raises DataError for a source that cannot be read or is too small, and StageError as `categorise` does.
    """
    source = read_instructions(options.source, skip_bad=options.skip_bad)
    given, asked, passed_over = _split_by_category(source, options)
    result = _categorise(asked, options, folder / CATEGORIES_FILE, on_progress)
    order = {one.instruction.id: number for number, one in enumerate(source.instructions)}
    judged = [one.model_copy(update={"category": result.by_id[one.id]}) for one in asked if one.id in result.by_id]
    instructions = sorted([*given, *judged], key=lambda instruction: order[instruction.id])
    chosen, held_out = choose_instructions(instructions, options)
    stats = InstructionStats(
        source=options.source,
        records=source.records,
        bad=source.bad,
        problems=list(source.problems),
        duplicates=source.duplicates,
        passed_over=passed_over,
        categorised=len(judged),
        uncategorised=len(asked) - len(judged),
        failures=dict(result.failures),
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
    """Those to train on and those to hold out, each in the order of `instructions`. Raises DataError for too few."""
    require_enough(len(instructions), options)
    # First, so that runs of different sizes are evaluated on the same instructions.
    held_out = _stratified(instructions, options.held_out, options)
    held_out_ids = {instruction.id for instruction in held_out}
    rest = [instruction for instruction in instructions if instruction.id not in held_out_ids]
    return _stratified(rest, len(rest) if options.limit is None else options.limit, options), held_out


def require_enough(usable: int, options: InstructionOptions) -> None:
    """Raise DataError if so many usable instructions are fewer than the options want."""
    if options.held_out < 0 or (options.limit is not None and options.limit < 1):
        raise DataError("give 1 or more instructions to train on, and 0 or more to hold out")
    needed = options.held_out + (1 if options.limit is None else options.limit)
    if needed > usable:
        raise DataError(
            f"{options.source}: {usable} usable instructions, and {needed} are wanted, {options.held_out} "
            "of them held out for evaluation: give more, or ask for fewer (--count, --held-out)"
        )


def equal_shares(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide `total` equally, no share above its size; what one cannot take goes to the others."""
    shares = dict.fromkeys(sorted(sizes), 0)
    left = min(total, sum(sizes.values()))
    while left:
        unfilled = [name for name in shares if shares[name] < sizes[name]]
        part, odd = divmod(left, len(unfilled))
        for number, name in enumerate(unfilled):
            addition = min(part + (number < odd), sizes[name] - shares[name])
            shares[name] += addition
            left -= addition
    return shares


def _stratified(instructions: Sequence[Instruction], count: int, options: InstructionOptions) -> list[Instruction]:
    """`count` of the instructions, divided among the categories, in their order."""
    if not count:
        return []
    if not options.balanced:
        return _chosen(instructions, count, options.seed)
    ids: set[str] = set()
    for category, share in equal_shares(count, _by_category(instructions)).items():
        group = [instruction for instruction in instructions if instruction.category == category]
        ids.update(one.id for one in (_chosen(group, share, options.seed) if share else ()))
    return [instruction for instruction in instructions if instruction.id in ids]


def _chosen(instructions: Sequence[Instruction], count: int, seed: int) -> list[Instruction]:
    """The benchmarks' seeded, stratified choice of at most `count`, in the instructions' order."""
    samples = [BenchmarkSample(one.id, one.category, one.prompt, (), ()) for one in instructions]
    ids = {sample.id for sample in choose(samples, None, count, seed)}
    return [instruction for instruction in instructions if instruction.id in ids]


def _split_by_category(
    source: InstructionSource, options: InstructionOptions
) -> tuple[list[Instruction], list[Instruction], int]:
    """Instructions that have a category, those to ask the judge about, and how many others there are."""
    given = [one.instruction for one in source.instructions if one.categorised and not options.recategorise]
    # As one category, so that the choice among them is not stratified by categories that the judge will replace.
    missing = [
        one.instruction.model_copy(update={"category": GENERAL})
        for one in source.instructions
        if options.recategorise or not one.categorised
    ]
    if options.limit is None or not missing:
        return given, missing, 0
    asked = _chosen(missing, POOL_FACTOR * (options.limit + options.held_out), options.seed)
    return given, asked, len(missing) - len(asked)


def _categorise(
    asked: Sequence[Instruction], options: InstructionOptions, path: Path, on_progress: OnProgress | None
) -> CategoryResult:
    if not asked:
        write_records(path, [])
        return CategoryResult({}, {})
    if options.judge is None:
        raise StageError(
            f"{len(asked)} instructions have no category, the first one {asked[0].id}: give --judge-url, so that the "
            "judge chooses it, or a column category"
        )
    return categorise(asked, CategoryOptions(options.judge, options.max_failures), path, on_progress)


def _by_category(instructions: Sequence[Instruction]) -> dict[str, int]:
    return count_by(instruction.category for instruction in instructions)
