"""The policy's model: from a name to a folder, from a folder to a model in memory.

torch and transformers are imported inside the functions, so that `--help` and stages without a model work without them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from client.chat import turn_end
from trainer.errors import ModelError
from trainer.policy.weights import model_digest

DType: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
DTYPES: Final = get_args(DType)

_HUB_ID: Final = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
# No pickles, which run code when they are loaded, and no sub-folders, which hold other formats.
_DOWNLOADED: Final = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_NOT_DOWNLOADED: Final = ["*/*", "consolidated*"]


@contextmanager
def needs_trainer() -> Iterator[None]:
    """Around imports: a missing package becomes an ImportError that says what to install."""
    try:
        yield
    except ImportError as error:
        missing = error.name or "a package"
        raise ImportError(f"{missing} is missing: pip install 'judge-as-api[trainer]'", name=error.name) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the progress bars of transformers, PEFT and TRL and their deprecation warnings about each other."""
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|trl")
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def resolve_model(name: str) -> Path:
    """The folder of a model given as a folder or as a hub id, `org/name` or `org/name@revision`.

    Downloads go to the cache that HF_HOME names. Raises ModelError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{folder} is an adapter: make a model of it first, python -m trainer.merge {folder}")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json: give the folder of a model in the format of transformers")
        return folder
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise ModelError(
            f"{name!r} is neither a folder here nor a hub id (org/name). For a model that the service knows by name, "
            f"give its folder: `python -m service.models path {name}` prints it, after `… fetch {name}` if needed"
        )
    return _download(match[1], match[2])


def model_identity(name: str) -> list[str]:
    """How a run's files record a model: the name the user gave, and the digest of its files, which identifies it.

    Raises ModelError, and RecordError if a file cannot be read.
    """
    return [name, model_digest(resolve_model(name))]


def _download(repo: str, revision: str | None) -> Path:
    with needs_trainer():
        from huggingface_hub import snapshot_download
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED)
    except Exception as error:  # the hub's, its HTTP client's and the file system's errors have no common base
        raise ModelError(
            f"{repo}: no folder of that name here, and the hub does not give it ({type(error).__name__}: {error}). "
            "Give a folder, set HF_ENDPOINT to a mirror, or HF_TOKEN for a gated model"
        ) from error
    return Path(folder)


def choose_device(device: str = "auto") -> Any:
    """The torch.device of that name; `auto` is cuda, mps or cpu, the first there is."""
    with needs_trainer():
        import torch
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: DType, device: Any) -> Any:
    """The torch.dtype of that name; `auto` is bfloat16 where the hardware multiplies it, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: Any) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return False


def load_model(folder: Path, dtype: Any, **kwargs: Any) -> Any:
    """The folder's causal model on the CPU, or where `kwargs` put it. Raises ModelError."""
    with needs_trainer():
        from transformers import AutoModelForCausalLM
    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"the model in {folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ModelError(f"{folder} lacks weights of the model ({missing}, …): they would be random numbers")
    return model


def eos_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """All tokens that end a response: the tokenizer's, the chat template's, those of the generation configuration."""
    found = {tokenizer.eos_token_id, *turn_end(tokenizer).ids}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        stated = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        if stated is not None:
            found.update(stated if isinstance(stated, list) else [stated])
            break
    return frozenset(found)


def context_length(folder: Path) -> int | None:
    """How many tokens the model reads, where its configuration says so."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    length = config.get("text_config", config).get("max_position_embeddings")
    return int(length) if length else None


def release_memory() -> None:
    """Give back what models that nobody refers to any more still hold, on a GPU and on the host."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps what a training on a CPU has freed: gigabytes, which the judge beside it may need.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
