"""From options to a running vLLM: environment, arguments, and what to say when a start fails.

Not imported by the HTTP side. Written against vLLM 0.32; constraints/vllm.txt pins the versions that go with it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from client.runtime.extras import install_command
from service.engine.contract import Executor, Task, short_digest

# KV cache on a CPU. By default vLLM takes nearly all of the machine's memory there.
_CPU_CACHE_GIB: Final = "4"
# The values that vLLM accepts as `max_lora_rank`.
_LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Arguments that --vllm-args may not set, with the flag to use instead; None if this engine relies on our value.
_RESERVED: Final = {
    "convert": "--judge",
    "data_parallel_size": "--data-parallel-size",
    "dtype": "--dtype",
    "enable_lora": "--lora",
    "enable_prefix_caching": None,
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "logprobs_mode": None,
    "max_lora_rank": "--lora",
    "max_loras": "--lora",
    "max_model_len": "--max-tokens",
    "model": "--model",
    "quantization": "--quantization",
    "runner": "--judge",
    "skip_tokenizer_init": None,
    "tensor_parallel_size": "--tensor-parallel-size",
    "tokenizer": "--model",
}


class VllmStartError(RuntimeError):
    """vLLM cannot run this model here. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter for the model: its name, and the folder that PEFT saved it to."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How to run the model. `max_tokens`: the longest item. `extra`: further arguments for vLLM's engine."""

    task: Task
    max_tokens: int
    dtype: str = "auto"
    threads: int | None = None
    batch_tokens: int | None = None
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    quantization: str | None = None
    gpu_memory_utilization: float | None = None
    deterministic: bool = False
    lora: Lora | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def prepare_environment(options: VllmOptions) -> None:
    """Set the environment variables that vLLM reads while it is imported. Variables already set are kept.

    Raises VllmStartError if vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise VllmStartError(f"vLLM is not installed: {install_command('service,vllm')}, with -c constraints/vllm.txt")
    variables = {
        # No telemetry.
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # This process has threads, and a fork would copy only one of them.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if options.gpu_memory_utilization is None and "kv_cache_memory_bytes" not in options.extra:
        variables["VLLM_CPU_KVCACHE_SPACE"] = _CPU_CACHE_GIB
    if options.tensor_parallel_size * options.data_parallel_size == 1:
        # By default vLLM reserves a core for its scheduler, which is idle while the model computes.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, _cores(options.threads)))
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def engine_arguments(folder: Path, options: VllmOptions) -> dict[str, Any]:
    """The arguments for vLLM's engine. Raises VllmStartError if `extra` has one that is not the user's to set."""
    for name in options.extra:
        if name in _RESERVED:
            instead = _RESERVED[name]
            advice = f"use {instead}" if instead else "the judge relies on its value"
            raise VllmStartError(f"--vllm-args may not hold {name}: {advice}")
    pooling = options.task == "classify"
    arguments: dict[str, Any] = {
        "model": str(folder),
        "runner": "pooling" if pooling else "generate",
        # One more for the label, which vLLM counts as a generated token.
        "max_model_len": options.max_tokens + (0 if pooling else 1),
        "dtype": options.dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "tensor_parallel_size": options.tensor_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "quantization": options.quantization,
        # bf16 logits would come in steps of 0.06, which is more than many margins.
        "hf_overrides": {"head_dtype": "float32"},
        # On a signal to the process group, running requests have this many seconds to finish.
        "shutdown_timeout": 30,
    }
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    if options.lora is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(options.lora)}
    overrides = {**arguments["hf_overrides"], **options.extra.get("hf_overrides", {})}
    return {**arguments, **options.extra, "hf_overrides": overrides}


def make_config(folder: Path, options: VllmOptions) -> Any:
    """vLLM's configuration. Raises VllmStartError if vLLM, or the judge, cannot use this model with these options."""
    arguments = engine_arguments(folder, options)
    try:
        if options.deterministic:
            _turn_on_batch_invariance()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
    except ImportError as exc:
        raise VllmStartError(
            f"vLLM is installed but cannot be imported ({exc}): install the versions in constraints/vllm.txt; with "
            "the CPU build of torch, uninstall torchvision, torchaudio and torchcodec"
        ) from exc
    if current_platform.is_unspecified():
        raise VllmStartError(
            "vLLM finds no GPU here (in a container: is one reserved, and does the host have NVIDIA's container "
            "toolkit?); without one, --engine torch runs the model on the CPU"
        )
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    except TypeError as exc:
        if "unexpected keyword argument" not in str(exc):
            raise
        raise VllmStartError(f"--vllm-args: this version of vLLM has no such argument: {exc}") from exc
    except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as exc:
        raise VllmStartError(f"vLLM cannot run the model in {folder} as asked: {_first_lines(exc)}") from exc
    _check_architecture(config.model_config, options.task)
    return config


