"""`python -m client.benchmarks.compare RUN RUN…`: several judges on the same data, side by side and sample by sample.

    folders ── read_runs ──> Run ── paired, each against the first ──> Comparison ──> terminal, compare.json, .html

Two runs are held against each other on the samples that both judged; everything is computed anew from items.jsonl.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.compare", "benchmarks")

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from client.benchmarks.command import NAMES, command_named
from client.benchmarks.report.html import p_value, render, signed
from client.benchmarks.results.numbers import Summary
from client.benchmarks.results.paired import Estimate, Paired, Scoring, paired
from client.benchmarks.results.records import ITEMS_FILE, SUMMARY_FILE, Row, TiePolicy, read_rows
from client.benchmarks.results.summary import summarise
from client.benchmarks.standing import Benchmark
from client.runtime.cli import fail, stdout_console
from client.runtime.extras import needs
from client.runtime.files import write_whole
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE

if TYPE_CHECKING:
    from rich.console import Console

JSON_FILE: Final = "compare.json"
HTML_FILE: Final = "compare.html"
RESAMPLES: Final = 2000


class CompareError(Exception):
    """These runs cannot be compared; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run as read: `name` is its folder's, or the path as given where two folders have one name."""

    name: str
    summary: Summary
    rows: list[Row]


class Comparison(BaseModel):
    """What compare.json holds. `runs` are whole summaries, by name, the `baseline` first, under its policy of ties."""

    model_config = ConfigDict(extra="ignore", frozen=True)

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
    args = _parser().parse_args(argv)
    try:
        runs = read_runs(args.runs)
        comparison = compare(runs, seed=args.seed, resamples=args.resamples)
        if args.out is not None:
            write(comparison, args.out)
        print_comparison(comparison, stdout_console())
    except CompareError as error:
        return fail(error, USAGE)
    except (ImportError, OSError) as error:
        return fail(error, FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    return OK


def benchmark_named(name: str) -> Benchmark:
    """The benchmark that a summary names. Raises CompareError for one that is not known."""
    if name not in NAMES:
        raise CompareError(f"unknown benchmark {name!r}: known are {', '.join(NAMES)}")
    return command_named(name).benchmark


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs, of one benchmark and the same data, or CompareError. The first one's policy of ties is everyone's."""
    if len(folders) < 2:
        raise CompareError("give two run folders or more")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise CompareError("a run folder is given twice")
    written = [_read(folder / SUMMARY_FILE) for folder in folders]
    first = written[0]
    for folder, summary in zip(folders, written, strict=True):
        if summary.benchmark != first.benchmark:
            raise CompareError(f"{folder} is a run of {summary.benchmark}, {folders[0]} of {first.benchmark}")
        if summary.config.get("data_digest") != first.config.get("data_digest"):
            raise CompareError(
                f"{folder} and {folders[0]} judged different data (data_digest differs): run both with the same "
                "--data, --subsets, --limit and --seed"
            )
    benchmark = benchmark_named(first.benchmark)
    names = _names(folders)
    return [
        _run(name, folder, benchmark, summary, first.ties)
        for name, folder, summary in zip(names, folders, written, strict=True)
    ]


def compare(runs: Sequence[Run], *, seed: int = 0, resamples: int = RESAMPLES) -> Comparison:
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


def write(comparison: Comparison, folder: Path) -> None:
    """compare.json and compare.html, which needs nothing else, into the folder. Raises OSError, ImportError."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JSON_FILE, comparison.model_dump_json(indent=2) + "\n")
    page = render(
        "compare.html.j2",
        title=f"{comparison.benchmark}: {len(comparison.runs)} runs compared",
        comparison=comparison,
        groups=side_by_side(comparison.runs),
    )
    write_whole(folder / HTML_FILE, page)


def side_by_side(runs: Mapping[str, Summary]) -> list[list[tuple[str, list[str]]]]:
    """Groups of lines (what, its value in each run): official numbers, subsets, judging."""
    with needs("benchmarks"):
        from client.benchmarks.report.table import percent
    all_of = list(runs.values())
    sections = dict.fromkeys(name for summary in all_of for name in summary.sections)
    subsets = dict.fromkeys(name for summary in all_of for name in summary.subsets)
    official = [("mean", [percent(summary.mean) for summary in all_of])]
    official += [(name, [percent(summary.sections.get(name)) for summary in all_of]) for name in sections]
    parts = [
        (name, [percent(summary.subsets[name].accuracy if name in summary.subsets else None) for summary in all_of])
        for name in subsets
    ]
    masses = [summary.label_mass for summary in all_of]
    judging = [
        ("label mass, mean", ["-" if mass is None else f"{mass.mean:.3f}" for mass in masses]),
        ("samples judged", [str(summary.counts.judged) for summary in all_of]),
        ("samples failed", [str(summary.counts.failed) for summary in all_of]),
        ("ties", [str(summary.counts.ties) for summary in all_of]),
    ]
    return [official, parts, judging]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The same on the terminal."""
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
    for found in comparison.against_baseline:
        for line in _sentences(found, comparison.baseline):
            console.print(line, markup=False, highlight=False)


def _sentences(found: Paired, baseline: str) -> list[str]:
    left_out = (
        f"{found.left_out} left out: no verdict on {found.left_out_run} here, on {found.left_out_baseline} there"
        if found.left_out
        else "none left out"
    )
    return [
        f"{found.run} against {baseline}, on the {found.samples} samples that both judged ({left_out}):",
        f"  accuracy       {_words(found.accuracy)}",
        f"  official mean  {_words(found.official_mean)}",
        f"  better on {found.better}, worse on {found.worse} samples, McNemar exact p {p_value(found.mcnemar_p)}",
        *(f"  note: {note}" for note in found.notes),
    ]


def _words(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None or found.p is None:
        return signed(found.value)
    return f"{signed(found.value)}, 95% interval {signed(found.low)} to {signed(found.high)}, p {p_value(found.p)}"


def _read(path: Path) -> Summary:
    try:
        return Summary.load(path)
    except FileNotFoundError as error:
        raise CompareError(f"{path} is not there: the run has not finished; its command goes on with it") from error
    except (OSError, ValueError) as error:
        raise CompareError(f"{path} cannot be read as a summary: {_first_line(error)}") from error


def _run(name: str, folder: Path, benchmark: Benchmark, written: Summary, ties: TiePolicy) -> Run:
    try:
        rows = read_rows(folder / ITEMS_FILE)
        return Run(name, summarise(benchmark, rows, config=written.config, ties=ties), rows)
    except (OSError, ValueError) as error:
        raise CompareError(f"{folder / ITEMS_FILE} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    return str(error)


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client.benchmarks.compare",
        description="Hold runs of one benchmark on the same data against the first of them.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run; the first is the baseline"
    )
    parser.add_argument(
        "--out", type=Path, help=f"folder for {JSON_FILE} and {HTML_FILE} (default: neither is written)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
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
