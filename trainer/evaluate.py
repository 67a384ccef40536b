"""Is the new model better than the base? Both answer held-out instructions, and a judge compares the answers.

    held-out instructions ── base ──> base.jsonl ──┐
                          └─ new ───> new.jsonl ───┴── verdicts.py ──> pairwise/, pointwise/ ──> metrics.json

Both models are sampled alike: one response each, with the same settings, and with the same random numbers for the same
instruction, so that equal models give equal responses. The judge had better not be the one that labelled the training
data: a model that learnt to please one judge pleases that judge.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m trainer.evaluate", "trainer")

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from client.benchmarks.results.records import ITEMS_FILE, read_rows
from client.runtime.cli import judge_address
from client.schema import Truncation
from trainer.errors import InputError
from trainer.evaluation.harness import TASKS, HarnessOptions, require_harness, run_harness
from trainer.evaluation.verdicts import MODES, Metrics, VerdictOptions, describe_judge, judge_duels, make_duels, measure
from trainer.flags import add_flags, given
from trainer.labels.labelers import JudgeOptions
from trainer.policy.models import model_identity, quiet_libraries, resolve_model
from trainer.policy.samplers import SampleSettings
from trainer.policy.weights import same_weights
from trainer.programs import reading_input, run_program, stderr_console
from trainer.run.files import read_records, write_json, write_record
from trainer.run.progress import progress_bar
from trainer.run.rates import ProgressMeter, save_rate
from trainer.run.records import METRICS_FILE, Instruction
from trainer.run.stages import RunFolder, Stage, content_digest, open_run
from trainer.sample import Sampled, sample_responses

if TYPE_CHECKING:
    from rich.console import Console

HARNESS_FILE: Final = "lm_eval.json"


@dataclass(frozen=True, slots=True)
class OneResponse(SampleSettings):
    """How both models answer: once each."""

    samples: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """A folder or hub id, what tells it from others (JSON), and the name that metrics and reports call it by."""

    name: str
    identity: Any
    title: str


@dataclass(frozen=True, slots=True)
class Referee:
    """Who compares. `described` decides the verdicts; `serving` gives the judge's address when there is work for it."""

    described: Mapping[str, object]
    serving: Callable[[], AbstractContextManager[JudgeOptions]]
    truncation: Truncation = "error"
    max_failures: float = 0.02
    is_labeler: bool | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One comparison of two models, in stages; `base_folder` holds base.jsonl, `folder` all else."""

    run: RunFolder
    held_out: Path
    base: Model
    new: Model
    base_folder: Path
    folder: Path
    sampling: OneResponse
    referee: Referee
    harness: HarnessOptions | None = None

    @property
    def base_stage(self) -> Stage:
        """The base's responses."""
        return self._response_stage("base", self.base, self.base_folder)

    def perform(self) -> Metrics:
        """Do what is not done, and write metrics.json. Raises StageError, ModelError."""
        self._respond(self.base_stage, self.base)
        new = self._response_stage("new", self.new, self.folder)
        self._respond(new, self.new)
        base_file = self.base_folder / self.base_stage.outputs[0]
        responses = [read_records(path, Sampled) for path in (base_file, self.folder / new.outputs[0])]
        instructions = read_records(self.held_out, Instruction)
        duels = make_duels(instructions, *responses)
        inputs = {
            "held_out": self.held_out,
            "base": base_file,
            "new": self.folder / new.outputs[0],
            "judge": self.referee.described,
            "truncation": self.referee.truncation,
        }
        self.run.run_stage(Stage(self.folder, "verdicts", MODES, inputs), lambda: self._judge(duels))
        rows = {mode: read_rows(self.folder / mode / ITEMS_FILE) for mode in MODES}
        metrics = measure(duels, rows, (self.base.title, self.new.title), self.referee.described).model_copy(
            update={
                "instructions": len(instructions),
                "missing": len(instructions) - len(duels),
                "judge_is_labeler": self.referee.is_labeler,
                "lm_eval": self._by_harness(),
            }
        )
        if same_weights(resolve_model(self.base.name), resolve_model(self.new.name)):
            metrics = metrics.without_rates()
        write_record(self.folder / METRICS_FILE, metrics)
        return metrics

    def _response_stage(self, side: str, model: Model, folder: Path) -> Stage:
        inputs = {"model": model.identity, "instructions": self.held_out, **self.sampling.described()}
        return Stage(folder, f"{side}_responses", (f"{side}.jsonl",), inputs)

    def _respond(self, stage: Stage, model: Model) -> None:
        def work() -> None:
            instructions = read_records(self.held_out, Instruction)
            with progress_bar(stderr_console(), f"answers of {model.title}") as tell:
                stats = sample_responses(model.name, instructions, stage.folder / stage.outputs[0], self.sampling, tell)
            save_rate(stage.folder, "answering", stats.tokens, stats.seconds)

        self.run.run_stage(stage, work)

    def _judge(self, duels: Sequence[Any]) -> None:
        from client.benchmarks.progress import shown

        with self.referee.serving() as judge, shown(stderr_console(), "comparing") as tell:
            started, meter = time.monotonic(), ProgressMeter(tell)
            options = VerdictOptions(judge, self.referee.truncation, self.referee.max_failures)
            judge_duels(duels, self.folder, options, meter)
        # Two for a pair, in either mode: both orders, or both responses.
        save_rate(self.folder, "comparing", 2 * meter.new_items, time.monotonic() - started)

    def _by_harness(self) -> dict[str, Any] | None:
        if self.harness is None:
            return None
        harness, file = self.harness, self.folder / HARNESS_FILE
        inputs = {"base": self.base.identity, "new": self.new.identity, **asdict(harness)}

        def work() -> None:
            # By their titles: a base may be compared with itself.
            found = {side: run_harness(model.name, harness) for side, model in (("base", self.base), ("new", self.new))}
            write_json(file, found)

        self.run.run_stage(Stage(self.folder, "lm_eval", (HARNESS_FILE,), inputs), work)
        known: dict[str, Any] = json.loads(file.read_bytes())
        return known


