"""The text of `python -m service.models check`: how each rung of the ladder does with a model on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import torch

from service.engine.contract import Task
from service.engine.torch.engine import check_all
from service.engine.torch.ladder import Verdict
from service.engine.torch.loading import LoadOptions, choose_device, choose_dtype, dtype_name, instruction_sets
from service.models.resolve import ModelFiles


def of(model: ModelFiles, task: Task, **options: Unpack[LoadOptions]) -> tuple[list[str], bool]:
    """The report's lines, and whether a rung with stable bits holds. Raises EngineLoadError."""
    started = time.monotonic()
    verdicts = check_all(model.path, task, **options)
    seconds = time.monotonic() - started
    holding = [verdict for verdict in verdicts if verdict.executor is not None]
    stable = [verdict for verdict in holding if verdict.executor and verdict.executor.stable]
    taken = stable[0].rung if stable else holding[-1].rung if holding else "none: it cannot run this model"
    return [
        *_machine(model, task, options),
        *map(_line, verdicts),
        f"the service takes {taken}; everything took {seconds:.1f} s",
    ], bool(stable)


def _machine(model: ModelFiles, task: Task, options: LoadOptions) -> Sequence[str]:
    device = choose_device(options.get("device", "auto"))
    dtype = dtype_name(choose_dtype(options.get("dtype", "auto"), device))
    return (
        f"{model.id} ({model.fingerprint}), {task}, {dtype}, {device}, {torch.get_num_threads()} threads",
        f"judge-as-api {version('judge-as-api')}, torch {torch.__version__}, transformers {version('transformers')}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}: "
        f"{', '.join(instruction_sets())}",
    )


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _line(verdict: Verdict) -> str:
    run = verdict.executor
    if run is None:
        return f"  {verdict.rung:16}no: it {verdict.problem} ({verdict.seconds:.1f} s)"
    bits = "the same bits in any batch" if run.stable else "bits that depend on the batch"
    return f"  {verdict.rung:16}holds, {bits}, digest {run.digest} ({verdict.seconds:.1f} s)"
