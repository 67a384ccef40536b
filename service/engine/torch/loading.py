"""Weights from a folder into memory, for the engines that run them with torch: device, dtype, what is refused."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, cast

import torch

from service.engine.contract import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DType = Literal["auto", "bfloat16", "float16", "float32"]

_BATCH_TOKENS: Final = {"cpu": 4096}
_BATCH_TOKENS_ELSEWHERE: Final = 32_768
# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes, and M_ARENA_MAX: blocks that threads free are there for all of them.
_MALLOC_OPTIONS: Final = ((-3, 1 << 30), (-1, 1 << 30), (-8, 1))
# Models that read images too, and are no causal models to transformers for that; here they read text.
_WITH_IMAGES: Final = frozenset({"mistral3"})
# For models that state no limit (recurrent ones).
_DEFAULT_MAX_TOKENS: Final = 8192


class EngineLoadError(RuntimeError):
    """The folder cannot be loaded as a judge; the message says why and what to do."""


class LoadOptions(TypedDict, total=False):
    """How a model is loaded.

    dtype `auto` is bfloat16 where the hardware multiplies it natively, else float32; device `auto` is cuda, mps or cpu,
    the first there is. `max_tokens` lowers the model's own limit, `batch_tokens` replaces what suits the device.
    `threads` sets torch's CPU threads for the whole process. `native_kernels` false keeps compiled code away; `rung`
    names the only one of the ladder that is tried.
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
    """A model in evaluation mode, the longest prompt that it reads, and how many tokens fill a call well."""

    model: Any  # what transformers says of its own types is not enough for strict checks
    max_tokens: int
    batch_tokens: int


def load_model(folder: Path, task: Task, options: LoadOptions) -> Loaded:
    """Load the model in `folder`; nothing is fetched. Raises EngineLoadError."""
    threads = options.get("threads")
    if threads is not None:
        if threads < 1:
            raise EngineLoadError(f"{threads} threads cannot run a model")
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 has to mean fp32
    where = choose_device(options.get("device", "auto"))
    what = choose_dtype(options.get("dtype", "auto"), where)
    if where.type == "cpu":
        _keep_blocks()
    model = _read_model(folder, task, what, where)
    return Loaded(
        model,
        max_tokens=_choose_max_tokens(model.config, options.get("max_tokens")),
        batch_tokens=options.get("batch_tokens") or _BATCH_TOKENS.get(where.type, _BATCH_TOKENS_ELSEWHERE),
    )


def hardware_of(device: torch.device) -> str:
    """The hardware and what torch uses of it: what the last digits depend on besides the code."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return " ".join([device.type, torch.backends.cpu.get_cpu_capability(), *instruction_sets()])


def instruction_sets() -> list[str]:
    """What this CPU can do, by torch's names."""
    return [name for name, there in sorted(torch.cpu.get_capabilities().items()) if there is True]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`, `float32`, …"""
    return str(dtype).removeprefix("torch.")


def free_memory() -> None:
    """Give back what models that nobody refers to any more still hold."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's, which has been told to keep blocks
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _keep_blocks() -> None:
    """Let glibc keep large blocks: given back and asked for again, each costs a page fault for every 4 KB of it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in _MALLOC_OPTIONS:
            mallopt(*option)


def choose_device(device: str) -> torch.device:
    """What `device` means on this machine (`LoadOptions`). Raises EngineLoadError for one that is not there."""
    if device != "auto":
        try:
            found = torch.device(device)
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError) as reason:
            raise EngineLoadError(f"there is no device {device} here: {str(reason).splitlines()[0]}") from reason
        if found.type == "meta":
            raise EngineLoadError("the device meta computes nothing")
        return found
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """What `dtype` means on this device (`LoadOptions`)."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products; where they are emulated fp32 is faster and exact."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def _choose_max_tokens(config: PreTrainedConfig, asked: int | None) -> int:
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return int(own or _DEFAULT_MAX_TOKENS)
    if asked < 1 or (own is not None and asked > own):
        raise EngineLoadError(f"max_tokens is {asked}; the model reads 1 to {own} tokens")
    return asked


def _read_model(folder: Path, task: Task, dtype: torch.dtype, device: torch.device) -> Any:
    """The folder's model on `device`, every weight of it read from the folder."""
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
    try:
        causal = AutoModelForImageTextToText if config.model_type in _WITH_IMAGES else AutoModelForCausalLM
        auto: Any = AutoModelForSequenceClassification if task == "classify" else causal
        model, info = auto.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
        model = model.eval().to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EngineLoadError(f"not enough memory for the model on {device}: take a smaller one") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineLoadError(f"the model in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise EngineLoadError(f"{folder} lacks weights of the model ({missing}, …): they would be random numbers")
    return model


def _require_causal(config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kinds = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
    stated = config.architectures or []
    fits = not stated or any(kind in name for name in stated for kind in kinds)
    if config.model_type not in _WITH_IMAGES and (not fits or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING):
        name = ", ".join(stated) or config.model_type
        advice = "; serve it with --judge reward-model" if "SequenceClassification" in name else ""
        raise EngineLoadError(f"{name} is not a causal language model (…ForCausalLM); a judge needs one{advice}")


def _require_classifier(config: PreTrainedConfig) -> None:
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    stated = config.architectures or []
    fits = not stated or any("SequenceClassification" in name for name in stated)
    if not fits or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        name = ", ".join(stated) or config.model_type
        raise EngineLoadError(
            f"{name} is not a reward model: --judge reward-model needs a sequence classifier "
            "(…ForSequenceClassification) with one output; a causal language model judges with --judge yes-no"
        )
    if config.num_labels != 1:
        raise EngineLoadError(
            f"{', '.join(stated)} has {config.num_labels} outputs; --judge reward-model reads the one of a reward model"
        )


def _require_memory(folder: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what cannot fit a Linux host's free memory: the kernel would kill the process without a word."""
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return
    free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    need = _weight_count(folder) * dtype.itemsize
    if need > free:
        raise EngineLoadError(
            f"the weights take {need / 2**30:.1f} GiB in {dtype} and {free / 2**30:.1f} GiB are free: "
            "take a smaller model or bfloat16"
        )


def _weight_count(folder: Path) -> int:
    """Numbers in the folder's safetensors files, from their headers alone (0 where there are none)."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118 - not a dict
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count
