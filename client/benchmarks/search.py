"""`python -m client.benchmarks.search`: choose among candidate questions on one half of the data, report on the other.

For each group of samples (a category, or a single subset as in the paper) every candidate is judged on the training
half; the best one and the baseline (the category's built-in template) are judged on the held-out half. Choosing and
reporting on the same samples, as the paper's authors did, flatters the winner. Every run has its own folder below --out
and is resumed like any other.
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
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from client.benchmarks.catalog import BENCHMARKS, CatalogEntry
from client.benchmarks.command import exit_code_of, ready_model, run_config
from client.benchmarks.flags import DataOptions, JudgeOptions, add_asking_flags, add_data_flags
from client.benchmarks.paper import PaperPrompts
from client.benchmarks.questions import PlanError, Question, load_candidates, one_for_all
from client.benchmarks.results.search import SEARCH_FILE, Accuracy, CandidateResult, GroupResult, SearchResult
from client.benchmarks.rows import Row, judged_rows
from client.benchmarks.run import RunFolder, judge_samples
from client.data.samples import Sample, halves
from client.judge import AsyncJudge
from client.runs.progress import progress_bar
from client.runtime.cli import stderr_console, stdout_console
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.schema import Format, ModelInfo
from client.stats import mcnemar_exact, wilson

if TYPE_CHECKING:
    from rich.console import Console

Grouping: TypeAlias = Literal["category", "subset"]


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """The flags of a search. Exactly one of `paper` and `candidates` is set."""

    data: DataOptions
    judge: JudgeOptions
    out: Path
    per: Grouping
    paper: Path | None
    paper_format: Format
    candidates: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> SearchOptions:
        """Raises ValueError for numbers that cannot work."""
        data, judge = DataOptions.of(args), JudgeOptions.of(args)
        return cls(data, judge, args.out, args.per, args.paper, args.paper_format, args.candidates)


@dataclass(frozen=True, slots=True)
class _SampleGroup:
    name: str
    train: list[Sample]
    held_out: list[Sample]
    candidates: Sequence[Question]
    baseline: Question


class _Search:
    """Runs questions over samples, each pair of the two in its own folder."""

    def __init__(self, entry: CatalogEntry, options: SearchOptions, judge: AsyncJudge, info: ModelInfo) -> None:
        self._entry, self._options, self._judge, self._info = entry, options, judge, info
        self._console = stderr_console()

    async def run(self, groups: Sequence[_SampleGroup]) -> SearchResult:
        """Search every group, then score the held-out rows of all groups together."""
        results: list[GroupResult] = []
        held_out: dict[str, list[Row]] = {"chosen": [], "baseline": []}
        for group in groups:
            result, chosen, baseline = await self._search_group(group)
            results.append(result)
            held_out["chosen"] += chosen
            held_out["baseline"] += baseline
        return SearchResult(
            benchmark=self._entry.benchmark.name,
            judge=self._info.id,
            seed=self._options.data.seed,
            groups=results,
            official={name: self._official_numbers(rows) for name, rows in held_out.items()},
        )

    async def _search_group(self, group: _SampleGroup) -> tuple[GroupResult, list[Row], list[Row]]:
        """The group's result, and the held-out rows of the chosen question and of the baseline."""
        candidates = []
        for index, question in enumerate(group.candidates):
            rows = await self._rows(f"{group.name}/candidate-{index:02}/train", group.train, question)
            candidates.append(self._candidate_result(question, rows))
        # Of equally good candidates the first one is taken.
        best = max(range(len(candidates)), key=lambda index: (candidates[index].train.accuracy or 0.0, -index))
        folder = f"{group.name}/candidate-{best:02}/held-out"
        chosen = await self._rows(folder, group.held_out, group.candidates[best])
        baseline_train = await self._rows(f"{group.name}/baseline/train", group.train, group.baseline)
        baseline = await self._rows(f"{group.name}/baseline/held-out", group.held_out, group.baseline)
        result = GroupResult(
            group=group.name,
            candidates=candidates,
            chosen=candidates[best].name,
            held_out=self._accuracy(chosen),
            baseline=self._candidate_result(group.baseline, baseline_train),
            baseline_held_out=self._accuracy(baseline),
            p=self._p_value(chosen, baseline),
        )
        return result, chosen, baseline

    async def _rows(self, folder: str, samples: Sequence[Sample], question: Question) -> list[Row]:
        plan = one_for_all({sample.subset for sample in samples}, question)
        asking = self._options.judge.asking(plan, self._options.judge.mode or "pointwise")
        config = run_config(self._entry, samples, asking, self._info, await self._judge.templates())
        run = RunFolder(self._options.out / folder, config)
        with progress_bar(self._console, folder) as on_progress:
            return await judge_samples(self._judge, samples, asking, run, on_progress)

    def _candidate_result(self, question: Question, rows: Sequence[Row]) -> CandidateResult:
        return CandidateResult(name=str(question), question=question.described(), train=self._accuracy(rows))

    def _accuracy(self, rows: Sequence[Row]) -> Accuracy:
        credits_ = self._credits(rows)
        right, judged = sum(credits_.values()), len(credits_)
        low, high = wilson(right, judged) if judged else (0.0, 1.0)
        accuracy = right / judged if judged else None
        return Accuracy(accuracy=accuracy, low=low, high=high, judged=judged, failed=len(rows) - judged)

    def _p_value(self, chosen: Sequence[Row], baseline: Sequence[Row]) -> float:
        """McNemar's exact p on the samples that have a verdict from both questions."""
        ours, theirs = self._credits(chosen), self._credits(baseline)
        common = ours.keys() & theirs.keys()
        better = sum(ours[name] > theirs[name] for name in common)
        return mcnemar_exact(better, sum(ours[name] < theirs[name] for name in common))

    def _credits(self, rows: Sequence[Row]) -> dict[str, float]:
        return {row.id: self._entry.benchmark.credit(row, "strict") for row in judged_rows(rows)}

    def _official_numbers(self, rows: Sequence[Row]) -> dict[str, float]:
        scores = self._entry.benchmark.scores(judged_rows(rows), "strict")
        return scores.sections if scores.mean is None else {**scores.sections, "mean": scores.mean}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (too many failures, no judge), 2 (usage, bad input) or 130."""
    args = _search_parser().parse_args(argv)
    entry = BENCHMARKS[args.benchmark]

    def work() -> None:
        options = SearchOptions.of(args)
        groups = _sample_groups(entry, options, options.data.samples(entry))
        result = asyncio.run(_search(entry, options, groups))
        write_whole(options.out / SEARCH_FILE, result.model_dump_json(indent=2) + "\n")
        _print_result(result, stdout_console())

    return exit_code_of(work)


async def _search(entry: CatalogEntry, options: SearchOptions, groups: Sequence[_SampleGroup]) -> SearchResult:
    async with options.judge.client() as judge:
        return await _Search(entry, options, judge, await ready_model(judge)).run(groups)


def _sample_groups(entry: CatalogEntry, options: SearchOptions, samples: Sequence[Sample]) -> list[_SampleGroup]:
    """The samples by category or subset, in halves, each group with its candidates. Raises PlanError."""
    category_of = entry.benchmark.category_of
    key: Callable[[str], str] = category_of if options.per == "category" else str
    train, held_out = halves(samples, options.data.seed)
    candidates = _candidates(options, {sample.subset for sample in samples}, key)
    groups = []
    for name in dict.fromkeys(key(sample.subset) for sample in samples):
        if not candidates.get(name):
            raise PlanError(f"no candidates for {name}: add them, or choose other samples with --subsets")
        own_train, own_held_out = (
            [sample for sample in half if key(sample.subset) == name] for half in (train, held_out)
        )
        if not own_train or not own_held_out:
            raise PlanError(f"{name} has too few samples for two halves: raise --limit")
        baseline = Question(category=name if options.per == "category" else category_of(name))
        groups.append(_SampleGroup(name, own_train, own_held_out, candidates[name], baseline))
    return groups


def _candidates(
    options: SearchOptions, subsets: set[str], key: Callable[[str], str]
) -> Mapping[str, Sequence[Question]]:
    if options.paper is None:
        assert options.candidates is not None
        return load_candidates(options.candidates)
    prompts = PaperPrompts.load(options.paper)
    subsets_of: dict[str, list[str]] = {}
    for subset in sorted(subsets):
        subsets_of.setdefault(key(subset), []).append(subset)
    return {name: prompts.candidates_for(members, options.paper_format) for name, members in subsets_of.items()}


def _print_result(result: SearchResult, console: Console) -> None:
    from rich.table import Table

    for group in result.groups:
        baseline = group.baseline
        table = Table(title=f"{group.group}: {baseline.train.judged} pairs to choose on", title_justify="left")
        for title in ("question", "training half", "held-out half"):
            table.add_column(title)
        for candidate in sorted(group.candidates, key=lambda candidate: -(candidate.train.accuracy or 0.0)):
            held_out = group.held_out if candidate.name == group.chosen else None
            table.add_row(candidate.name, _accuracy_text(candidate.train), _accuracy_text(held_out))
        table.add_row(
            f"baseline: {baseline.name}", _accuracy_text(baseline.train), _accuracy_text(group.baseline_held_out)
        )
        console.print(table, f"chosen against baseline, held-out half: p = {group.p:.3g}\n")
    for name, numbers in result.official.items():
        console.print(f"{name}, held-out half: " + ", ".join(f"{key} {value:.1%}" for key, value in numbers.items()))


def _accuracy_text(accuracy: Accuracy | None) -> str:
    if accuracy is None or accuracy.accuracy is None:
        return ""
    failed = f", {accuracy.failed} failed" if accuracy.failed else ""
    return f"{accuracy.accuracy:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}{failed})"


def _search_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client.benchmarks.search",
        description="Choose the best question for each category on one half of the data; report on the other half.",
    )
    parser.add_argument("--benchmark", choices=list(BENCHMARKS), default="rewardbench", help="default: rewardbench")
    add_data_flags(
        parser,
        data_help="as for the benchmark's own command",
        seed_help="seed of --limit and of the halves (default: 0)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the search; a rerun goes on in it")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--paper", type=Path, metavar="FILE", help="the paper's candidates, from its authors' JSON")
    source.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help='JSON: {"category": ["template name", {"name": …, "template": {…}}, …]}',
    )
    parser.add_argument("--paper-format", choices=get_args(Format), default="raw", help="default: raw")
    parser.add_argument("--per", choices=get_args(Grouping), default="category", help="choose one question for each")
    add_asking_flags(parser, default_mode="pointwise")
    return parser


if __name__ == "__main__":
    program.finish(main)
