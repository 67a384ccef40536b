"""Random causal models on disk, items that share prefixes, and what a model's own forward says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
import torch
import transformers

from service.engine.contract import LabelLogprobs, ScoreItem
from tests.ladder.families import BASE, VOCABULARY

SMALL: Final = {**BASE, "num_hidden_layers": 3}
CONFIGS: Final[dict[str, Callable[[], Any]]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama with biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen2 sliding": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=20),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=32, sliding_window=20, final_logit_softcapping=5.0, attn_logit_softcapping=4.0
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=32, sliding_window=20, sliding_window_pattern=2),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def write_model(folder: Path, config: Any, *, rounded: bool = False) -> Any:
    """A random model, written to the folder and read back in fp32; `rounded`: its weights are bf16 numbers."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    (model.bfloat16().float() if rounded else model).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def make_model(folder: Path, kind: str, *, rounded: bool = False, **shape: int) -> Any:
    """write_model() for one of CONFIGS, with changes of its shape."""
    config = CONFIGS[kind]()
    config.update(shape)
    return write_model(folder, config, rounded=rounded)


def write_with_broken_embedding(model: Any, folder: Path, token_id: int) -> None:
    """Write the model with NaN as the embedding of this token, and an output layer of its own without it."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.get_input_embeddings().weight.data[token_id] = float("nan")
    model.save_pretrained(folder)


def random_ids(rng: Random, least: int, most: int) -> list[int]:
    """From `least` to `most` ids, none of a special token."""
    return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(least, most))]


def prefix_items(prompts: int = 4, answers: int = 3) -> list[ScoreItem]:
    """Prompts behind one head, each with some answers: 10 to 170 tokens, cut after the head and after the prompt."""
    rng = Random(0)
    head = random_ids(rng, 7, 7)
    shared = [head + random_ids(rng, 1, 80) for _ in range(prompts)]
    return [ScoreItem(p + random_ids(rng, 2, 83), (5, 9), (7, len(p))) for p in shared for _ in range(answers)]


@torch.no_grad()
def own_logprobs(model: Any, items: Sequence[ScoreItem]) -> list[list[float]]:
    """What the model's own forward says of each item's labels."""
    rows = [model(torch.tensor([item.token_ids])).logits[0, -1].float().log_softmax(-1) for item in items]
    return [[row[label].item() for label in item.label_ids] for row, item in zip(rows, items, strict=True)]


def logprobs(answers: Sequence[LabelLogprobs]) -> list[tuple[float, ...]]:
    """The answers' numbers, to be compared with near() or bit by bit."""
    return [answer.logprobs for answer in answers]


def near(expected: Sequence[Sequence[float]], tolerance: float) -> list[Any]:
    """Rows that may differ from these by the tolerance."""
    return [pytest.approx(row, abs=tolerance) for row in expected]
