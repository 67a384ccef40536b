"""`python -m client.calibrate`: fit temperature and bias to a judge's log-odds, for the service's --calibration-file.

run folders or pairs ── evidence ──> labelled log-odds by template ── fitting ──> table, calibration file
                                     those of a panel's templates ─── weights ──> table, template file
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m client.calibrate", "benchmarks")

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Final

from client.benchmarks.questions import PANEL_SEPARATOR
from client.calibrate.evidence import Evidence, EvidenceError, from_judge, from_runs, read_pairs
from client.calibrate.fitting import LabelledSample, calibrate
from client.calibrate.panel_file import fit_weights, parse_name, print_panel
from client.calibration import Calibration, FittedOn, Quality, TemplateCalibration, save
from client.errors import JudgeError
from client.judge import AsyncJudge
from client.runtime.cli import CALL_TIMEOUT, add_judge_flags, fail, stderr_console, stdout_console
from client.runtime.files import write_whole
from client.runtime.parser import Parser
from client.runtime.program import FAILED, INTERRUPTED, OK, USAGE

if TYPE_CHECKING:
    from rich.console import Console

_COIN: Final = log(2)


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """The command line; exactly one of `run` and `data` is set."""

    run: list[Path] | None
    data: list[Path] | None
    judge_url: str
    api_key: str | None
    template: list[str] | None
    panel: str | None
    seed: int
    out: Path | None
    min_pairs: int

    @property
    def file(self) -> Path:
        """What to write."""
        return self.out or Path("calibration.json" if self.panel is None else "panel.toml")

    @property
    def asked(self) -> str | list[str] | None:
        """The template or templates to ask in place of the pairs' own."""
        names = [name for text in self.template or () for name in text.split(PANEL_SEPARATOR)]
        return names if len(names) > 1 else names[0] if names else None


