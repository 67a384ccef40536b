"""What the files of a model say by themselves: its size, which model it is, and whether two hold the same weights.

safetensors: 8 bytes, little-endian, with the length of the JSON header that follows
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
_MOST_HEADER: Final = 100_000_000
# LoRA's target "all-linear" leaves out embeddings and the output layer.
_NOT_LINEAR: Final = ("embed", "wte", "wpe", "lm_head")
# What decides what a model or an adapter says: no cards, no notes of other programs.
_DECIDING: Final = (
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
class Size:
    """Parameters in all, and the sum of rows and columns of all matrices that LoRA adapts."""

    parameters: int
    lora_width: int

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter of this rank: each matrix [m, n] gets [m, rank] and [rank, n]."""
        return rank * self.lora_width


def model_size(folder: Path) -> Size | None:
    """None where the folder holds no readable safetensors files."""
    shapes: dict[str, list[int]] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            shapes.update(_shapes(file))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not shapes:
        return None
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and not any(no in name for no in _NOT_LINEAR)]
    return Size(sum(prod(shape) for shape in shapes.values()), sum(sum(shape) for shape in linear))


def model_digest(folder: Path) -> str:
    """SHA-256 of the files that decide what a model says: the same wherever and whenever they were copied to.

    A file is read once in a process, unless it changes. Raises RecordError where one cannot be read.
    """
    try:
        files = sorted({path for pattern in _DECIDING for path in folder.glob(pattern) if path.is_file()})
        digests = [[path.name, _digest_of(path, *_state(path))] for path in files]
    except OSError as error:
        raise RecordError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    return SHA256 + sha256(json.dumps(digests).encode()).hexdigest()


def weights_mark(folder: Path) -> list[list[object]]:
    """Names, sizes and times of a model's weights, by which earlier versions told models apart."""
    stats = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does; the last cannot be set as one likes."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@lru_cache(maxsize=1024)
def _digest_of(path: Path, *_: int) -> str:
    return file_digest(path)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two models have the same weights, each tensor of `first` rounded to the dtype that `second` keeps it in.

    False where they do not name their tensors alike, or cannot be read. Stops at the first difference.
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
    """The tensors of a folder's safetensors files, by name, as they are stored. A context: the files stay open in it.

    An output layer that is tied to the embeddings has their tensor, whether it is stored or not. Raises OSError and
    RuntimeError for files that cannot be read, KeyError for a name that none of them has.
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
        """Of all tensors."""
        return set(self._files)

    def __getitem__(self, name: str) -> Tensor:
        if name == "lm_head.weight" and name not in self._files:
            name = next((one for one in self._files if one.endswith("embed_tokens.weight")), name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > _MOST_HEADER:
            raise ValueError(f"{file}: not a safetensors file")
        header = json.loads(stream.read(length))
    return {name: value["shape"] for name, value in header.items() if name != "__metadata__"}
