"""`python -m client.benchmarks.search`: choose among candidate questions on one half of the data, report on the other.

For each group of samples (a category, or a subset as the paper has it) every candidate is judged on the training half;
the best one, and the baseline (the category's built-in template), are judged on the held-out half. Choosing and
reporting on the same samples, as the paper's authors did, flatters the winner. Every run has a folder of its own below
--out and is resumed like any other.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.search", "benchmarks")

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, get_args

from pydantic import BaseModel, ConfigDict

from client.benchmarks import command as commands
from client.benchmarks.command import Command
from client.benchmarks.data.samples import choose, halves
from client.benchmarks.plan import PaperPrompts, PlanError, Question, load_candidates, one_for_all
from client.benchmarks.results.records import Row, Sample
from client.benchmarks.run import Asking, RunFolder, judge_samples
from client.judge import AsyncJudge
from client.runtime.cli import stderr_console, stdout_console
from client.runtime.files import write_whole
from client.schema import Format, ModelInfo
from client.stats import mcnemar_exact, wilson

if TYPE_CHECKING:
    from rich.console import Console

SEARCH_FILE: Final = "search.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Accuracy(_Part):
    """Share of judged pairs that are right, with its 95% Wilson interval; `failed` ones are in no share."""

    accuracy: float | None
    low: float
    high: float
    judged: int
    failed: int


class Candidate(_Part):
    """One question and how it did on the training half."""

    name: str
    question: dict[str, object]
    train: Accuracy


class GroupResult(_Part):
    """What the search found for one group. `p` is McNemar's exact, chosen against baseline, on the held-out half."""

    group: str
    candidates: list[Candidate]
    chosen: str
    held_out: Accuracy
    baseline: Candidate
    baseline_held_out: Accuracy
    p: float


class SearchResult(_Part):
    """search.json. `official` are the benchmark's own numbers on the held-out half, chosen and baseline."""

    benchmark: str
    judge: str
    seed: int
    groups: list[GroupResult]
    official: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class _Group:
    name: str
    train: list[Sample]
    held_out: list[Sample]
    candidates: Sequence[Question]
    baseline: Question


class _Search:
    """Runs questions over samples, each pair of them in its own folder."""

    def __init__(self, command: Command, args: argparse.Namespace, judge: AsyncJudge, info: ModelInfo) -> None:
        self._command = command
        self._args = args
        self._judge = judge
        self._info = info
        self._console = stderr_console()

    async def rows(self, where: str, samples: Sequence[Sample], question: Question) -> list[Row]:
        """All rows of these samples under this question."""
        plan = one_for_all({sample.subset for sample in samples}, question)
        args = self._args
        asking = Asking(plan, args.mode, args.truncation, args.max_failures, commands.bulk_options(args))
        templates = (await self._judge.templates()).templates
        config = commands.run_config(self._command.benchmark, samples, asking, self._info, templates)
        folder = RunFolder(args.out / where, config)
        with commands.progress_bar(self._console, where) as on_progress:
            return await judge_samples(self._judge, samples, asking, folder, on_progress)

    def accuracy(self, rows: Sequence[Row]) -> Accuracy:
        known = self._credits(rows)
        right, judged = sum(known.values()), len(known)
        low, high = wilson(right, judged) if judged else (0.0, 1.0)
        accuracy = right / judged if judged else None
        return Accuracy(accuracy=accuracy, low=low, high=high, judged=judged, failed=len(rows) - judged)

    def p_value(self, one: Sequence[Row], other: Sequence[Row]) -> float:
        """Of the difference between two questions on the samples that both have a verdict for."""
        first, second = self._credits(one), self._credits(other)
        both = first.keys() & second.keys()
        gained = sum(first[key] > second[key] for key in both)
        return mcnemar_exact(gained, sum(first[key] < second[key] for key in both))

    def _credits(self, rows: Sequence[Row]) -> dict[str, float]:
        return {row.id: self._command.benchmark.credit(row, "strict") for row in rows if row.error is None}


async def _search(
    search: _Search, groups: Sequence[_Group], command: Command
) -> tuple[list[GroupResult], dict[str, dict[str, float]]]:
    results = []
    chosen_rows: list[Row] = []
    baseline_rows: list[Row] = []
    for group in groups:
        result, rows, base = await _search_group(search, group)
        results.append(result)
        chosen_rows += rows
        baseline_rows += base
    official = {name: _numbers(command, rows) for name, rows in (("chosen", chosen_rows), ("baseline", baseline_rows))}
    return results, official


async def _search_group(search: _Search, group: _Group) -> tuple[GroupResult, list[Row], list[Row]]:
    candidates = []
    for index, question in enumerate(group.candidates):
        rows = await search.rows(f"{group.name}/candidate-{index:02}/train", group.train, question)
        candidates.append(Candidate(name=str(question), question=question.described(), train=search.accuracy(rows)))
    best = max(range(len(candidates)), key=lambda index: (candidates[index].train.accuracy or 0.0, -index))
    rows = await search.rows(f"{group.name}/candidate-{best:02}/held-out", group.held_out, group.candidates[best])
    base_train = await search.rows(f"{group.name}/baseline/train", group.train, group.baseline)
    base = await search.rows(f"{group.name}/baseline/held-out", group.held_out, group.baseline)
    result = GroupResult(
        group=group.name,
        candidates=candidates,
        chosen=candidates[best].name,
        held_out=search.accuracy(rows),
        baseline=Candidate(
            name=str(group.baseline), question=group.baseline.described(), train=search.accuracy(base_train)
        ),
        baseline_held_out=search.accuracy(base),
        p=search.p_value(rows, base),
    )
    return result, rows, base