@dataclass(frozen=True, slots=True)
class FittedTemplate:
    """One template's result. `problem` says why it has no calibration, or what speaks against the one it has."""

    template: str
    pairs: int
    calibration: TemplateCalibration | None = None
    problem: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 (no template could be fitted, no judge), 2 (usage, bad input) or 130."""
    try:
        return _calibrate(CalibrateOptions(**vars(_calibrate_parser().parse_args(argv))))
    except (JudgeError, OSError) as error:
        return fail(error, FAILED)
    except ValueError as error:
        return fail(error, USAGE)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", INTERRUPTED)


def _calibrate(options: CalibrateOptions) -> int:
    console = stdout_console()
    if options.min_pairs < 2:
        raise EvidenceError("--min-pairs must be 2 or more: one half is for the fit, the other to measure it")
    if not options.file.absolute().parent.is_dir():
        raise EvidenceError(f"--out {options.file}: there is no such folder")
    if options.run and options.template:
        raise EvidenceError("--template is for --data: a run was asked already")
    if options.panel is not None:
        parse_name(options.panel)
    evidence = from_runs(options.run) if options.run else _ask_judge(options)
    model, fingerprint = evidence.judge()
    if options.panel is not None:
        return _write_panel(console, evidence, options.panel, options)
    fitted = [_fit_template(name, samples, options) for name, samples in sorted(evidence.templates.items())]
    _print_table(console, fitted, evidence, f"{model} (fingerprint {fingerprint})")
    templates = {
        result.template: result.calibration.model_copy(update={"asked_with": evidence.asked_with.get(result.template)})
        for result in fitted
        if result.calibration
    }
    if not templates:
        return fail("no template could be calibrated: nothing was written", FAILED)
    left_out = dict(sorted(evidence.left_out.items()))
    fitted_on = FittedOn(sources=_sources(options), seed=options.seed, left_out=left_out)
    save(Calibration(model=model, fingerprint=fingerprint, templates=templates, fitted_on=fitted_on), options.file)
    console.print(f"written: {options.file}", markup=False, soft_wrap=True)
    return OK


def _write_panel(console: Console, evidence: Evidence, name: str, options: CalibrateOptions) -> int:
    model, fingerprint = evidence.judge()
    judge = f"{model} (fingerprint {fingerprint})"
    fitted = fit_weights(evidence, name, options.seed, options.min_pairs)
    print_panel(console, fitted, evidence, judge)
    write_whole(options.file, fitted.text(judge, _sources(options)))
    console.print(f"written: {options.file}", markup=False, soft_wrap=True)
    return OK


def _sources(options: CalibrateOptions) -> list[str]:
    return [str(path) for path in options.run or options.data or []]


def _ask_judge(options: CalibrateOptions) -> Evidence:
    from rich.progress import Progress

    pairs = read_pairs(options.data or [])

    async def ask() -> Evidence:
        with Progress(console=stderr_console(), transient=True) as bar:
            task = bar.add_task("judging", total=2 * len(pairs))
            async with AsyncJudge(options.judge_url, api_key=options.api_key, timeout=CALL_TIMEOUT) as judge:
                await judge.ready()
                return await from_judge(judge, pairs, lambda known: bar.update(task, completed=known), options.asked)

    return asyncio.run(ask())


def _fit_template(template: str, samples: Sequence[LabelledSample], options: CalibrateOptions) -> FittedTemplate:
    distinct = len({sample.id for sample in samples})
    if distinct < options.min_pairs:
        return FittedTemplate(template, distinct, problem=f"left out: fewer than {options.min_pairs} pairs")
    calibration = calibrate(samples, options.seed)
    if calibration is None:
        problem = "left out: no signal, chosen answers do not score higher"
        return FittedTemplate(template, len(samples), problem=problem)
    worse = calibration.after.nll > calibration.before.nll
    problem = "fits the held-out half worse than the raw score does" if worse else ""
    return FittedTemplate(template, len(samples), calibration, problem)


def _print_table(console: Console, fitted: Sequence[FittedTemplate], evidence: Evidence, judge: str) -> None:
    from rich.table import Table

    table = Table(
        title=f"calibration of {judge}",
        caption="before -> after, on the held-out half; T: temperature; of pairs: of which is better",
    )
    table.add_column("template", overflow="fold")
    for name in ("pairs", "T", "bias", "NLL", "ECE", "Brier", "T of pairs", "ECE of pairs"):
        table.add_column(name, justify="right")
    for result in fitted:
        if result.calibration:
            table.add_row(result.template, str(result.pairs), *_fit_cells(result.calibration))
    if table.row_count:
        console.print(table)
    notes = [f"{result.template} ({result.pairs} pairs): {result.problem}" for result in fitted if result.problem]
    notes += [f"samples left out, {reason}: {count}" for reason, count in sorted(evidence.left_out.items())]
    verdicts = [_verdict(result.template, result.calibration) for result in fitted if result.calibration]
    for note in [*notes, *verdicts]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _verdict(template: str, fit: TemplateCalibration) -> str:
    """What the held-out half says of a template's fit, in one sentence; always saying 50% costs ln 2."""
    before, after = fit.before.nll, fit.after.nll
    change = f"the negative log-likelihood of the held-out half goes from {before:.3f} to {after:.3f}"
    if after >= _COIN:
        return f"{template}: {change}, and always saying 50% has {_COIN:.3f}, so this judge tells nothing here."
    closer = "closer" if after < before else "no closer"
    return f"{template}: calibrated probabilities are {closer} to the truth than raw scores: {change}."


def _fit_cells(calibration: TemplateCalibration) -> list[str]:
    before, after = calibration.before, calibration.after
    changes = [f"{getattr(before, name):.3f} -> {getattr(after, name):.3f}" for name in Quality.model_fields]
    pair = calibration.pair
    of_pairs = (
        ["-", "-"] if pair is None else [f"{pair.temperature:.3g}", f"{pair.before.ece:.3f} -> {pair.after.ece:.3f}"]
    )
    return [f"{calibration.temperature:.3g}", f"{calibration.bias:+.3g}", *changes, *of_pairs]


def _calibrate_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m client.calibrate",
        description="Fit a temperature and a bias to a judge's log-odds for each template, so that the service can "
        "report the probability that a response is good: sigmoid(log_odds / temperature + bias); and a temperature for "
        "the probability that one response is better than another. Half of the pairs are for the fit, the other half "
        "measures it. Raw scores stay as they are. With --panel: fit the weights of "
        "several questions instead.",
        epilog="Then: python -m service --calibration-file calibration.json, or --template-file panel.toml",
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
    add_judge_flags(parser, "for --data: ")
    parser.add_argument(
        "--template",
        nargs="+",
        metavar="NAME",
        help="for --data: ask this template in place of the pairs' own, or several as a panel",
    )
    parser.add_argument(
        "--panel",
        metavar="NAME",
        help="fit a weight to each question of the panel that judged (of --template, or of the run), and write the "
        "panel under this name as a template file for the service; what it gains is measured on five held-out folds",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the division into halves or folds (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help="file to create or replace (default: calibration.json, with --panel panel.toml)",
    )
    parser.add_argument("--min-pairs", type=int, default=50, help="leave out templates with fewer pairs (default: 50)")
    return parser


if __name__ == "__main__":
    program.finish(main)
