"""A program that runs the loop again and again in one folder, killing each run at another point.

    python -m tests.killed_loop FOLDER FLAGS…

Each of POINTS gets a child, forked after the slow imports; the last one runs to the end. Prints a JSON object: how each
child ended, and which files of finished stages were ever written a second time.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (imported before the forks)
import trl.trainer.dpo_trainer  # noqa: F401

import client.runs.resumable
import trainer.policy.sampling
import trainer.tuning.callbacks
from client.benchmarks.rows import Row
from client.runs.resumable import ResumableRun
from tests.support.killing import Install, before_the_marker, while_writing
from trainer.self_improve import main

LINES_BEFORE = 5


def _at_the_end_of(stage: str) -> Install:
    return before_the_marker(lambda name: name == stage)


def _in_training() -> None:
    """Kill after two steps, when there is a checkpoint."""
    step_end = trainer.tuning.callbacks.LogCallback.on_step_end

    def dying(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        step_end(self, args, state, control, **more)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.tuning.callbacks.LogCallback.on_step_end = dying  # type: ignore[method-assign]


def _while_comparing() -> None:
    """Kill after a comparison is written."""
    record = ResumableRun.record

    def dying(self: Any, append: Any, *lines: Any) -> None:
        record(self, append, *lines)
        if isinstance(lines[0], Row):
            os.kill(os.getpid(), signal.SIGKILL)

    ResumableRun.record = dying  # type: ignore[method-assign]


POINTS: dict[str, Install] = {
    "at the end of instructions": _at_the_end_of("instructions"),
    "Ctrl-C while sampling": while_writing(trainer.policy.sampling, LINES_BEFORE, signal.SIGINT),
    "while sampling": while_writing(trainer.policy.sampling, LINES_BEFORE),
    "at the end of samples": _at_the_end_of("samples"),
    "while labelling": while_writing(client.runs.resumable, LINES_BEFORE),
    "at the end of scores": _at_the_end_of("scores"),
    "at the end of reliability": _at_the_end_of("reliability"),
    "at the end of pairs": _at_the_end_of("pairs"),
    "in training": _in_training,
    "at the end of dpo": _at_the_end_of("dpo"),
    "at the end of merge": _at_the_end_of("merge"),
    "at the end of answers": _at_the_end_of("new_responses"),
    "while comparing": _while_comparing,
    "at the end of verdicts": _at_the_end_of("verdicts"),
    "never": lambda: None,
}


def run() -> dict[str, Any]:
    """Run the loop once for each of POINTS."""
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    ends, rewritten, finished = {}, [], dict[str, int]()
    for name, install in POINTS.items():
        child = os.fork()
        if child == 0:
            install()
            os._exit(main(["--output", str(folder), *flags]))
        ends[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = _finished(folder)
        rewritten += [file for file, written in finished.items() if now.get(file) != written]
        finished = now
    return {"ends": ends, "rewritten": rewritten}


def _finished(folder: Path) -> dict[str, int]:
    """The modification times of the markers and files of finished stages, in nanoseconds."""
    files = {
        "instructions": ["instructions.jsonl"],
        "base_responses": ["base.jsonl"],
        "samples": ["samples.jsonl"],
        "reliability": ["reliability.json", "reworded.jsonl"],
        "scores": ["scores.jsonl"],
        "pairs": ["pairs.jsonl"],
        "dpo": ["adapter/adapter_model.safetensors", "dpo_log.jsonl"],
        "merge": ["merged/model.safetensors"],
        "new_responses": ["new.jsonl"],
        "verdicts": ["pairwise/items.jsonl", "pointwise/items.jsonl"],
    }
    markers = [marker for marker in folder.rglob("*.done") if marker.stem in files]
    written = [*markers, *(marker.parent / name for marker in markers for name in files[marker.stem])]
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in written}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run()) + "\n")
