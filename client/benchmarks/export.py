"""`python -m client.benchmarks.export RUN`: a finished run as the files that a leaderboard keeps.

    run folder, data ── read_run ──> JudgedRun ── results.leaderboard ──> eval-set/…, eval-set-scores/…

items.jsonl holds no texts, so the data are read again and held against the digest of what was judged.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.benchmarks.export", "benchmarks")

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from client.benchmarks.catalog import BENCHMARKS
from client.benchmarks.flags import DataOptions
from client.benchmarks.results.finished import RunFolderError, read_items, read_summary
from client.benchmarks.results.leaderboard import (
    LEADERBOARDS,
    Identity,
    Judged,
    Leaderboard,
    model_type_of,
    results_text,
    scores_text,
)
from client.benchmarks.results.summary import Summary
from client.benchmarks.rows import Row
from client.data.samples import Sample, digest
from client.data.tables import DataError
from client.runtime.cli import fail
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE

RESULTS_FOLDER: Final = "eval-set"
SCORES_FOLDER: Final = "eval-set-scores"
# Names on the hub; both parts become names of files.
_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


class ExportError(Exception):
    """This run cannot be exported like this; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The flags. Without a `name` or `model_type` the run says them, without `data` the run's own is read again."""

    run: Path
    format: str
    name: str | None
    model_type: str | None
    data: str | None
    out: Path
    allow_incomplete: bool
    overwrite: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> ExportOptions:
        """From the parser's flags."""
        values = {**vars(args), "out": args.out or args.run / args.format}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A finished run with its texts. `judged` is in the order of the data, `failed` are the rows without a verdict."""

    summary: Summary
    judged: Judged
    failed: list[Row]

    @property
    def rows(self) -> list[Row]:
        """The rows with a verdict."""
        return [row for _, row in self.judged]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (cannot be written), 2 (usage, a run that cannot be exported) or 130."""
    options = ExportOptions.of(_export_parser().parse_args(argv))
    try:
        sys.stdout.write(export(options))
    except (ExportError, RunFolderError, DataError) as error:
        return fail(error, USAGE)
    except OSError as error:
        return fail(error, FAILED)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    return OK


