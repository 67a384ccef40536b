"""The packed forward in C++ (native_decoder.cpp), on CPUs with AMX, or with AVX-512's bfloat16 alone.

It does what tiled_decoder.py does with torch's operations, three times as fast, and rounds less often. In bfloat16, or
in float32 where the weights are bfloat16 numbers, as published ones mostly are: what they are multiplied by is then the
sum of two numbers in bfloat16, so that a product is off by 2^-18 of its size at most.

Weights are held in its layout only: `PanelLinear` and `PanelMlp` take the place of the model's own layers, so that what
the model itself still does, such as writing text, goes on working.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.engine import native
from service.engine.decoder_layers import (
    Decoder,
    DecoderLayer,
    UnsupportedModelError,
    bias_of,
    is_gelu,
    norm_eps,
    norm_weight,
)
from service.engine.packing import PACK_ROWS, Pack
from service.engine.torch_head import HEAD_ROWS, LastTokenHead, in_parts, summaries

T = TypeVar("T")

_SOURCE: Final = Path(__file__).with_suffix(".cpp")
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
# Numbers in bfloat16 that a number which is multiplied by a weight is the sum of.
_PARTS: Final = {torch.bfloat16: 1, torch.float32: 2}
_BLOCK: Final = 32  # kBlock in native_decoder.cpp
_GROUP: Final = 16  # states that native_head takes together
_MOST_HEAD_WIDTH: Final = 1024  # of rotate in native_decoder.cpp


def compiled(*, amx: bool) -> ctypes.CDLL:
    """The library as it is, compiled where that has not been done yet. Raises NativeUnavailableError."""
    return native.library(_SOURCE, tuple(f"-m{flag}" for flag in (_AVX512 | _AMX if amx else _AVX512)))


class _Layer(ctypes.Structure):
    """Layer in native_decoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before_norm", "qkv_bias", "q_norm", "k_norm", "output_bias")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "last_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv", "output", "gate_up", "down", "cos", "sin")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class _Model(ctypes.Structure):
    """Model in native_decoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_width", "mlp_width", "gelu")),
        ("eps", ctypes.c_float),
        ("final_norm", ctypes.c_void_p),
        ("layer", ctypes.c_void_p),
    )


class _Segment(ctypes.Structure):
    """Segment in native_decoder.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("row", "length", "position", "links")),
        ("chain", ctypes.c_void_p),
    )


