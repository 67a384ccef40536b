"""The packed prefill in C++ (prefill.cpp), on CPUs with AMX, or with AVX-512's bfloat16 alone.

It computes what packed_forward.py specifies, three times as fast, and rounds less often. In bfloat16, or in float32
where the weights are bfloat16 numbers, as published ones mostly are: each activation is then split into two bf16 terms,
so that a product is off by 2^-18 of its size at most.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from service.engine.torch.cpu import build
from service.engine.torch.cpu.layout import BLOCK, in_bfloat16, in_turn, panels_of
from service.engine.torch.families import (
    Decoder,
    DecoderLayer,
    UnsupportedModelError,
    bias_of,
    is_gelu,
    norm_eps,
    norm_weight,
)
from service.engine.torch.heads import in_terms, softcapped
from service.engine.torch.packed_forward import Prefill, some_of
from service.engine.torch.packing import PackedBatch

_SOURCE: Final = Path(__file__).with_name("prefill.cpp")
# What the library is compiled for: the compiler's flags, and what torch calls them.
_AVX512: Final = {
    "avx512f": "avx512_f",
    "avx512bw": "avx512_bw",
    "avx512dq": "avx512_dq",
    "avx512vl": "avx512_vl",
    "avx512bf16": "avx512_bf16",
    "fma": "fma3",
}
_AMX: Final = {"amx-tile": "amx_tile", "amx-bf16": "amx_bf16"}
# How many bf16 terms each activation is split into.
_TERMS: Final = {torch.bfloat16: 1, torch.float32: 2}
_HEAD_TERMS: Final = 3  # so that the products of the output layer are exact
_HEAD_STATES: Final = 20  # that the output layer's weight is read for at once: with AMX, two panels of kPanelStates
_MOST_HEAD_DIM: Final = 1024  # kMaxHeadDim in prefill.cpp


class LibraryUnavailableError(UnsupportedModelError):
    """This CPU could run compiled code, and there is none."""


@dataclass(frozen=True, slots=True)
class Library:
    """Compiled code of this machine, not loaded yet."""

    file: Path

    @property
    def digest(self) -> str:
        """Of the code itself, which another compiler makes otherwise."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

    def load(self) -> ctypes.CDLL:
        """Its functions. Raises OSError where they cannot be had here.

        What is wrong with the file may also end this process: a child tries it first.
        """
        found = ctypes.CDLL(str(self.file))
        if found.prefill_request_amx():
            raise OSError("the system does not give AMX to this process")
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        lists = (pointer, number) * 2
        found.prefill.argtypes = [pointer, number, pointer, number, *lists, number, pointer]
        found.output_layer.argtypes = [pointer, number, number, pointer, number, pointer, number, number]
        found.output_layer.restype = found.prefill.restype = number
        return found


def forms() -> tuple[str, ...]:
    """Which forms of the code this CPU runs, fastest first: `amx`, `avx512`, both or neither.

    ATEN_CPU_CAPABILITY, by which torch is kept from instructions, keeps from these as well.
    """
    able = torch.cpu.get_capabilities()
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not (allowed and all(able.get(name, False) for name in _AVX512.values())):
        return ()
    return ("amx", "avx512") if all(able.get(name, False) for name in _AMX.values()) else ("avx512",)


def library(dtype: torch.dtype, form: str) -> Library:
    """Compile the library in one of `forms` where that has not been done yet.

    Raises UnsupportedModelError for other dtypes, and where there is no compiler or no folder to write to.
    """
    if dtype not in _TERMS:
        raise UnsupportedModelError(f"in {str(dtype).removeprefix('torch.')}")
    try:
        return Library(compiled(form))
    except build.NativeUnavailableError as reason:
        raise LibraryUnavailableError(f"without the compiled library: {reason}") from reason


def compiled(form: str) -> Path:
    """The library's file, for `amx` or `avx512`. Raises NativeUnavailableError."""
    flags = _AVX512 | _AMX if form == "amx" else _AVX512
    return build.library(_SOURCE, tuple(f"-m{flag}" for flag in flags))


class _Layer(ctypes.Structure):
    """Layer in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "qkv_bias", "q_norm", "k_norm", "o_bias")),
        *((name, ctypes.c_void_p) for name in ("post_attention_norm", "pre_mlp_norm", "post_mlp_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down", "cos", "sin")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _Model(ctypes.Structure):
    """Model in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "hidden_size", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "intermediate_size", "gelu")),
        ("eps", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("layer", ctypes.c_void_p),
    )


