"""`python -m client.calibrate`: fit temperature and bias to a judge's log-odds, for the service's --calibration-file.

run folders or pairs ── evidence ──> labelled log-odds by template ── fitting ──> table, file
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.calibrate", "benchmarks")

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from client.calibrate.evidence import Evidence, EvidenceError, from_judge, from_runs, read_pairs
from client.calibrate.fitting import Labelled, calibrate
from client.calibration import Calibration, FittedOn, Quality, TemplateCalibration, save
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.runtime.cli import CALL_TIMEOUT, fail, judge_address, stderr_console, stdout_console
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Fitted:
    """What came of one template: its calibration, or none; `problem` says why none, or what speaks against it."""

    template: str
    pairs: int
    calibration: TemplateCalibration | None = None
    problem: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (no template could be fitted, no judge), 2 (usage, bad input) or 130."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (JudgeError, OSError) as error:
        return fail(f"{error}", FAILED)
    except ValueError as error:
        return fail(f"{error}", USAGE)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", INTERRUPTED)


def _run(args: argparse.Namespace) -> int:
    console = stdout_console()
    if args.min_pairs < 2:
        raise EvidenceError("--min-pairs must be 2 or more: one half is for the fit, the other to measure it")
    if not args.out.absolute().parent.is_dir():
        raise EvidenceError(f"--out {args.out}: there is no such folder")
    evidence = from_runs(args.run) if args.run else _from_judge(args)
    model, fingerprint = evidence.judge()
    fitted = [_fit(name, found, args) for name, found in sorted(evidence.templates.items())]
    _report(console, fitted, evidence, f"{model} (fingerprint {fingerprint})")
    templates = {
        each.template: each.calibration.model_copy(update={"asked_with": evidence.asked_with.get(each.template)})
        for each in fitted
        if each.calibration
    }
    if not templates:
        return fail("no template could be calibrated: nothing was written", FAILED)
    sources = [str(path) for path in args.run or args.data]
    fitted_on = FittedOn(sources=sources, seed=args.seed, left_out=dict(sorted(evidence.left_out.items())))
    save(Calibration(model=model, fingerprint=fingerprint, templates=templates, fitted_on=fitted_on), args.out)
    console.print(f"written: {args.out}", markup=False, soft_wrap=True)
    return OK


def _from_judge(args: argparse.Namespace) -> Evidence:
    from rich.progress import Progress

    pairs = read_pairs(args.data)

    async def ask() -> Evidence:
        with Progress(console=stderr_console(), transient=True) as bar:
            task = bar.add_task("judging", total=2 * len(pairs))
            async with AsyncJudge(args.judge_url, api_key=args.api_key, timeout=CALL_TIMEOUT) as judge:
                await judge.ready()
                return await from_judge(judge, pairs, lambda known: bar.update(task, completed=known))

    return asyncio.run(ask())


def _fit(template: str, samples: Sequence[Labelled], args: argparse.Namespace) -> Fitted:
    distinct = len({sample.id for sample in samples})
    if distinct < args.min_pairs:
        return Fitted(template, distinct, problem=f"left out: fewer than {args.min_pairs} pairs")
    calibration = calibrate(samples, args.seed)
    if calibration is None:
        return Fitted(template, len(samples), problem="left out: no signal, chosen answers are not judged better")
    worse = calibration.after.nll > calibration.before.nll
    problem = "on the half that was not fitted to it is less likely than the raw score" if worse else ""
    return Fitted(template, len(samples), calibration, problem)


def _report(console: Console, fitted: Sequence[Fitted], evidence: Evidence, judge: str) -> None:
    from rich.table import Table

    table = Table(
        title=f"calibration of {judge}", caption="before -> after, on the half that was not fitted to; T: temperature"
    )
    table.add_column("template", overflow="fold")
    for name in ("pairs", "T", "bias", "NLL", "ECE", "Brier"):
        table.add_column(name, justify="right")
    for each in fitted:
        if each.calibration:
            table.add_row(each.template, str(each.pairs), *_numbers(each.calibration))
    if table.row_count:
        console.print(table)
    notes = [f"{each.template} ({each.pairs} pairs): {each.problem}" for each in fitted if each.problem]
    notes += [f"samples left out, {reason}: {count}" for reason, count in sorted(evidence.left_out.items())]
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _numbers(calibration: TemplateCalibration) -> list[str]:
    before, after = calibration.before, calibration.after
    changes = [f"{getattr(before, name):.3f} -> {getattr(after, name):.3f}" for name in Quality.model_fields]
    return [f"{calibration.temperature:.3g}", f"{calibration.bias:+.3g}", *changes]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client.calibrate",
        description="Fit a temperature and a bias to a judge's log-odds for each template, so that the service can say "
        "how probably a response is good: sigmoid(log_odds / temperature + bias). Half of the pairs are for the fit, "
        "the other half shows what it is worth. Raw scores stay as they are.",
        epilog="Then: python -m service --calibration-file calibration.json",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", type=Path, nargs="+", metavar="DIR", help="folders of pointwise benchmark runs, all by the same model"
    )
    source.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="files (JSONL, JSON, CSV, Parquet) of {prompt, chosen, rejected, category?, template?, id?} to be judged "
        "now by --judge-url",
    )
    judge_address(parser, "for --data: ")
    parser.add_argument("--seed", type=int, default=0, help="of the division into halves (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("calibration.json"),
        help="the file to write, replacing one that is there (default: calibration.json)",
    )
    parser.add_argument(
        "--min-pairs", type=int, default=50, help="templates with fewer pairs are left out (default: 50)"
    )
    return parser


if __name__ == "__main__":
    program.finish(main)
