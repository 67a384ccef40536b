"""`python -m client.benchmarks.compare RUN RUN…`: several judges on the same data, side by side and sample by sample.

    folders ── read_runs ──> FinishedRun ── paired, each against the first ──> Comparison ──> terminal, .json, .html

Two runs are compared on the samples that both judged; everything is computed anew from items.jsonl.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.compare", "benchmarks")

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.benchmarks.catalog import BENCHMARKS
from client.benchmarks.report.formats import p_value, pair_verdict, percent, signed
from client.benchmarks.report.page import render_page
from client.benchmarks.results.finished import RunFolderError, read_items, read_summary, unreadable_items
from client.benchmarks.results.paired import Estimate, Paired, Scoring, paired
from client.benchmarks.results.summarise import summarise
from client.benchmarks.results.summary import Summary
from client.benchmarks.rows import FrozenModel, Row, TiePolicy
from client.benchmarks.scoring.benchmark import Benchmark
from client.runtime.cli import fail, stdout_console
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE

if TYPE_CHECKING:
    from rich.console import Console

JSON_FILE: Final = "compare.json"
HTML_FILE: Final = "compare.html"
RESAMPLES: Final = 2000


class CompareError(Exception):
    """These runs cannot be compared; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run read from its folder. `name` is the folder's, or its path if two folders have the same name."""

    name: str
    summary: Summary
    rows: list[Row]


class Comparison(FrozenModel):
    """What compare.json holds. `runs` are whole summaries by name, the `baseline` first, all by its policy of ties."""

    benchmark: str
    data_digest: str | None
    ties: TiePolicy
    seed: int
    resamples: int
    baseline: str
    runs: dict[str, Summary]
    against_baseline: list[Paired]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (cannot be written, a package is missing), 2 (runs that cannot be compared) or 130."""
    args = _compare_parser().parse_args(argv)
    try:
        console = stdout_console()  # first: a missing package is reported before minutes of work
        runs = read_runs(args.runs)
        comparison = compare_runs(runs, seed=args.seed, resamples=args.resamples)
        if args.out is not None:
            write_comparison(comparison, args.out)
        print_comparison(comparison, console)
    except (CompareError, RunFolderError) as error:
        return fail(error, USAGE)
    except (ImportError, OSError) as error:
        return fail(error, FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    return OK


def benchmark_named(name: str) -> Benchmark:
    """The benchmark that a summary names. Raises CompareError for an unknown one."""
    if name not in BENCHMARKS:
        raise CompareError(f"unknown benchmark {name!r}: known are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name].benchmark


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs, all scored by the first one's policy of ties.

    Raises CompareError unless they are of one benchmark and the same data, and RunFolderError.
    """
    if len(folders) < 2:
        raise CompareError("give two run folders or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CompareError("a run folder is given twice")
    summaries = [read_summary(folder) for folder in folders]
    first = summaries[0]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary.benchmark != first.benchmark:
            raise CompareError(f"{folder} is a run of {summary.benchmark}, {folders[0]} of {first.benchmark}")
        if summary.config.get("data_digest") != first.config.get("data_digest"):
            raise CompareError(
                f"{folder} and {folders[0]} judged different data (data_digest differs): run both with the same "
                "--data, --subsets, --limit and --seed"
            )
    benchmark = benchmark_named(first.benchmark)
    return [
        _read_run(name, folder, benchmark, summary, first.ties)
        for name, folder, summary in zip(_run_names(folders), folders, summaries, strict=True)
    ]


def compare_runs(runs: Sequence[FinishedRun], *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
    """Every run against the first."""
    baseline = runs[0]
    summary = baseline.summary
    digest = summary.config.get("data_digest")
    scoring = Scoring(benchmark_named(summary.benchmark), summary.ties, seed, resamples)
    return Comparison(
        benchmark=summary.benchmark,
        data_digest=None if digest is None else str(digest),
        ties=summary.ties,
        seed=seed,
        resamples=resamples,
        baseline=baseline.name,
        runs={run.name: run.summary for run in runs},
        against_baseline=[paired(run.name, run.rows, baseline.rows, scoring) for run in runs[1:]],
    )


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write compare.json and the self-contained compare.html into the folder. Raises OSError, ImportError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JSON_FILE, comparison.model_dump_json(indent=2) + "\n")
    page = render_page(
        "compare.html.j2",
        title=f"{comparison.benchmark}: {len(comparison.runs)} runs compared",
        comparison=comparison,
        groups=side_by_side(comparison.runs),
        verdicts=[pair_verdict(pair, comparison.baseline) for pair in comparison.against_baseline],
    )
    write_whole(folder / HTML_FILE, page)


def side_by_side(runs: Mapping[str, Summary]) -> list[list[tuple[str, list[str]]]]:
    """Groups of lines (name, its value in each run): official numbers, subsets, judging."""
    summaries = list(runs.values())

    def line(name: str, value: Callable[[Summary], str]) -> tuple[str, list[str]]:
        return name, [value(summary) for summary in summaries]

    def section(name: str) -> tuple[str, list[str]]:
        return line(name, lambda summary: percent(summary.sections.get(name)))

    def subset(name: str) -> tuple[str, list[str]]:
        return line(name, lambda summary: _subset_accuracy(summary, name))

    sections = dict.fromkeys(name for summary in summaries for name in summary.sections)
    subsets = dict.fromkeys(name for summary in summaries for name in summary.subsets)
    return [
        [line("mean", lambda summary: percent(summary.mean)), *map(section, sections)],
        [*map(subset, subsets)],
        [
            line("label mass, mean", _mean_label_mass),
            line("samples judged", lambda summary: str(summary.counts.judged)),
            line("samples failed", lambda summary: str(summary.counts.failed)),
            line("ties", lambda summary: str(summary.counts.ties)),
        ],
    ]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The runs side by side, and each one against the baseline."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{comparison.benchmark}, % of what each run judged"), title_justify="left")
    table.add_column("", overflow="fold")
    for name in comparison.runs:
        table.add_column(Text(name), justify="right", overflow="fold")
    for group in side_by_side(comparison.runs):
        table.add_section()
        for name, values in group:
            table.add_row(Text(name), *values)
    console.print(table)
    for pair in comparison.against_baseline:
        for sentence in _sentences(pair, comparison.baseline):
            console.print(sentence, markup=False, highlight=False)
    for pair in comparison.against_baseline:
        console.print(pair_verdict(pair, comparison.baseline), markup=False, highlight=False, style="bold")


