"""The packed forward in C++ (prefill.cpp), on CPUs with AMX, or with AVX-512's bfloat16 alone.

It does what tiled_decoder.py does with torch's operations, three times as fast, and rounds less often. In bfloat16, or
in float32 where the weights are bfloat16 numbers, as published ones mostly are: what they are multiplied by is then the
sum of two numbers in bfloat16, so that a product is off by 2^-18 of its size at most.

Weights are held in its layout only: the layers of native_panels.py take the place of the model's own, so that what the
model itself still does, such as writing text, goes on working.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from service.engine.torch.cpu import build
from service.engine.torch.cpu.panels import (
    BLOCK,
    PARTS,
    PanelLinear,
    PanelMlp,
    address,
    in_bfloat16,
    in_turn,
    panels_of,
    shared_out,
)
from service.engine.torch.families import (
    Decoder,
    DecoderLayer,
    UnsupportedModelError,
    bias_of,
    is_gelu,
    norm_eps,
    norm_weight,
)
from service.engine.torch.heads import LastTokenHead, in_parts
from service.engine.torch.packing import Pack

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
_HEAD_STATES: Final = 20  # that the output layer's weight is read for at once: with AMX, two panels of kStates
_MOST_HEAD_WIDTH: Final = 1024  # of rotate in prefill.cpp


def compiled(*, amx: bool) -> ctypes.CDLL:
    """The library as it is, compiled where that has not been done yet. Raises NativeUnavailableError."""
    return build.library(_SOURCE, tuple(f"-m{flag}" for flag in (_AVX512 | _AMX if amx else _AVX512)))


class _Layer(ctypes.Structure):
    """Layer in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("before_norm", "qkv_bias", "q_norm", "k_norm", "output_bias")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "last_norm")),
        *((name, ctypes.c_void_p) for name in ("qkv", "output", "gate_up", "down", "cos", "sin")),
        ("window", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


class _Model(ctypes.Structure):
    """Model in prefill.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_width", "mlp_width", "gelu")),
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


class NativeDecoder:
    """Runs packs through copies of the decoder's weights. Raises UnsupportedModelError.

    `take_over` frees the model's own weights.
    """

    head_states: Final = _HEAD_STATES
    divides_packs: Final = True

    def __init__(self, decoder: Decoder, head: LastTokenHead) -> None:
        self._library = _library(decoder.dtype)
        self.name = "amx" if _has_amx() else "avx512"
        self._parts = PARTS[decoder.dtype]
        self._decoder: Decoder | None = decoder
        self._embed = decoder.embed
        self._shape = _Shape(decoder)
        self._layers = [_Weights(layer) for layer in decoder.layers]
        self._final_norm = norm_weight(decoder.norm)
        self._ropes = decoder.ropes(torch.float32)
        self._model = _Model()
        self._head = head
        self._head_weight = in_bfloat16(head.weight.data).contiguous()

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
    def logits(self, states: Tensor, threads: int) -> Tensor:
        """[items, width] -> [items, vocabulary] in fp32.

        Each state is the sum of three numbers in bfloat16, so that its products with bfloat16 weights are exact.
        """
        weight, bias = self._head_weight, self._head.bias
        parts = torch.stack(in_parts(states, 3), dim=1)
        # In rows, as what is summed over them later depends on how they lie in memory.
        logits = torch.empty(len(states), len(weight))
        fixed = weight.data_ptr(), len(weight), weight.shape[1], parts.data_ptr(), len(states), logits.data_ptr()
        if any(shared_out(-(-len(weight) // BLOCK), threads, partial(self._library.native_head, *fixed))):
            raise MemoryError("no memory for the output layer")
        return logits if bias is None else logits + bias.float()

    def take_over(self) -> None:
        """Let the model's layers, and its output layer, use these weights; the memory of its own is then free."""
        if self._decoder is not None:
            for weights, layer in zip(self._layers, self._decoder.layers, strict=True):
                weights.take_over(layer, self._library)
            self._decoder = None
        if self._head.weight.dtype != self._head_weight.dtype:
            self._head.weight = nn.Parameter(self._head_weight, requires_grad=False)
        self._head.compiled = lambda states: self.logits(states, torch.get_num_threads())

    def _described(self, layer: _Weights) -> _Layer:
        rope = self._ropes[layer.kind if layer.kind in self._ropes else None]
        return _Layer(
            **{name: address(tensor) for name, tensor in layer.tensors.items()},
            cos=rope.cos.data_ptr(),
            sin=rope.sin.data_ptr(),
            window=layer.window,
            scaling=layer.scaling,
            cap=layer.cap,
        )


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
        if any(self._sizes[name] % BLOCK for name in ("width", "head_width", "mlp_width")) or head > _MOST_HEAD_WIDTH:
            raise UnsupportedModelError(f"with widths that are no multiples of {BLOCK}")
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
        gate, up = (in_bfloat16(part.weight.data) for part in (layer.gate, layer.up))
        qkv_bias, output_bias = bias_of(*layer.qkv), bias_of(layer.output)
        self.tensors: dict[str, Tensor | None] = {
            **{name: None if norm is None else norm_weight(norm) for name, norm in _norms(layer).items()},
            "qkv_bias": None if qkv_bias is None else qkv_bias.float(),
            "output_bias": None if output_bias is None else output_bias.float(),
            "qkv": panels_of(torch.cat([in_bfloat16(part.weight.data) for part in layer.qkv])),
            "output": panels_of(in_bfloat16(layer.output.weight.data)),
            "gate_up": panels_of(in_turn(gate, up)),
            "down": panels_of(in_bfloat16(layer.down.weight.data)),
        }

    def take_over(self, layer: DecoderLayer, library: ctypes.CDLL) -> None:
        """Replace the model's projections and its MLP."""
        start, qkv_bias = 0, self.tensors["qkv_bias"]
        for name, part in zip(("q_proj", "k_proj", "v_proj"), layer.qkv, strict=True):
            rows = slice(start, start + part.out_features)
            start = rows.stop
            panels = self._tensor("qkv")[rows.start // BLOCK : rows.stop // BLOCK]
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


def _has_amx() -> bool:
    able = torch.cpu.get_capabilities()
    return all(able.get(name, False) for name in _AMX.values())


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled library, AMX asked for where there is one."""
    able = torch.cpu.get_capabilities()
    if dtype not in PARTS or not all(able.get(name, False) for name in _AVX512.values()):
        raise UnsupportedModelError(f"in {str(dtype).removeprefix('torch.')} on this CPU")
    try:
        found = compiled(amx=_has_amx())
    except build.NativeUnavailableError as reason:
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


if __name__ == "__main__":
    for with_amx in (True, False):
        compiled(amx=with_amx)