class _Segment(ctypes.Structure):
    """Segment in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("row", "length", "position", "links")),
        ("chain", ctypes.c_void_p),
    )


class CompiledPrefill:
    """`Prefill` in C++, on a copy of the weights in its own layout; the model's own may be freed.

    Raises UnsupportedModelError. The library is loaded at the first batch.
    """

    divides_batches = True

    def __init__(self, decoder: Decoder, library: Library) -> None:
        self._library = library
        self._terms = _TERMS[decoder.dtype]
        self._embed = decoder.embed
        self._shape = _Shape(decoder)
        self._ropes = decoder.ropes(torch.float32)
        self._layers = [_Weights(layer, self._ropes[layer.rope].order) for layer in decoder.layers]
        self._final_norm = norm_weight(decoder.norm)
        self._model = _Model()

    def shallow(self) -> Prefill:
        """See Prefill."""
        twin = copy(self)
        twin._layers = some_of(self._layers, lambda layer: (layer.rope, layer.window))
        twin._model = _Model()
        return twin

    def prepare(self, longest: int) -> None:
        """See Prefill."""
        grown = [rope.grow(longest) for rope in self._ropes.values()]
        if any(grown) or not self._model.layer:
            layers = (_Layer * len(self._layers))(*(self._described(layer) for layer in self._layers))
            self._model = self._shape.model(layers, self._final_norm)

    @torch.inference_mode()
    def last_hidden_states(self, batch: PackedBatch, threads: int) -> Tensor:
        """See Prefill. Raises MemoryError."""
        ids = torch.tensor([token for segment in batch.segments for token in segment.tokens])
        embedded = self._embed(ids).float().contiguous()
        chains = [(ctypes.c_int64 * len(segment.chain))(*segment.chain) for segment in batch.segments]
        segments = (_Segment * len(batch.segments))(
            *(
                _Segment(s.row, len(s.tokens), s.position, len(chain), ctypes.addressof(chain))
                for s, chain in zip(batch.segments, chains, strict=True)
            )
        )
        last = (ctypes.c_int64 * len(batch.last_row))(*batch.last_row.values())
        states = torch.empty(len(last), embedded.shape[1], dtype=torch.float32)
        out_of_memory = _loaded(self._library).prefill(
            ctypes.byref(self._model),
            self._terms,
            embedded.data_ptr(),
            len(ids),
            segments,
            len(segments),
            last,
            len(last),
            threads,
            states.data_ptr(),
        )
        if out_of_memory:
            raise MemoryError(f"no memory for {len(ids)} tokens")
        return states

    def _described(self, layer: _Weights) -> _Layer:
        rope = self._ropes[layer.rope]
        return _Layer(
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in layer.tensors.items()},
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            window=layer.window,
            scaling=layer.scaling,
            softcap=layer.softcap,
        )


class CompiledOutputLayer:
    """`Head` for labels: each state is split into three bf16 terms, so that products with bf16 weights are exact.

    Raises UnsupportedModelError.
    """

    most_states: Final = _HEAD_STATES

    def __init__(self, linear: nn.Linear, softcap: float | None, library: Library) -> None:
        self._library, self._softcap = library, softcap
        self._weight = in_bfloat16(linear.weight.data).contiguous()
        self._bias = None if linear.bias is None else linear.bias.data.float()

    @torch.inference_mode()
    def __call__(self, states: Tensor, threads: int) -> Tensor:
        """[prompts, hidden_size] in fp32 -> [prompts, vocabulary] in fp32. Raises MemoryError."""
        terms = torch.stack(in_terms(states, _HEAD_TERMS), dim=1)
        logits = torch.empty(len(states), len(self._weight), dtype=torch.float32)
        run = _loaded(self._library).output_layer
        fixed = self._weight.data_ptr(), *self._weight.shape, terms.data_ptr(), len(states), logits.data_ptr()
        blocks = -(-len(self._weight) // BLOCK)
        ends = [blocks * thread // threads for thread in range(threads + 1)]
        others = [self._helpers.submit(run, *fixed, start, end - start) for start, end in pairwise(ends[1:])]
        if any([run(*fixed, 0, ends[1]), *(other.result() for other in others)]):
            raise MemoryError("no memory for the output layer")
        return softcapped(logits if self._bias is None else logits + self._bias, self._softcap)

    @cached_property
    def _helpers(self) -> ThreadPoolExecutor:
        """They do nothing in torch, so they need not be kept to one thread there. Made at the
        first use, so that a forked process has its own."""
        return ThreadPoolExecutor(os.cpu_count(), "output")


@cache
def _loaded(library: Library) -> ctypes.CDLL:
    return library.load()


class _Shape:
    """What all layers have in common; UnsupportedModelError where that is not so, or not in blocks of 32."""

    def __init__(self, decoder: Decoder) -> None:
        first = decoder.layers[0]
        head = first.head_dim
        norms = [norm for layer in decoder.layers for norm in _norms(layer).values() if norm is not None]
        eps = {norm_eps(norm) for norm in (*norms, decoder.norm)}
        shapes = {tuple(part.weight.shape for part in layer.products) for layer in decoder.layers}
        heads = {layer.head_dim for layer in decoder.layers}
        gelu = {is_gelu(layer.activation) for layer in decoder.layers}
        if any(len(values) > 1 for values in (eps, shapes, heads, gelu)):
            raise UnsupportedModelError("with layers of different shapes")
        self._sizes = {
            "hidden_size": first.o_proj.out_features,
            "heads": first.qkv_sizes[0] // head,
            "kv_heads": first.qkv_sizes[1] // head,
            "head_dim": head,
            "intermediate_size": first.down.in_features,
            "gelu": int(gelu.pop()),
        }
        if (
            any(self._sizes[name] % BLOCK for name in ("hidden_size", "head_dim", "intermediate_size"))
            or head > _MOST_HEAD_DIM
        ):
            raise UnsupportedModelError(f"with widths that are no multiples of {BLOCK}")
        self._eps = eps.pop()

    def model(self, layers: ctypes.Array[_Layer], final_norm: Tensor) -> _Model:
        """The structure for the library; it keeps what it points to alive."""
        found = _Model(
            **self._sizes,
            layers=len(layers),
            eps=self._eps,
            final_norm=final_norm.data_ptr(),
            layer=ctypes.addressof(layers),
        )
        found.kept = layers
        return found


class _Weights:
    """A layer's weights in the library's layout, by their names in it; None for those that the family lacks."""

    def __init__(self, layer: DecoderLayer, order: Tensor | None) -> None:
        """`order` is that of a query's and a key's head; see Rope."""
        if any(part.bias is not None for part in (*layer.gate_up, layer.down)):
            raise UnsupportedModelError("with biases in its MLP")
        if layer.parallel or layer.output_scale is not None or type(layer.v_norm) is not nn.Identity:
            raise UnsupportedModelError("with layers of other parts than Llama's or Gemma's")
        self.rope, self.window, self.scaling, self.softcap = (
            layer.rope,
            layer.window or 0,
            layer.scaling,
            layer.softcap or 0.0,
        )
        gate, up = torch.cat([in_bfloat16(part.weight.data) for part in layer.gate_up]).chunk(2)
        qkv, qkv_bias = torch.cat([in_bfloat16(part.weight.data) for part in layer.qkv]), bias_of(*layer.qkv)
        norms = {name: None if norm is None else norm_weight(norm) for name, norm in _norms(layer).items()}
        output_bias = bias_of(layer.o_proj)
        if order is not None:
            heads = torch.arange(len(qkv)).view(-1, layer.head_dim)
            turned = sum(layer.qkv_sizes[:2]) // layer.head_dim
            heads[:turned] = heads[:turned, order]
            qkv, qkv_bias = qkv[heads.flatten()], None if qkv_bias is None else qkv_bias[heads.flatten()]
            norms |= {name: None if (norm := norms[name]) is None else norm[order] for name in ("q_norm", "k_norm")}
        self.tensors: dict[str, Tensor | None] = {
            **norms,
            "qkv_bias": None if qkv_bias is None else qkv_bias.float(),
            "o_bias": None if output_bias is None else output_bias.float(),
            "qkv": panels_of(qkv),
            "o": panels_of(in_bfloat16(layer.o_proj.weight.data)),
            "gate_up": panels_of(in_turn(gate, up)),
            "down": panels_of(in_bfloat16(layer.down.weight.data)),
        }


def _norms(layer: DecoderLayer) -> dict[str, nn.Module | None]:
    """A layer's norms by their names in the library, which can do without these."""
    lacking = {
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "post_attention_norm": layer.post_attention_norm,
        "post_mlp_norm": layer.post_mlp_norm,
    }
    found = {name: None if type(norm) is nn.Identity else norm for name, norm in lacking.items()}
    return {"input_norm": layer.input_norm, "pre_mlp_norm": layer.pre_mlp_norm, **found}


if __name__ == "__main__":
    for each in ("amx", "avx512"):
        compiled(each)