def export(options: ExportOptions) -> str:
    """Write both files; returns what was written and what is not in it, in lines of text.

    Raises ExportError, RunFolderError, DataError and OSError. Until everything has been checked nothing is written.
    """
    board = LEADERBOARDS[options.format]
    run = read_run(options, board)
    identity = Identity(
        _name(options.name or run.summary.judge.model or ""),
        options.model_type or model_type_of(run.rows),
        ", ".join(run.summary.judge.templates) or None,
    )
    paths = [options.out / folder / f"{identity.model}.json" for folder in (SCORES_FOLDER, RESULTS_FOLDER)]
    _refuse_to_overwrite(paths, options)
    accuracies = board.accuracies(run.rows, run.summary.ties)
    columns = board.columns(run.judged, run.summary.ties)
    for path, text in zip(paths, (scores_text(identity, columns), results_text(identity, accuracies)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return "".join(f"{line}\n" for line in _said(options, board, run, accuracies, paths))


def read_run(options: ExportOptions, board: Leaderboard) -> JudgedRun:
    """The run in the folder, with the texts that were judged. Raises ExportError, RunFolderError and DataError."""
    summary = read_summary(options.run)
    if summary.benchmark != board.benchmark:
        raise ExportError(
            f"{options.run} is a run of {summary.benchmark}; {options.format} takes runs of {board.benchmark}"
        )
    if summary.config.get("mode") == "pairwise" and not board.compares:
        raise ExportError(
            f"{options.format} wants one score for each answer, and {options.run} judged answers two by two: "
            "run it with --mode pointwise and another --out"
        )
    rows = {row.id: row for row in read_items(options.run)}
    samples = _judged_samples(options, summary)
    missing = [sample.id for sample in samples if sample.id not in rows]
    if missing:
        raise RunFolderError(
            f"{options.run} has no row for {len(missing)} of {len(samples)} samples (the first: {missing[0]}): "
            "repeat the run's command to finish it"
        )
    run = _with_texts(summary, samples, rows)
    _check_rows(options, board, run)
    return run


def _with_texts(summary: Summary, samples: Sequence[Sample], rows: Mapping[str, Row]) -> JudgedRun:
    both = [(sample, rows[sample.id]) for sample in samples]
    judged = [(sample, row) for sample, row in both if row.error is None]
    return JudgedRun(summary, judged, [row for _, row in both if row.error is not None])


def _judged_samples(options: ExportOptions, summary: Summary) -> list[Sample]:
    """The run's samples, from --data or from where the run had them, selected as the run did."""
    config: Mapping[str, Any] = summary.config
    source = options.data or config.get("data")
    if source is None:
        raise ExportError(f"{options.run} does not say which data it judged: give --data")
    chosen = DataOptions(str(source), config.get("subsets"), config.get("limit"), config.get("seed", 0))
    try:
        samples = chosen.samples(BENCHMARKS[summary.benchmark])
    except DataError as error:
        hint = "" if options.data else " (the run's own --data; if it has moved, give --data)"
        raise DataError(f"{error}{hint}") from error
    if digest(samples) != config.get("data_digest"):
        raise ExportError(
            f"{source} is not what {options.run} judged (data_digest differs): give the file or data set of the run "
            "as --data; its --subsets, --limit and --seed are known"
        )
    return samples


def _check_rows(options: ExportOptions, board: Leaderboard, run: JudgedRun) -> None:
    foreign = [row for row in (*run.rows, *run.failed) if not board.has(row)]
    if foreign:
        raise ExportError(
            f"{len(foreign)} samples do not belong to {options.format}, the first is {foreign[0].id} of subset "
            f"{foreign[0].subset}: only runs on its own data can be exported"
        )
    if run.failed and not options.allow_incomplete:
        raise ExportError(
            f"{_failures(run)} could not be judged, and {options.format} knows no such thing. Repeat the run's command "
            "to ask again for what may pass; texts that are too long need --truncation response_middle and another "
            "--out. Or leave them out with --allow-incomplete"
        )
    if not run.judged:
        raise ExportError(f"nothing was judged in {options.run}")


def _failures(run: JudgedRun) -> str:
    codes = Counter(row.error.code for row in run.failed if row.error is not None)
    listed = ", ".join(f"{code}: {count}" for code, count in sorted(codes.items()))
    return f"{len(run.failed)} of {len(run.failed) + len(run.judged)} samples ({listed})"


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"the leaderboard's names have the form ORG/NAME, which {name!r} has not: give --name ORG/NAME"
        )
    return name


def _refuse_to_overwrite(paths: Sequence[Path], options: ExportOptions) -> None:
    there = [str(path) for path in paths if path.exists()]
    if there and not options.overwrite:
        raise ExportError(f"{' and '.join(there)} exist already: give --overwrite, another --out or another --name")


def _said(
    options: ExportOptions, board: Leaderboard, run: JudgedRun, accuracies: Mapping[str, float], paths: Sequence[Path]
) -> list[str]:
    lines = [f"{options.format}: {len(run.judged)} samples, {len(accuracies)} of {len(board.subsets)} subsets"]
    if run.failed:
        lines.append(f"incomplete: {_failures(run)} could not be judged and are left out of every number")
    if (limit := run.summary.config.get("limit")) is not None:
        lines.append(f"part of the benchmark: the run was limited to {limit} samples")
    if missing := sorted(board.subsets - accuracies.keys()):
        lines.append(f"no score for {', '.join(missing)}: the leaderboard's own numbers need every subset")
    return [*lines, *(f"written: {path}" for path in paths)]


def _export_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client.benchmarks.export",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a finished run as RewardBench's own scripts write their results:\n"
        f"  {RESULTS_FOLDER}/ORG/NAME.json         the accuracy of each subset\n"
        f"  {SCORES_FOLDER}/ORG/NAME.json  every text and score",
        epilog="A tie counts as the run's --ties says: nothing, as for RewardBench's classifiers, or half, as for its "
        "generative\njudges. RewardBench 2 has a rule of its own.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--format",
        required=True,
        choices=LEADERBOARDS,
        help="rewardbench for a run of `rewardbench`; rewardbench-2 for one of `pairs` on allenai/reward-bench-2",
    )
    parser.add_argument(
        "--name", metavar="ORG/NAME", help="the judge's name there (default: the model's, if it is such a name)"
    )
    parser.add_argument(
        "--model-type", help='its kind there (default: "Generative", or "Seq. Classifier" for a reward model)'
    )
    parser.add_argument(
        "--data",
        metavar="FILE|hub",
        help="the data that the run judged, for the texts (default: where the run had them)",
    )
    parser.add_argument("--out", type=Path, help="folder for both files (default: RUN/FORMAT)")
    parser.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="leave out samples that could not be judged, instead of refusing",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist already")
    return parser


if __name__ == "__main__":
    program.finish(main)
