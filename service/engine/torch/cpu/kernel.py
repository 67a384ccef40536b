"""The packed prefill and the output layer in C++ (prefill.cpp), on CPUs with AMX, or with AVX-512's bfloat16 alone.

The prefill computes what packed_forward.py specifies, three times as fast, and rounds less often: torch lays weights
out anew in every product, and half of its time goes into elementwise work and copies. It runs in bfloat16, or in
float32 if the weights are bfloat16 numbers, as published ones mostly are.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import cached_property
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

from service.engine.torch.cpu.layout import BLOCK, LayerWeights, common_shape, in_bf16, layer_weights, norm_weight
from service.engine.torch.cpu.library import (
    FORMS,
    TERMS,
    LayerStruct,
    Library,
    ModelStruct,
    SegmentStruct,
    library_file,
    loaded,
)
from service.engine.torch.decoder import Decoder
from service.engine.torch.heads import softcapped, split_into_bf16
from service.engine.torch.packed_forward import Prefill, first_of_each
from service.engine.torch.packing import PackedBatch

_HEAD_TERMS: Final = 3  # three bf16 terms make an fp32 state exactly, and so the output layer's products
_HEAD_STATES: Final = 20  # for one pass over the output layer's weight: with AMX, two panels of kPanelStates


class CompiledPrefill:
    """`Prefill` in C++, on a copy of the weights in its own layout; the model's own may be freed.

    Raises UnsupportedModelError. The library is loaded at the first batch, so that a child process can try it first.
    """

    divides_batches = True

    def __init__(self, decoder: Decoder, library: Library) -> None:
        self._library = library
        self._terms = TERMS[decoder.dtype]
        self._embed = decoder.embed
        self._shape = common_shape(decoder)
        self._ropes = decoder.ropes(torch.float32)
        self._layers = [layer_weights(layer, self._ropes[layer.rope].order) for layer in decoder.layers]
        self._final_norm = norm_weight(decoder.norm)
        self._model: ModelStruct | None = None
        self._layer_structs: ctypes.Array[LayerStruct]

    def shallow(self) -> Prefill:
        """See Prefill."""
        twin = copy(self)
        twin._layers = first_of_each(self._layers, lambda layer: (layer.rope, layer.window))
        twin._model = None
        return twin

    def prepare(self, longest: int) -> None:
        """See Prefill."""
        replaced = [rope.grow(longest) for rope in self._ropes.values()]
        if self._model is None or any(replaced):  # the structs hold the tables' addresses
            self._layer_structs = (LayerStruct * len(self._layers))(*map(self._layer_struct, self._layers))
            self._model = ModelStruct(
                **self._shape,
                layers=len(self._layers),
                final_norm=self._final_norm.data_ptr(),
                layer=ctypes.addressof(self._layer_structs),
            )

    @torch.inference_mode()
    def last_hidden_states(self, batch: PackedBatch, threads: int) -> Tensor:
        """See Prefill. Raises MemoryError."""
        ids = torch.tensor([token for segment in batch.segments for token in segment.token_ids])
        embedded = self._embed(ids).float().contiguous()
        chains = [(ctypes.c_int64 * len(segment.chain))(*segment.chain) for segment in batch.segments]
        segments = (SegmentStruct * len(batch.segments))(
            *(
                SegmentStruct(s.start, len(s.token_ids), s.position, len(chain), ctypes.addressof(chain))
                for s, chain in zip(batch.segments, chains, strict=True)
            )
        )
        last = (ctypes.c_int64 * len(batch.last_token))(*batch.last_token.values())
        states = torch.empty(len(last), embedded.shape[1], dtype=torch.float32)
        assert self._model is not None, "prepare() comes first"
        out_of_memory = loaded(self._library).prefill(
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

    def _layer_struct(self, layer: LayerWeights) -> LayerStruct:
        rope = self._ropes[layer.rope]
        return LayerStruct(
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

    max_states: Final = _HEAD_STATES

    def __init__(self, linear: nn.Linear, softcap: float | None, library: Library) -> None:
        self._library, self._softcap = library, softcap
        self._weight = in_bf16(linear.weight.data).contiguous()
        self._bias = None if linear.bias is None else linear.bias.data.float()

    @torch.inference_mode()
    def __call__(self, states: Tensor, threads: int) -> Tensor:
        """[prompts, hidden_size] in fp32 -> [prompts, vocabulary] in fp32. Raises MemoryError."""
        terms = torch.stack(split_into_bf16(states, _HEAD_TERMS), dim=1)
        logits = torch.empty(len(states), len(self._weight), dtype=torch.float32)
        run = loaded(self._library).output_layer
        arguments = self._weight.data_ptr(), *self._weight.shape, terms.data_ptr(), len(states), logits.data_ptr()
        blocks = -(-len(self._weight) // BLOCK)
        ends = [blocks * thread // threads for thread in range(threads + 1)]
        others = [self._helpers.submit(run, *arguments, start, end - start) for start, end in pairwise(ends[1:])]
        if any([run(*arguments, 0, ends[1]), *(other.result() for other in others)]):
            raise MemoryError("no memory for the output layer")
        return softcapped(logits if self._bias is None else logits + self._bias, self._softcap)

    @cached_property
    def _helpers(self) -> ThreadPoolExecutor:
        """Threads for the rest of the vocabulary; they use no torch, so its number of threads does not matter here.

        Python's, not OpenMP's: a second OpenMP runtime's threads and torch's would spin for each other. Made at the
        first use, as threads do not survive the fork of the check.
        """
        return ThreadPoolExecutor(os.cpu_count(), "output")


if __name__ == "__main__":
    for form in FORMS:
        library_file(form)