def _turn_on_batch_invariance() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        raise VllmStartError("--deterministic needs a GPU: vLLM has batch-invariant kernels for GPUs only")
    # Must be set before the kernels' modules are imported, since they read it then.
    os.environ["VLLM_BATCH_INVARIANT"] = "1"


def start_llm(config: Any) -> Any:
    """The running AsyncLLM with its model loaded. Call it on the event loop that will use it. Raises VllmStartError."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.LLM_CLASS, disable_log_stats=True)
    except Exception as exc:
        raise VllmStartError(
            f"vLLM did not start ({_first_lines(exc)}); its own messages above name the cause. If it is memory: "
            "lower --max-tokens, set --gpu-memory-utilization (on a CPU VLLM_CPU_KVCACHE_SPACE, in GiB), spread the "
            "model with --tensor-parallel-size, or use --quantization or a smaller model"
        ) from exc


def dtype_label(config: Any, options: VllmOptions) -> str:
    """The weights' number format, with every option added to it that changes scores: part of the cache key."""
    parts = [str(config.model_config.dtype).removeprefix("torch.")]
    if config.model_config.quantization:
        parts.append(str(config.model_config.quantization))
    if options.deterministic:
        parts.append("deterministic")
    if options.extra:
        parts.append(f"args-{sha256(json.dumps(dict(options.extra), sort_keys=True).encode()).hexdigest()[:8]}")
    return "+".join(parts)


def vllm_executor(config: Any, *, deterministic: bool) -> Executor:
    """vLLM's version, the hardware, and the tensor parallel size, over which each layer's sums are split.

    `stable` is None: it cannot be checked, because vLLM decides which items it batches together.
    """
    from vllm import __version__
    from vllm.platforms import current_platform

    parts = config.parallel_config.tensor_parallel_size
    rung = "vllm-deterministic" if deterministic else "vllm"
    return Executor(rung, short_digest(__version__, current_platform.get_device_name(), str(parts)), stable=None)


def _cores(count: int | None) -> Sequence[int]:
    if sys.platform != "linux":
        return range(count or os.cpu_count() or 1)
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[: count or len(allowed)]


def _rank(lora: Lora) -> int:
    try:
        rank = int(json.loads((lora.folder / "adapter_config.json").read_text("utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise VllmStartError(f"{lora.folder} is not a LoRA adapter saved by PEFT: {exc}") from exc
    fitting = [limit for limit in _LORA_RANKS if limit >= rank]
    if not fitting:
        raise VllmStartError(f"the adapter {lora.name} has rank {rank}; vLLM takes up to {_LORA_RANKS[-1]}")
    return fitting[0]


def _check_architecture(model: Any, task: Task) -> None:
    name = ", ".join(model.hf_config.architectures or [model.hf_config.model_type])
    classifies = "SequenceClassification" in name
    if task != "classify":
        if classifies:
            raise VllmStartError(f"{name} is not a causal language model; serve it with --judge reward-model")
        return
    if not classifies:
        raise VllmStartError(
            f"{name} is not a reward model: --judge reward-model needs a sequence classifier "
            "(…ForSequenceClassification) with one output; a causal language model judges with --judge yes-no"
        )
    if model.hf_config.num_labels != 1:
        raise VllmStartError(
            f"{name} has {model.hf_config.num_labels} outputs; --judge reward-model needs a model with one"
        )


def _first_lines(exc: BaseException) -> str:
    """The message's beginning: some of vLLM's go on for pages."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] or type(exc).__name__
