"""The shared library of prefill.cpp: which forms of it this CPU runs, how it is compiled, and what it exports."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch

from service.engine.torch.cpu import build
from service.engine.torch.families import UnsupportedModelError

_SOURCE: Final = Path(__file__).with_name("prefill.cpp")
# The compiler's flags, and torch's names for what they ask of the CPU.
_AVX512: Final = {
    "avx512f": "avx512_f",
    "avx512bw": "avx512_bw",
    "avx512dq": "avx512_dq",
    "avx512vl": "avx512_vl",
    "avx512bf16": "avx512_bf16",
    "fma": "fma3",
}
_AMX: Final = {"amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
FORMS: Final = {"amx": _AVX512 | _AMX, "avx512": _AVX512}
# How many bf16 terms each activation is split into. Published weights are bf16 numbers, so for float32 only the
# activations need more digits: two terms give 2^-18, a thousandth of bf16's error, for twice its products. Three would
# be exact, but cost half as much again; torch's own fp32 uses neither unit and is slower.
TERMS: Final = {torch.bfloat16: 1, torch.float32: 2}


class LibraryUnavailableError(UnsupportedModelError):
    """This CPU could run the compiled code, but it cannot be compiled."""


@dataclass(frozen=True, slots=True)
class Library:
    """Compiled code for this machine, not loaded yet."""

    file: Path

    @property
    def digest(self) -> str:
        """Of the machine code: another compiler may make code with other bits."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def load(self) -> ctypes.CDLL:
        """Its functions. Raises OSError if this system cannot load or run it.

        A bad file may also end the process, so a child process tries it first.
        """
        functions = ctypes.CDLL(str(self.file))
        if functions.prefill_request_amx():
            raise OSError("the system does not give AMX to this process")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        arrays = (pointer, number) * 2
        functions.prefill.argtypes = [pointer, number, pointer, number, *arrays, number, pointer]
        functions.output_layer.argtypes = [pointer, number, number, pointer, number, pointer, number, number]
        functions.output_layer.restype = functions.prefill.restype = number
        return functions


@cache
def loaded(library: Library) -> ctypes.CDLL:
    """Its functions, loaded once in a process."""
    return library.load()


def library_forms() -> tuple[str, ...]:
    """Which of FORMS this CPU runs, fastest first.

    ATEN_CPU_CAPABILITY keeps torch from using instructions; it keeps this library from using them too.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return ()
    able = torch.cpu.get_capabilities()
    return tuple(form for form, flags in FORMS.items() if all(able.get(name, False) for name in flags.values()))


def compiled_library(dtype: torch.dtype, form: str) -> Library:
    """The library in one of `library_forms`, compiled if need be.

    Raises UnsupportedModelError for other dtypes, and if there is no compiler or no folder to write to.
    """
    if dtype not in TERMS:
        raise UnsupportedModelError(f"in {str(dtype).removeprefix('torch.')}")
    try:
        return Library(library_file(form))
    except build.NativeUnavailableError as reason:
        raise LibraryUnavailableError(f"without the compiled library: {reason}") from reason


def library_file(form: str) -> Path:
    """The library's file in one of FORMS. Raises NativeUnavailableError."""
    return build.shared_library(_SOURCE, tuple(f"-m{flag}" for flag in FORMS[form]))


class LayerStruct(ctypes.Structure):
    """Layer in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "qkv_bias", "q_norm", "k_norm", "o_bias")),
        *((name, ctypes.c_void_p) for name in ("post_attention_norm", "pre_mlp_norm", "post_mlp_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "cos", "sin")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class ModelStruct(ctypes.Structure):
    """Model in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden_size", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "intermediate_size", "gelu")),
        ("eps", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("layer", ctypes.c_void_p),
    )


class SegmentStruct(ctypes.Structure):
    """Segment in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("start", "length", "position", "links")),
        ("chain", ctypes.c_void_p),
    )