class NativeDecoder:
    """Runs packs through copies of the decoder's weights. Raises UnsupportedModelError.

    `take_over` frees the model's own weights.
    """

    pack_rows: Final = PACK_ROWS
    head_states: Final = HEAD_ROWS
    divides_packs: Final = True
    summaries = staticmethod(summaries)

    def __init__(self, decoder: Decoder, head: LastTokenHead) -> None:
        self._library = _library(decoder.dtype)
        self._parts = _PARTS[decoder.dtype]
        self._decoder: Decoder | None = decoder
        self._embed = decoder.embed
        self._shape = _Shape(decoder)
        self._layers = [_Weights(layer) for layer in decoder.layers]
        self._final_norm = norm_weight(decoder.norm)
        self._ropes = decoder.ropes(torch.float32)
        self._model = _Model()
        if head.weight.dtype != torch.bfloat16:
            head.weight = nn.Parameter(_in_bfloat16(head.weight.data), requires_grad=False)

    def prepare(self, longest: int) -> None:
        """Before packs with items of so many tokens."""
        grown = [rope.grow(longest) for rope in self._ropes.values()]
        if any(grown):
            layers = (_Layer * len(self._layers))(*(self._described(layer) for layer in self._layers))
            self._model = self._shape.model(layers, self._final_norm)

    @torch.inference_mode()
    def read(self, pack: Pack, threads: int) -> dict[int, Tensor]:
        """The state behind each item's last token, [width] in fp32, by the item's index."""
        ids = torch.tensor([token for segment in pack.segments for token in segment.tokens])
        embedded = self._embed(ids).float().contiguous()
        chains = [(ctypes.c_int64 * len(segment.chain))(*segment.chain) for segment in pack.segments]
        segments = (_Segment * len(pack.segments))(
            *(
                _Segment(s.row, len(s.tokens), s.position, len(chain), ctypes.addressof(chain))
                for s, chain in zip(pack.segments, chains, strict=True)
            )
        )
        last = (ctypes.c_int64 * len(pack.last_row))(*pack.last_row.values())
        states = torch.empty(len(last), embedded.shape[1])
        short = self._library.native_decode(
            ctypes.byref(self._model),
            self._parts,
            embedded.data_ptr(),
            len(ids),
            segments,
            len(segments),
            last,
            len(last),
            threads,
            states.data_ptr(),
        )
        if short:
            raise MemoryError(f"no memory for {len(ids)} tokens")
        return dict(zip(pack.last_row, states, strict=True))

    @torch.inference_mode()
    def logits(self, head: LastTokenHead, states: Tensor) -> Tensor:
        """[items, width] -> [items, vocabulary] in fp32.

        Each state is the sum of three numbers in bfloat16, so that its products with bfloat16 weights are exact.
        """
        weight = head.weight
        if not _fits(weight):
            return head.of_rows(states)
        groups = -(-len(states) // _GROUP)
        parts = in_parts(functional.pad(states, (0, 0, 0, groups * _GROUP - len(states))).view(groups, _GROUP, -1), 3)
        panels = _panels(torch.stack((*parts, torch.zeros_like(parts[0])), dim=1).flatten(0, 2))
        found = torch.empty(groups, len(weight), _GROUP)
        fixed = weight.data_ptr(), len(weight), weight.shape[1], panels.data_ptr(), groups, found.data_ptr()
        if any(_shared_out(-(-len(weight) // _BLOCK), partial(self._library.native_head, *fixed))):
            raise MemoryError("no memory for the output layer")
        # In rows, as what is summed over them later depends on how they lie in memory.
        logits = found.transpose(1, 2).contiguous().view(groups * _GROUP, -1)[: len(states)]
        return logits if head.bias is None else logits + head.bias.float()

    def take_over(self, head: LastTokenHead) -> None:
        """Put layers that use these weights in the place of the model's own, whose memory is then free."""
        if self._decoder is not None:
            for weights, layer in zip(self._layers, self._decoder.layers, strict=True):
                weights.take_over(layer, self._library)
            self._decoder = None
        if _fits(head.weight):
            head.compiled = partial(self.logits, head)

    def _described(self, layer: _Weights) -> _Layer:
        rope = self._ropes[layer.kind if layer.kind in self._ropes else None]
        return _Layer(
            **{name: _address(tensor) for name, tensor in layer.tensors.items()},
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            window=layer.window,
            scaling=layer.scaling,
            cap=layer.cap,
        )


class PanelLinear(nn.Module):
    """nn.Linear without gradients, its weight in panels: [..., inputs] -> [..., outputs], in the input's format."""

    def __init__(self, library: ctypes.CDLL, panels: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._library, self._panels, self._bias = library, panels, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.of_parts(_rows_in_parts(x), x.shape[:-1].numel()).view(*x.shape[:-1], -1).to(x.dtype)

    def of_parts(self, rows: Tensor, size: int) -> Tensor:
        """[whole blocks of rows, parts, inputs] in bfloat16 -> [`size`, outputs] in fp32: the first rows alone."""
        (whole, parts, depth), count = rows.shape, len(self._panels) * _BLOCK
        out = torch.empty(whole, count)
        read, added = (rows.data_ptr(), size, parts, depth), (self._panels.data_ptr(), _address(self._bias), count)
        _shared_out(len(self._panels), partial(self._library.native_linear, *read, *added, out.data_ptr()))
        return out[:size]


class PanelMlp(nn.Module):
    """Gate, up, activation and down, without gradients, the weights in panels."""

    def __init__(self, library: ctypes.CDLL, gate_up: Tensor, down: PanelLinear, *, gelu: bool) -> None:
        super().__init__()
        self._library, self._gate_up, self._gelu = library, gate_up, gelu
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        rows, size, width = _rows_in_parts(x), x.shape[:-1].numel(), len(self._gate_up) * _BLOCK // 2
        inner = torch.empty(*rows.shape[:2], width, dtype=torch.bfloat16)
        read, made = (rows.data_ptr(), size, *rows.shape[1:]), (width, int(self._gelu), inner.data_ptr())
        _shared_out(len(self._gate_up), partial(self._library.native_gated, *read, self._gate_up.data_ptr(), *made))
        return self.down_proj.of_parts(inner, size).view(*x.shape[:-1], -1).to(x.dtype)


class _Shape:
    """What all layers have in common; UnsupportedModelError where that is not so, or not in blocks of 32."""

    def __init__(self, decoder: Decoder) -> None:
        q, k, _ = decoder.layers[0].qkv
        head = decoder.layers[0].head_width
        norms = [norm for layer in decoder.layers for norm in _norms(layer).values() if norm is not None]
        eps = {norm_eps(norm) for norm in (*norms, decoder.norm)}
        shapes = {tuple(part.weight.shape for part in _products(layer)) for layer in decoder.layers}
        heads = {layer.head_width for layer in decoder.layers}
        gelu = {is_gelu(layer.activation) for layer in decoder.layers}
        if any(len(values) > 1 for values in (eps, shapes, heads, gelu)):
            raise UnsupportedModelError("with layers of different shapes")
        self._sizes = {
            "layers": len(decoder.layers),
            "width": q.in_features,
            "heads": q.out_features // head,
            "kv_heads": k.out_features // head,
            "head_width": head,
            "mlp_width": decoder.layers[0].gate.out_features,
            "gelu": int(gelu.pop()),
        }
        if any(self._sizes[name] % _BLOCK for name in ("width", "head_width", "mlp_width")) or head > _MOST_HEAD_WIDTH:
            raise UnsupportedModelError(f"with widths that are no multiples of {_BLOCK}")
        self._eps = eps.pop()

    def model(self, layers: ctypes.Array[_Layer], final_norm: Tensor) -> _Model:
        """The structure for the library; it keeps what it points to alive."""
        found = _Model(**self._sizes, eps=self._eps, final_norm=final_norm.data_ptr(), layer=ctypes.addressof(layers))
        found.kept = layers
        return found


class _Weights:
    """A layer's weights in the library's layout, by their names in it; None for those that the family lacks."""

    def __init__(self, layer: DecoderLayer) -> None:
        if any(part.bias is not None for part in (layer.gate, layer.up, layer.down)):
            raise UnsupportedModelError("with biases in its MLP")
        self.kind, self.window, self.scaling, self.cap = layer.kind, layer.window or 0, layer.scaling, layer.cap or 0.0
        gate, up = (_in_bfloat16(part.weight.data) for part in (layer.gate, layer.up))
        qkv_bias, output_bias = bias_of(*layer.qkv), bias_of(layer.output)
        self.tensors: dict[str, Tensor | None] = {
            **{name: None if norm is None else norm_weight(norm) for name, norm in _norms(layer).items()},
            "qkv_bias": None if qkv_bias is None else qkv_bias.float(),
            "output_bias": None if output_bias is None else output_bias.float(),
            "qkv": _panels(torch.cat([_in_bfloat16(part.weight.data) for part in layer.qkv])),
            "output": _panels(_in_bfloat16(layer.output.weight.data)),
            "gate_up": _panels(_in_turn(gate, up)),
            "down": _panels(_in_bfloat16(layer.down.weight.data)),
        }

    def take_over(self, layer: DecoderLayer, library: ctypes.CDLL) -> None:
        """Replace the model's projections and its MLP."""
        start, qkv_bias = 0, self.tensors["qkv_bias"]
        for name, part in zip(("q_proj", "k_proj", "v_proj"), layer.qkv, strict=True):
            rows = slice(start, start + part.out_features)
            start = rows.stop
            panels = self._tensor("qkv")[rows.start // _BLOCK : rows.stop // _BLOCK]
            bias = None if qkv_bias is None else qkv_bias[rows]
            layer.attention.set_submodule(name, PanelLinear(library, panels, bias))
        output = PanelLinear(library, self._tensor("output"), self.tensors["output_bias"])
        layer.attention.set_submodule("o_proj", output)
        down = PanelLinear(library, self._tensor("down"), None)
        mlp = PanelMlp(library, self._tensor("gate_up"), down, gelu=is_gelu(layer.activation))
        layer.layer.set_submodule("mlp", mlp)

    def _tensor(self, name: str) -> Tensor:
        found = self.tensors[name]
        assert found is not None
        return found


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled library, AMX asked for where there is one."""
    able = torch.cpu.get_capabilities()
    if dtype not in _PARTS or not all(able.get(name, False) for name in _AVX512.values()):
        raise UnsupportedModelError(f"in {str(dtype).removeprefix('torch.')} on this CPU")
    try:
        found = compiled(amx=all(able.get(name, False) for name in _AMX.values()))
    except native.NativeUnavailableError as reason:
        raise UnsupportedModelError(f"without the compiled library: {reason}") from reason
    if found.native_request():
        raise UnsupportedModelError("as the system does not give AMX to this process")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    rows, share = (pointer, number, number, number), (number, number)
    found.native_linear.argtypes = (*rows, pointer, pointer, number, pointer, *share)
    found.native_gated.argtypes = (*rows, pointer, number, number, pointer, *share)
    found.native_decode.argtypes = [pointer, number, pointer, number, pointer, number, pointer, number, number, pointer]
    found.native_head.argtypes = [pointer, number, number, pointer, number, pointer, number, number]
    found.native_head.restype = number
    found.native_linear.restype = found.native_gated.restype = None
    found.native_decode.restype = number
    return found


def _shared_out(panels: int, product: Callable[[int, int], T]) -> list[T]:
    """product(first, count) for all panels, by as many threads as torch would use here."""
    threads = min(torch.get_num_threads(), panels)
    if threads == 1:
        return [product(0, panels)]
    ends = [panels * thread // threads for thread in range(threads + 1)]
    others = [_helpers().submit(product, start, end - start) for start, end in pairwise(ends[1:])]
    return [product(0, ends[1]), *(other.result() for other in others)]


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that help with one product. They do nothing in torch, so they need not be kept to one thread there."""
    return ThreadPoolExecutor(os.cpu_count(), "native")


def _panels(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [outputs / 32, inputs / 32, 2, 16 pairs of inputs, 16 outputs, 2]."""
    parts = weight.view(weight.shape[0] // _BLOCK, 2, 16, weight.shape[1] // _BLOCK, 16, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def _in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Half a block of the one's outputs, half a block of the other's: [2 outputs, inputs]."""
    halves = (part.view(-1, _BLOCK // 2, part.shape[1]) for part in (gate, up))
    return torch.stack(tuple(halves), dim=1).flatten(0, 2)


def _fits(weight: Tensor) -> bool:
    """Whether native_head can read the output layer's weight as it lies in memory."""
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.shape[1] % _BLOCK == 0


def _in_bfloat16(weight: Tensor) -> Tensor:
    """The same numbers in bfloat16. Raises UnsupportedModelError where there are others among them."""
    found = weight.bfloat16()
    if weight.dtype == torch.float32 and not torch.equal(found.float(), weight):
        raise UnsupportedModelError("in float32 with weights that are no bfloat16 numbers")
    return found


def _rows_in_parts(x: Tensor) -> Tensor:
    """The rows of x, [..., depth], and some of zeros: [rows rounded up to 32, parts, depth] in bfloat16."""
    rows = x.reshape(-1, x.shape[-1])
    rows = functional.pad(rows, (0, 0, 0, -len(rows) % _BLOCK)).contiguous()
    return rows[:, None] if _PARTS[x.dtype] == 1 else torch.stack(in_parts(rows, _PARTS[x.dtype]), dim=1)


def _products(layer: DecoderLayer) -> tuple[nn.Linear, ...]:
    return *layer.qkv, layer.output, layer.gate, layer.up, layer.down


def _norms(layer: DecoderLayer) -> dict[str, nn.Module | None]:
    """A layer's norms by their names in the library."""
    return {
        "before_norm": layer.before,
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
        "attention_norm": layer.after_attention,
        "mlp_norm": layer.before_mlp,
        "last_norm": layer.after_mlp,
    }


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


if __name__ == "__main__":
    for with_amx in (True, False):
        compiled(amx=with_amx)