def model_of(name: str, title: str | None = None) -> Model:
    """A model as the user names it. Raises ModelError."""
    folder = Path(name).expanduser()
    return Model(name, model_identity(name), title or (folder.resolve().name if folder.is_dir() else name))


def add_harness_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `harness_options`."""
    group = parser.add_argument_group(
        "lm-eval", "Public benchmarks, by the LM Evaluation Harness where it is installed."
    )
    told = f"tasks, separated by commas, or `all`: {', '.join(TASKS)} (default: none)"
    group.add_argument("--lm-eval", metavar="TASKS", help=told)
    group.add_argument("--lm-eval-items", type=int, default=500, help="seeded items of each task (default: 500)")


def harness_options(args: argparse.Namespace) -> HarnessOptions | None:
    """What --lm-eval asks for. Raises ModelError where the harness is not installed."""
    if not args.lm_eval:
        return None
    require_harness()
    names = TASKS if args.lm_eval == "all" else tuple(name.strip() for name in args.lm_eval.split(",") if name.strip())
    return HarnessOptions(names, args.lm_eval_items)


def summary_of(metrics: Metrics) -> str:
    """The main number in a sentence."""
    rate, controlled = metrics.pairwise, metrics.length_controlled
    if metrics.same_weights:
        return f"{metrics.new} has the weights of {metrics.base}: training changed nothing, and there is no win rate"
    if rate is None and metrics.compared:
        return (
            f"no win rate: in none of {metrics.compared} comparisons was {metrics.new} better or worse than "
            f"{metrics.base} ({metrics.identical} pairs of equal answers)"
        )
    if rate is None or rate.low is None or rate.high is None:
        return f"nothing could be compared: {metrics.empty} empty, {metrics.missing} missing, {metrics.failed} failed"
    error = "" if rate.standard_error is None else f" ± {100 * rate.standard_error:.1f} (standard error)"
    text = (
        f"{metrics.new} against {metrics.base}: win rate {100 * rate.value:.1f}%{error} on {rate.count} instructions, "
        f"95% interval {100 * rate.low:.1f} to {100 * rate.high:.1f}"
    )
    return text + (f"; length-controlled {100 * controlled.value:.1f}%" if controlled is not None else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; see trainer.programs.run_program for the exit codes."""
    args = _parser().parse_args(argv)
    return run_program(lambda: _run(args, stderr_console()))


def _run(args: argparse.Namespace, console: Console) -> None:
    harness = harness_options(args)
    sampling = OneResponse(**given(args, OneResponse))
    with reading_input():
        instructions = read_records(args.instructions, Instruction)
    if not instructions:
        raise InputError(f"{args.instructions}: holds no instructions")
    for name in (args.base, args.new):
        resolve_model(name)
    url = args.eval_judge_url or args.judge_url
    judge = JudgeOptions(url, args.api_key)
    described = describe_judge(judge)
    base, new = model_of(args.base), model_of(args.new)
    config = {
        "stage": "evaluate",
        "base": base.identity,
        "new": new.identity,
        "instructions": content_digest(args.instructions),
        "judge": described,
        "truncation": args.truncation,
        **sampling.described(),
    }
    referee = Referee(described, lambda: nullcontext(judge), args.truncation, args.max_failures)
    with open_run(args.out, config, overwrite=args.overwrite) as run, quiet_libraries():
        evaluation = Evaluation(
            run, args.instructions, base, new, args.out, args.out, sampling, referee, harness=harness
        )
        metrics = evaluation.perform()
    console.print(summary_of(metrics), soft_wrap=True, highlight=False)
    sys.stdout.write(metrics.model_dump_json(indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description="Compare two models on held-out instructions through the judge: win rate, plain and "
        "length-controlled, in both orders and pointwise; refusals, lengths; OUT/metrics.json.",
        epilog="Written as it comes; after an interruption the same command goes on where it stopped.",
    )
    judge_address(parser)
    parser.add_argument(
        "--eval-judge-url", default=os.environ.get("EVAL_JUDGE_URL"), help="the judge to ask, if not --judge-url's"
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="a folder, or a hub id: what is to be beaten")
    parser.add_argument("--new", required=True, metavar="MODEL", help="a folder, or a hub id")
    parser.add_argument(
        "--instructions", type=Path, required=True, metavar="FILE", help="JSON lines with id, prompt, category"
    )
    parser.add_argument("--out", "--output", type=Path, required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--truncation", choices=get_args(Truncation), default="error", help="of texts over the judge's length"
    )
    parser.add_argument(
        "--max-failures", type=float, default=0.02, help="share of comparisons that may fail (default: 0.02)"
    )
    parser.add_argument("--overwrite", action="store_true", help="make anew what another configuration left there")
    add_flags(parser.add_argument_group("sampling"), OneResponse)
    add_harness_flags(parser)
    return parser


if __name__ == "__main__":
    program.finish(main)