def _numbers(command: Command, rows: Sequence[Row]) -> dict[str, float]:
    standing = command.benchmark.standing([row for row in rows if row.error is None], "strict")
    mean = {} if standing.mean is None else {"mean": standing.mean}
    return {**standing.sections, **mean}


def _groups(command: Command, args: argparse.Namespace, samples: Sequence[Sample]) -> list[_Group]:
    """The samples by category or subset, in halves, each with its candidates; raises PlanError."""
    key: Callable[[str], str] = command.category_of if args.per == "category" else str
    train, held_out = halves(samples, args.seed)
    candidates = _candidates(args, {sample.subset for sample in samples}, key)
    groups = []
    for name in dict.fromkeys(key(sample.subset) for sample in samples):
        if not candidates.get(name):
            raise PlanError(f"no candidates for {name}: add them, or choose other samples with --subsets")
        mine = [sample for sample in train if key(sample.subset) == name]
        others = [sample for sample in held_out if key(sample.subset) == name]
        if not mine or not others:
            raise PlanError(f"{name} has too few samples for two halves: raise --limit")
        category = name if args.per == "category" else command.category_of(name)
        groups.append(_Group(name, mine, others, candidates[name], Question(category=category)))
    return groups


def _candidates(
    args: argparse.Namespace, subsets: set[str], key: Callable[[str], str]
) -> Mapping[str, Sequence[Question]]:
    if args.candidates is not None:
        return load_candidates(args.candidates)
    prompts = PaperPrompts.load(args.paper)
    by_group: dict[str, list[str]] = {}
    for subset in sorted(subsets):
        by_group.setdefault(key(subset), []).append(subset)
    return {name: prompts.candidates_for(members, args.paper_format) for name, members in by_group.items()}


def _print(result: SearchResult, console: Console) -> None:
    from rich.table import Table

    for group in result.groups:
        table = Table(title=f"{group.group}: {group.baseline.train.judged} pairs to choose on", title_justify="left")
        for title in ("question", "training half", "held-out half"):
            table.add_column(title)
        for each in sorted(group.candidates, key=lambda one: -(one.train.accuracy or 0.0)):
            held = group.held_out if each.name == group.chosen else None
            table.add_row(each.name, _shown(each.train), _shown(held))
        table.add_row(f"baseline: {group.baseline.name}", _shown(group.baseline.train), _shown(group.baseline_held_out))
        console.print(table, f"chosen against baseline, held-out half: p = {group.p:.3g}\n")
    for name, numbers in result.official.items():
        console.print(f"{name}, held-out half: " + ", ".join(f"{key} {value:.1%}" for key, value in numbers.items()))


def _shown(accuracy: Accuracy | None) -> str:
    if accuracy is None or accuracy.accuracy is None:
        return ""
    failed = f", {accuracy.failed} failed" if accuracy.failed else ""
    return f"{accuracy.accuracy:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}{failed})"


async def _run(command: Command, args: argparse.Namespace, groups: Sequence[_Group]) -> SearchResult:
    async with commands.judge_client(args) as judge:
        info = await commands.ready_model(judge)
        results, official = await _search(_Search(command, args, judge, info), groups, command)
    return SearchResult(
        benchmark=command.benchmark.name, judge=info.id, seed=args.seed, groups=results, official=official
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    args = _parser().parse_args(argv)
    command = commands.command_named(args.benchmark)

    def work() -> None:
        samples = choose(commands.load(command, args.data), args.subsets, args.limit, args.seed)
        result = asyncio.run(_run(command, args, _groups(command, args, samples)))
        write_whole(args.out / SEARCH_FILE, result.model_dump_json(indent=2) + "\n")
        _print(result, stdout_console())

    return commands.exit_code_of(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client.benchmarks.search",
        description="Choose the best question for each category on one half of the data; report on the other half.",
    )
    parser.add_argument("--benchmark", choices=commands.NAMES, default="rewardbench", help="default: rewardbench")
    parser.add_argument("--data", required=True, metavar="FILE|hub", help="as for the benchmark's own command")
    parser.add_argument("--out", type=Path, required=True, help="folder of the search; a rerun goes on in it")
    parser.add_argument("--subsets", nargs="+", metavar="NAME", help="only these subsets; patterns with * are fine")
    parser.add_argument("--limit", type=int, help="so many samples, in proportion from every subset")
    parser.add_argument("--seed", type=int, default=0, help="of --limit and of the halves (default: 0)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--paper", type=Path, metavar="FILE", help="the paper's candidates, from its authors' JSON")
    source.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help='JSON: {"category": ["template name", {"name": …, "template": {…}}, …]}',
    )
    parser.add_argument("--paper-format", choices=get_args(Format), default="raw", help="default: raw")
    parser.add_argument(
        "--per", choices=("category", "subset"), default="category", help="what a question is chosen for"
    )
    commands.asking_arguments(parser)
    commands.judge_arguments(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
