"""How much memory a training will need, said before it starts: the kernel kills what needs more, without a message.

What is kept for the gradients dominates: some numbers for each layer and token of a pass. The factors were measured on
Llama and Qwen2 models. They count what is in use, so freed blocks must not stay with the process: `return_blocks`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from client.runtime.memory import allocator
from trainer.run.model_files import model_size
from trainer.tuning.judge.settings import JudgeSettings

# glibc's names in malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
# Python with torch, transformers and PEFT.
_PROCESS: Final = 0.7e9
# Bytes that a layer keeps for each token in bf16: so many times its hidden size, plus its MLP's.
_PER_HIDDEN: Final = 24
_PER_INTERMEDIATE: Final = 8
_AT_A_TIME: Final = 4
# For each trained number: copy and gradient in 16 bits, weight, gradient and AdamW's two moments in fp32.
_PER_TRAINED: Final = 20
# Bytes for each number of a matrix in NF4: 4 bits, and the blocks' scales.
_NF4: Final = 0.55


def return_blocks() -> None:
    """Have glibc return each freed block of 1 MiB or more to the system.

    It keeps them otherwise, the more since the service's engine has run in this process, and fills the gaps badly: a
    training of SmolLM2-135M took 3.4 GiB in place of 2.5 after two steps, and 5.2 after thirteen. Returned and
    requested again, each page costs a fault: 18% of the time.
    """
    mallopt = allocator("mallopt")
    if mallopt is not None:  # another C library does as it likes
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)


def needed_bytes(folder: Path, settings: JudgeSettings, longest: int, dtype_bytes: int) -> int | None:
    """An estimate; None for a model whose files do not tell its size. `longest`: tokens of the longest label."""
    size = model_size(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    shape = [config.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    if size is None or None in shape:
        return None
    layers, hidden, intermediate = map(int, shape)
    per_layer = (_PER_HIDDEN * hidden + _PER_INTERMEDIATE * intermediate) * dtype_bytes // 2
    # With checkpointing each layer keeps its input alone, and a few layers at a time all of it.
    checkpointed = dtype_bytes * hidden * layers + _AT_A_TIME * per_layer
    kept = checkpointed if settings.gradient_checkpointing else layers * per_layer
    tokens = max(settings.pass_tokens, longest)
    tied = config.get("tie_word_embeddings", True)
    embeddings = int(config.get("vocab_size", 0)) * hidden * (1 if tied else 2)
    layer_bytes = _NF4 if settings.method == "qlora" else dtype_bytes
    weights = dtype_bytes * embeddings + layer_bytes * (size.parameters - embeddings)
    full = settings.method == "full"
    trained = size.parameters - embeddings if full else size.lora_parameters(settings.rank)
    return round(_PROCESS + weights + _PER_TRAINED * trained + tokens * kept)
