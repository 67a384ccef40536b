"""What a model's files tell without loading it: its size, its identity, and whether two models have equal weights.

A safetensors file begins with 8 little-endian bytes, the length of the JSON header that follows them
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trainer.errors import RecordError
from trainer.run.files import file_digest

if TYPE_CHECKING:
    from torch import Tensor

SHA256: Final = "sha256:"
_LENGTH_BYTES: Final = 8
_MAX_HEADER_BYTES: Final = 100_000_000
# LoRA's target "all-linear" excludes embeddings and the output layer.
_NOT_LINEAR: Final = ("embed", "wte", "wpe", "lm_head")
# The files that decide a model's or an adapter's outputs: no model cards, no files of other programs.
_IDENTITY_FILES: Final = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*config.json",
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The number of parameters, and the sum of rows and columns over all matrices that LoRA adapts."""

    parameters: int
    lora_width: int

    def lora_parameters(self, rank: int) -> int:
        """The parameters of an adapter of this rank: each matrix [m, n] gets [m, rank] and [rank, n]."""
        return rank * self.lora_width


def model_size(folder: Path) -> ModelSize | None:
    """The size of the model in `folder`; None without readable safetensors files."""
    shapes: dict[str, list[int]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            shapes.update(_shapes(file))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not shapes:
        return None
    linear = [
        shape for name, shape in shapes.items() if len(shape) == 2 and not any(part in name for part in _NOT_LINEAR)
    ]
    return ModelSize(sum(prod(shape) for shape in shapes.values()), sum(sum(shape) for shape in linear))


def model_digest(folder: Path) -> str:
    """SHA-256 of the files that decide a model's outputs, independent of where and when they were copied.

    Each file is read once per process, unless it changes. Raises RecordError for an unreadable file.
    """
    try:
        files = sorted({path for pattern in _IDENTITY_FILES for path in folder.glob(pattern) if path.is_file()})
        digests = [[path.name, _cached_digest(path, *_file_state(path))] for path in files]
    except OSError as error:
        raise RecordError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    return SHA256 + sha256(json.dumps(digests).encode()).hexdigest()


def weights_mark(folder: Path) -> list[list[object]]:
    """Names, sizes and times of a model's weight files, by which earlier versions identified models."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _file_state(path: Path) -> tuple[int, ...]:
    """What changes when the file does. The last, ctime, cannot be set back as mtime can."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=1024)
def _cached_digest(path: Path, *_: int) -> str:
    return file_digest(path)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two models have equal weights, each tensor of `first` rounded to its dtype in `second`.

    False if their tensors have different names, or cannot be read. Stops at the first difference.
    """
    try:
        with TensorFiles(first) as one, TensorFiles(second) as other:
            names = sorted(one.names | other.names)
            return bool(names) and all(_equal(one[name], other[name]) for name in names)
    except (OSError, ValueError, RuntimeError, KeyError):
        return False


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.to(other.dtype) == other).all())


class TensorFiles:
    """The tensors of a folder's safetensors files, by name and as stored. A context manager that keeps the files open.

    An output layer that is tied to the embeddings, and therefore not stored, yields the embeddings' tensor. Raises
    OSError and RuntimeError for unreadable files, KeyError for an unknown name.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.glob("*.safetensors"))
        self._opened = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> TensorFiles:
        from safetensors import safe_open

        for path in self._paths:
            opened: Any = safe_open(path, framework="pt")
            file = self._opened.enter_context(opened)
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> set[str]:
        """The names of all stored tensors."""
        return set(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if name == "lm_head.weight" and name not in self._files:
            name = next((one for one in self._files if one.endswith("embed_tokens.weight")), name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file}: not a safetensors file")
        header = json.loads(stream.read(length))
    return {name: value["shape"] for name, value in header.items() if name != "__metadata__"}