def _sentences(pair: Paired, baseline: str) -> list[str]:
    left_out = (
        f"{pair.left_out} left out: no verdict on {pair.left_out_run} here, on {pair.left_out_baseline} there"
        if pair.left_out
        else "none left out"
    )
    return [
        f"{pair.run} against {baseline}, on the {pair.samples} samples that both judged ({left_out}):",
        f"  accuracy       {_difference(pair.accuracy)}",
        f"  official mean  {_difference(pair.official_mean)}",
        f"  better on {pair.better}, worse on {pair.worse} samples, McNemar exact p {p_value(pair.mcnemar_p)}",
        *(f"  note: {note}" for note in pair.notes),
    ]


def _difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    value, low, high, p = estimate.value, estimate.low, estimate.high, estimate.p
    if low is None or high is None or p is None:
        return signed(value)
    return f"{signed(value)}, 95% interval {signed(low)} to {signed(high)}, p {p_value(p)}"


def _subset_accuracy(summary: Summary, name: str) -> str:
    return percent(summary.subsets[name].accuracy if name in summary.subsets else None)


def _mean_label_mass(summary: Summary) -> str:
    return "-" if summary.label_mass is None else f"{summary.label_mass.mean:.3f}"


def _read_run(name: str, folder: Path, benchmark: Benchmark, summary: Summary, ties: TiePolicy) -> FinishedRun:
    rows = read_items(folder)
    try:
        return FinishedRun(name, summarise(benchmark, rows, config=summary.config, ties=ties), rows)
    except ValueError as error:
        raise unreadable_items(folder, error) from error


def _run_names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _compare_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client.benchmarks.compare",
        description="Compare runs of one benchmark on the same data with the first of them.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run; the first is the baseline"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for {JSON_FILE} and {HTML_FILE} (default: neither is written)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    parser.add_argument(
        "--resamples", type=_positive, default=RESAMPLES, help=f"bootstrap resamples (default: {RESAMPLES})"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


if __name__ == "__main__":
    program.finish(main)
