"""From options to a running vLLM: its environment, its arguments, and what a failed start says.

Nothing here is imported by the HTTP side. Written against vLLM 0.32; constraints/vllm.txt has all that goes with it.
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

from service.engine.contract import Executor, Task, digest_of

# Of the KV cache on a CPU, where vLLM would otherwise take nearly all of the machine's memory.
_CPU_CACHE_GIB: Final = "4"
_LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# What other flags are there for, and what this engine relies on.
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
    """vLLM cannot run this model here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter by which the model's weights are changed: its name, and the folder that PEFT saved it to."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How the model is run. `max_tokens` is the longest prompt; `extra` are further arguments of vLLM's engine."""

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
    """Set what vLLM reads from the environment, before it is imported; what is set already stays.

    Raises VllmStartError where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise VllmStartError("vLLM is not installed: pip install -c constraints/vllm.txt 'judge-as-api[service,vllm]'")
    wanted = {
        # A start says nothing to anybody but this machine.
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # This process has threads, which a fork would not take along.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if options.gpu_memory_utilization is None and "kv_cache_memory_bytes" not in options.extra:
        wanted["VLLM_CPU_KVCACHE_SPACE"] = _CPU_CACHE_GIB
    if options.tensor_parallel_size * options.data_parallel_size == 1:
        # Left alone it keeps a core free for its scheduler, which is idle while the model computes.
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, _cores(options.threads)))
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def engine_arguments(folder: Path, options: VllmOptions) -> dict[str, Any]:
    """The arguments of vLLM's engine. Raises VllmStartError for those in `extra` that another flag is there for."""
    for name in options.extra:
        if name in _RESERVED:
            instead = _RESERVED[name]
            advice = f"use {instead}" if instead else "the judge relies on its value"
            raise VllmStartError(f"--vllm-args may not hold {name}: {advice}")
    read_only = options.task == "classify"
    arguments: dict[str, Any] = {
        "model": str(folder),
        "runner": "pooling" if read_only else "generate",
        # A label, too, is a token that vLLM wants room for.
        "max_model_len": options.max_tokens + (0 if read_only else 1),
        "dtype": options.dtype,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "tensor_parallel_size": options.tensor_parallel_size,
        "data_parallel_size": options.data_parallel_size,
        "quantization": options.quantization,
        # bf16 logits have steps of 0.06, more than many margins.
        "hf_overrides": {"head_dtype": "float32"},
        # What is under way when the process group is told to end is finished, in so many seconds.
        "shutdown_timeout": 30,
    }
    if options.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization
    if options.lora is not None:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(options.lora)}
    overrides = {**arguments["hf_overrides"], **options.extra.get("hf_overrides", {})}
    return {**arguments, **options.extra, "hf_overrides": overrides}


def make_config(folder: Path, options: VllmOptions) -> Any:
    """vLLM's configuration. Raises VllmStartError for what vLLM, or the judge, cannot do with this model."""
    arguments = engine_arguments(folder, options)
    try:
        if options.deterministic:
            _turn_on_batch_invariance()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
    except ImportError as exc:
        raise VllmStartError(
            f"vLLM is installed and cannot be imported ({exc}): install the versions in constraints/vllm.txt; beside "
            "the CPU build of torch, uninstall torchvision, torchaudio and torchcodec"
        ) from exc
    if current_platform.is_unspecified():
        raise VllmStartError(
            "vLLM finds no GPU here (in a container: is one reserved, and NVIDIA's container toolkit on the host?); "
            "without one, --engine torch runs the model on the CPU"
        )
    try:
        config = AsyncEngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)
    except TypeError as exc:
        if "unexpected keyword argument" not in str(exc):
            raise
        raise VllmStartError(f"--vllm-args: this version of vLLM has no such argument: {exc}") from exc
    except (ValueError, NotImplementedError, ImportError, OSError, RuntimeError) as exc:
        raise VllmStartError(f"vLLM cannot run the model in {folder} as asked: {_first_lines(exc)}") from exc
    _require_kind(config.model_config, options.task)
    return config


def _turn_on_batch_invariance() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        raise VllmStartError("--deterministic needs a GPU: vLLM has batch-invariant kernels for no other device")
    # Read when the kernels' modules are imported.
    os.environ["VLLM_BATCH_INVARIANT"] = "1"


def start(config: Any) -> Any:
    """The running engine (an AsyncLLM), loaded; to be called on its event loop. Raises VllmStartError."""
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.LLM_CLASS, disable_log_stats=True)
    except Exception as exc:
        raise VllmStartError(
            f"vLLM did not start ({_first_lines(exc)}); its own messages above name the cause. Where that is memory: "
            "lower --max-tokens, set --gpu-memory-utilization (on a CPU VLLM_CPU_KVCACHE_SPACE, in GiB), spread the "
            "model with --tensor-parallel-size, or take a smaller one or a --quantization"
        ) from exc


def number_format(config: Any, options: VllmOptions) -> str:
    """How the weights are computed with, and all else that the numbers depend on besides the model's files."""
    parts = [str(config.model_config.dtype).removeprefix("torch.")]
    if config.model_config.quantization:
        parts.append(str(config.model_config.quantization))
    if options.deterministic:
        parts.append("deterministic")
    if options.extra:
        parts.append(f"args-{sha256(json.dumps(dict(options.extra), sort_keys=True).encode()).hexdigest()[:8]}")
    return "+".join(parts)


def executor(config: Any, *, deterministic: bool) -> Executor:
    """vLLM's version, the hardware, and over how many parts each layer's sums are divided.

    Whether bits are stable is not checked: what vLLM batches together is its own affair.
    """
    from vllm import __version__
    from vllm.platforms import current_platform

    parts = config.parallel_config.tensor_parallel_size
    rung = "vllm-deterministic" if deterministic else "vllm"
    return Executor(rung, digest_of(__version__, current_platform.get_device_name(), str(parts)), stable=None)


def _cores(count: int | None) -> Sequence[int]:
    if sys.platform != "linux":
        return range(count or os.cpu_count() or 1)
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[: count or len(allowed)]


def _rank(lora: Lora) -> int:
    try:
        rank = int(json.loads((lora.folder / "adapter_config.json").read_text("utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise VllmStartError(f"{lora.folder} is no LoRA adapter as PEFT saves one: {exc}") from exc
    fitting = [limit for limit in _LORA_RANKS if limit >= rank]
    if not fitting:
        raise VllmStartError(f"the adapter {lora.name} has rank {rank}; vLLM takes up to {_LORA_RANKS[-1]}")
    return fitting[0]


def _require_kind(model: Any, task: Task) -> None:
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
            f"{name} has {model.hf_config.num_labels} outputs; --judge reward-model reads the one of a reward model"
        )


def _first_lines(exc: BaseException) -> str:
    """Enough to see what it is: some of vLLM's messages go on for pages."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return " ".join(lines[:4])[:600] or type(exc).__name__
