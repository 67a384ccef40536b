"""Compile every kernel of triton_kernels.py as a decoder of some shapes starts it, for a GPU that need not be there.

    python -m tests.compile_kernels 90

The argument is the compute capability. Writes a line of JSON for each kernel: its name, and the shared memory it takes.
Nothing is run. Triton's interpreter must be off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from service.engine import triton_kernels
from service.engine.decoder_layers import read_decoder
from service.engine.torch_head import LastTokenHead
from service.engine.triton_decoder import TritonDecoder
from tests.test_torch_packed import CONFIGS

# Bytes that a block of threads can have, by compute capability.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
# Widths of Llama 8B, SmolLM2-135M and Gemma 2B.
SHAPES: tuple[dict[str, Any], ...] = (
    {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8},
    {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    {
        "hidden_size": 2048,
        "intermediate_size": 16_384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
    },
)


class Driver:
    """What Triton asks of a driver before it has anything to start."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """Nothing is started on it."""
        return 0


def reader_of(model: Any) -> TritonDecoder:
    """The model's decoder, tried."""
    return TritonDecoder(read_decoder(model), LastTokenHead(model.get_output_embeddings()))


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; what fails raises."""
    capability = int((argv or sys.argv[1:])[0])
    driver.set_active(Driver(capability))
    triton_kernels._device = lambda _: (100, SHARED_MEMORY[capability])
    told: set[str] = set()
    compile_only = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, **options: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, **(options | {"warmup": True}))
        line = json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared})
        if kernel.hash not in told:
            told.add(kernel.hash)
            sys.stdout.write(line + "\n")
        return kernel

    JITFunction.run = run
    small = {"num_hidden_layers": 1, "vocab_size": 5000}
    for shape in SHAPES:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **shape)).bfloat16()
        reader_of(model)
    for kind in ("gemma2", "qwen3"):
        for dtype in (torch.float16, torch.float32):
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype)
            reader_of(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
