"""What vLLM is started with, adapters, and a lost engine; vLLM itself is not needed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from service.engine.contract import AnyItem, ScoreItem
from service.engine.fake import FakeEngine
from service.engine.remote_core import EngineLostError, RemoteCore
from service.engine.vllm.config import Lora, VllmOptions, VllmStartError, engine_arguments
from service.loading.engines import find_model
from service.models.manifest import ModelError
from service.queue.contract import Job
from service.queue.memory import MemoryQueue
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler


def options(**more: Any) -> VllmOptions:
    """Options for labels, with these changes."""
    return VllmOptions(**{"task": "labels", "max_tokens": 100, **more})


def adapter(folder: Path, rank: int = 12) -> Path:
    """An adapter's folder with what is checked before vLLM reads it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    (folder / "adapter_model.bin").write_bytes(bytes(10))
    return folder


def test_prompts_leave_room_for_the_label() -> None:
    """The label counts as a generated token; a classification head generates none."""
    lengths = [engine_arguments(Path("m"), options(task=task))["max_model_len"] for task in ("labels", "classify")]

    assert lengths == [101, 100]


def test_the_output_layer_is_in_fp32_unless_told_otherwise() -> None:
    """bf16 logits are too coarse. Other overrides of the model's configuration do not change that."""
    more = engine_arguments(Path("m"), options(extra={"hf_overrides": {"rope_theta": 1.0}}))
    other = engine_arguments(Path("m"), options(extra={"hf_overrides": {"head_dtype": "model"}}))

    assert more["hf_overrides"] == {"head_dtype": "float32", "rope_theta": 1.0}
    assert other["hf_overrides"] == {"head_dtype": "model"}


@pytest.mark.parametrize(
    ("name", "advice"), [("max_model_len", "use --max-tokens"), ("enable_prefix_caching", "relies on")]
)
def test_arguments_that_have_a_flag_are_refused(name: str, advice: str) -> None:
    """One value must not have two sources."""
    with pytest.raises(VllmStartError, match=f"--vllm-args may not hold {name}: .*{advice}"):
        engine_arguments(Path("m"), options(extra={name: 1}))


def test_an_adapters_rank_is_rounded_up(tmp_path: Path) -> None:
    """vLLM accepts only certain numbers as the largest rank."""
    lora = Lora("mine", adapter(tmp_path / "a", rank=12))

    assert engine_arguments(Path("m"), options(lora=lora))["max_lora_rank"] == 16


def test_an_adapter_is_another_judge(tiny_model: Path, tmp_path: Path) -> None:
    """With its own name and fingerprint, so that it shares no queue or cache with the base model."""
    bare = find_model(Settings(engine="vllm", model=str(tiny_model)))
    changed = find_model(
        Settings(engine="vllm", model=str(tiny_model), lora=f"mine={adapter(tmp_path / 'a')}"),
    )

    assert (changed.id, changed.max_tokens) == ("mine", bare.max_tokens)
    assert changed.fingerprint != bare.fingerprint


def test_a_folder_without_an_adapter_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """Before vLLM is started. So is an engine that does not support adapters."""
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        find_model(Settings(engine="vllm", model=str(tiny_model), lora=f"mine={tmp_path}"))
    with pytest.raises(ValueError, match="--lora needs --engine vllm"):
        find_model(Settings(engine="torch", model=str(tiny_model), lora=f"mine={tmp_path}"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"use_dora": True, "bias": "all"}, "use_dora, bias"),
        ({"alpha_pattern": {"q_proj": 64}}, "alpha_pattern"),
    ],
)
def test_an_adapter_that_vllm_would_serve_in_part_is_refused(
    more: dict[str, Any], told: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Before vLLM is started; the message says how to serve it anyway."""
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, **more}))

    with pytest.raises(ModelError, match=rf"an adapter with {told} beside its base: .*trainer\.merge"):
        find_model(Settings(engine="vllm", model=str(tiny_model), lora=f"mine={folder}"))


def test_the_longest_prompt_is_one_token_shorter(tiny_model: Path) -> None:
    """With vLLM, which counts the label."""
    longest = [find_model(Settings(engine=engine, model=str(tiny_model))).max_tokens for engine in ("torch", "vllm")]

    assert longest == [2048, 2047]


def test_arguments_come_as_json() -> None:
    """From a flag or from the environment."""
    assert Settings(vllm_args='{"enforce_eager": true}').vllm_args == {"enforce_eager": True}


@dataclass(frozen=True, kw_only=True)
class LostEngine(FakeEngine):
    """An engine whose processes die during its first batch. It records the deadlines that it is given."""

    deadlines: list[list[float]] = field(default_factory=list)

    def check(self) -> None:
        """They live until then."""

    def set_deadlines(self, deadlines: Sequence[float]) -> None:
        """Recorded."""
        self.deadlines.append(list(deadlines))

    def run(self, items: Sequence[AnyItem]) -> NoReturn:  # noqa: ARG002 the contract's signature
        """The processes die."""
        raise EngineLostError("gone")


async def test_a_lost_engine_ends_the_worker_and_answers_nothing() -> None:
    """Its jobs are for another worker: no failure is sent, and items are not retried one by one."""
    queue = MemoryQueue(10, 10_000)
    await queue.open()
    jobs = [Job(name, ScoreItem([1, 2], (3,)), deadline=1e12, submitted=0.0) for name in "ab"]
    futures = await queue.submit(jobs)
    engine = LostEngine()
    worker = Worker(engine, queue, Scheduler(1000, 10, 0.0), Metrics())

    with pytest.raises(EngineLostError):
        worker.run(threading.Event())

    assert isinstance(engine, RemoteCore)
    assert engine.deadlines == [[1e12, 1e12]]
    assert not any(future.done() and future.result().outcome for future in futures)
    queue.cancel([job.id for job in jobs])


def test_a_machine_without_a_gpu_is_named(tmp_path: Path) -> None:
    """With what is missing and what to use instead, unlike vLLM's own message about an empty string."""
    modules = {
        "engine/arg_utils": "AsyncEngineArgs = None",
        "platforms/__init__": "class current_platform:\n    is_unspecified = staticmethod(lambda: True)",
        "usage/usage_lib": "UsageContext = None",
    }
    for name, text in {"__init__": "", **modules}.items():
        file = tmp_path / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    asked = (
        "from pathlib import Path; from service.engine.vllm.config import *; "
        "make_config(Path('m'), VllmOptions(task='labels', max_tokens=9))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])

    said = subprocess.run(
        [sys.executable, "-c", asked],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    ).stderr

    assert "VllmStartError: vLLM finds no GPU here" in said
    assert "--engine torch" in said


def test_no_part_of_vllm_is_imported_for_its_arguments() -> None:
    """The HTTP side reads these settings too."""
    assert "vllm" not in sys.modules
    assert "VLLM_BATCH_INVARIANT" not in os.environ
