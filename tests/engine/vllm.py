"""What tests with a real vLLM share: their marks, and the shape of a random model that its CPU kernels can run."""

from __future__ import annotations

from typing import Any, Final

import pytest

VLLM_MARKS: Final = [
    pytest.mark.vllm,
    pytest.mark.timeout(1800),
    # vLLM's imports emit many warnings that are not ours.
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("modest"),
]
START_SECONDS: Final = 900.0
VOCABULARY: Final = 600
SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
