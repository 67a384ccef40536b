"""Weights from a folder into memory: device, dtype, and which models are refused.

Imports nothing that only the judge's server needs: the trainer loads its policy with this module.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict, cast

import torch

from client.runtime.memory import allocator, available_bytes
from service.engine.contract import DType, Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DEVICE_BATCH_TOKENS: Final = {"cpu": 4096}
_OTHER_BATCH_TOKENS: Final = 32_768
# glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD in bytes, and M_ARENA_MAX: one arena, so that threads reuse each other's
# freed blocks.
_MALLOC_OPTIONS: Final = ((-3, 1 << 30), (-1, 1 << 30), (-8, 1))
# Models that also read images, and are therefore not in AutoModelForCausalLM. Here they read text only.
_WITH_IMAGES: Final = frozenset({"mistral3"})
# For models without a limit of their own (recurrent ones).
_DEFAULT_MAX_TOKENS: Final = 8192


class EngineLoadError(RuntimeError):
    """The model cannot be loaded here; the message says why and what to do."""


class LoadOptions(TypedDict, total=False):
    """How a model is loaded.

    dtype `auto` is bfloat16 if the hardware multiplies it natively, else float32; device `auto` is the first available
    of cuda, mps and cpu. `max_tokens` lowers the model's own limit, `batch_tokens` overrides the device's default.
    `threads` sets torch's CPU threads for the whole process. `native_kernels` false disables compiled code; `rung`
    restricts the ladder to one rung.
    """

    dtype: DType
    device: str
    max_tokens: int | None
    batch_tokens: int | None
    threads: int | None
    native_kernels: bool
    rung: str | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode, its longest prompt in tokens, and how many tokens make a full batch."""

    model: Any  # transformers' own annotations do not pass strict checks
    max_tokens: int
    batch_tokens: int


def load_model(folder: Path, task: Task, options: LoadOptions) -> Loaded:
    """Load the model in `folder`; nothing is downloaded. Raises EngineLoadError."""
    threads = options.get("threads")
    if threads is not None:
        if threads < 1:
            raise EngineLoadError(f"{threads} threads cannot run a model")
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 has to mean fp32
    device = choose_device(options.get("device", "auto"))
    dtype = choose_dtype(options.get("dtype", "auto"), device)
    if device.type == "cpu":
        _keep_blocks()
    model = _read_model(folder, task, dtype, device)
    return Loaded(
        model,
        max_tokens=_choose_max_tokens(model.config, options.get("max_tokens")),
        batch_tokens=options.get("batch_tokens") or _DEVICE_BATCH_TOKENS.get(device.type, _OTHER_BATCH_TOKENS),
    )


def hardware_of(device: torch.device) -> str:
    """The device and the instruction sets torch uses on it: besides the code, the last digits depend on these."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return " ".join([device.type, torch.backends.cpu.get_cpu_capability(), *instruction_sets()])


def instruction_sets() -> list[str]:
    """The CPU's instruction sets, by torch's names."""
    return [name for name, supported in sorted(torch.cpu.get_capabilities().items()) if supported is True]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, `float32`, …"""
    return str(dtype).removeprefix("torch.")


def free_memory() -> None:
    """Return the memory of models that are no longer referenced, on the GPU and on the host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps what was freed: gigabytes after a training, which the judge next to it may need.
    malloc_trim = allocator("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _keep_blocks() -> None:
    """Let glibc keep large freed blocks: returned and requested again, each costs a page fault for every 4 KB."""
    mallopt = allocator("mallopt")
    if mallopt is not None:
        for option in _MALLOC_OPTIONS:
            mallopt(*option)


def choose_device(device: str) -> torch.device:
    """What `device` means on this machine, see LoadOptions. Raises EngineLoadError if the machine does not have it."""
    if device != "auto":
        try:
            named = torch.device(device)
            torch.empty(1, device=named)
        except (RuntimeError, AssertionError) as reason:
            raise EngineLoadError(f"there is no device {device} here: {str(reason).splitlines()[0]}") from reason
        if named.type == "meta":
            raise EngineLoadError("the device meta computes nothing")
        return named
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """What `dtype` means on this device, see LoadOptions."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; emulated, it is slower than fp32 and less exact."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def _choose_max_tokens(config: PreTrainedConfig, requested: int | None) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if requested is None:
        return int(limit or _DEFAULT_MAX_TOKENS)
    if requested < 1 or (limit is not None and requested > limit):
        raise EngineLoadError(f"max_tokens is {requested}; the model reads 1 to {limit} tokens")
    return requested


def _read_model(folder: Path, task: Task, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the kind of model that `task` needs, after checks that cost less than loading it."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EngineLoadError(f"{folder} holds no model that transformers can read: {error}") from error
    (_require_classifier if task == "classify" else _require_causal)(config)
    _require_memory(folder, dtype, device)
    causal = AutoModelForImageTextToText if config.model_type in _WITH_IMAGES else AutoModelForCausalLM
    auto = AutoModelForSequenceClassification if task == "classify" else causal
    return read_weights(auto, folder, dtype, device)


def read_weights(
    auto_class: Any, folder: Path, dtype: torch.dtype, device: torch.device | None = None, **options: Any
) -> Any:
    """A model in evaluation mode on `device` (None: where `options` put it), all weights read from `folder`.

    `options` go to from_pretrained. Raises EngineLoadError.
    """
    try:
        model, info = auto_class.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **options
        )
        model = model.eval() if device is None else model.eval().to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        where = "" if device is None else f" on {device}"
        raise EngineLoadError(f"not enough memory for the model{where}: take a smaller one") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineLoadError(f"the model in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EngineLoadError(f"{folder} lacks weights of the model ({missing}, …): they would be random numbers")
    return model


def _require_causal(config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    architectures = config.architectures or []
    fits = not architectures or any(kind in name for name in architectures for kind in kinds)
    if config.model_type not in _WITH_IMAGES and (not fits or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        name = ", ".join(architectures) or config.model_type
        advice = "; serve it with --judge reward-model" if "SequenceClassification" in name else ""
        raise EngineLoadError(f"{name} is not a causal language model (…ForCausalLM); a judge needs one{advice}")


def _require_classifier(config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    architectures = config.architectures or []
    fits = not architectures or any("SequenceClassification" in name for name in architectures)
    if not fits or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        name = ", ".join(architectures) or config.model_type
        raise EngineLoadError(
            f"{name} is not a reward model: --judge reward-model needs a sequence classifier "
            "(…ForSequenceClassification) with one output; a causal language model judges with --judge yes-no"
        )
    if config.num_labels != 1:
        raise EngineLoadError(
            f"{', '.join(architectures)} has {config.num_labels} outputs; --judge reward-model needs a model with one"
        )


def _require_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a model larger than a Linux host's free memory: the kernel would kill the process without a message."""
    free = available_bytes()
    if device.type != "cpu" or free is None:
        return
    need = _weight_count(folder) * dtype.itemsize
    if need > free:
        raise EngineLoadError(
            f"the weights take {need / 2**30:.1f} GiB in {dtype} and {free / 2**30:.1f} GiB are free: "
            "take a smaller model or bfloat16"
        )


def _weight_count(folder: Path) -> int:
    """The number of parameters in the folder's safetensors files, from their headers; 0 if there are none."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 - not a dict
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count
