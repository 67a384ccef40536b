"""Batched generation gives each row the model's own tokens, and draws them with the probabilities of softmax."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from service.engine.torch import decoding
from service.engine.torch.decoding import SamplingParams, draw_tokens, generate
from tests.support.tiny import greedy_tokens

# What the service installs and the trainer does not.
SERVER_PACKAGES = ["fastapi", "prometheus_client", "pydantic_settings", "redis", "structlog", "uvicorn"]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "full attention": lambda: transformers.LlamaConfig(**SIZES),
    "sliding window": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "windows and soft caps": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
    "states of convolutions": lambda: transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}
PROMPTS = [list(range(3, 3 + length)) for length in (4, 9, 21)]


def random_model(kind: str) -> transformers.PreTrainedModel:
    """A model with this kind of cache."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_cache_gives_the_models_own_tokens(kind: str) -> None:
    """Padding, repeated prompts and rows that leave change nothing: texts are those of transformers' own generate."""
    model, stops = random_model(kind), tuple(range(0, 128, 8))

    texts = generate(model, PROMPTS, [[0, 1]] * 3, SamplingParams(12, stops))

    for prompt, (first, second) in zip(PROMPTS, texts, strict=True):
        own = greedy_tokens(model, prompt, 12, eos_token_id=list(stops))
        assert list(first.token_ids) == [token for token in own if token not in stops]
        assert (first.token_ids, first.ended) == (second.token_ids, second.ended)


class SmallMemory(transformers.LlamaForCausalLM):
    """A model that runs out of memory when a batch has more than `rows` rows."""

    rows = 1

    def forward(self, input_ids: Any, past_key_values: Any, logits_to_keep: Any, **options: Any) -> Any:
        """LlamaForCausalLM's."""
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError
        return super().forward(input_ids, past_key_values=past_key_values, logits_to_keep=logits_to_keep, **options)


def test_a_batch_that_does_not_fit_the_memory_is_halved() -> None:
    """First by prompts, then by seeds; the texts stay the same, and a single text that does not fit is an error."""
    torch.manual_seed(0)
    model, params = SmallMemory(transformers.LlamaConfig(**SIZES)).eval(), SamplingParams(6, temperature=1.0)
    seeds = [[1, 2], [3, 4], [5, 6]]

    halved = [[text.token_ids for text in texts] for texts in generate(model, PROMPTS, seeds, params)]

    model.rows = 6
    assert halved == [[text.token_ids for text in texts] for texts in generate(model, PROMPTS, seeds, params)]
    model.rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, PROMPTS[:1], [[1]], params)


def test_tokens_are_drawn_by_their_probability() -> None:
    """Over evenly spread uniform numbers each token comes up as often as softmax says."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    uniforms = (torch.arange(10_000) + 0.5) / 10_000

    tokens = draw_tokens(logits.expand(10_000, -1), uniforms, SamplingParams(1, temperature=0.5))

    shares = torch.bincount(tokens, minlength=4) / 10_000
    assert torch.allclose(shares, (logits / 0.5).softmax(0), atol=2e-4)


def test_top_p_cuts_off_the_tail() -> None:
    """Only the likeliest tokens that together hold top_p of the probability are drawn."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000

    tokens = draw_tokens(logits.expand(1000, -1), uniforms, SamplingParams(1, temperature=1.0, top_p=0.7))

    assert set(tokens.tolist()) == {0, 1}


def test_a_text_depends_on_its_own_seed_alone() -> None:
    """Among other seeds and prompts a seed draws what it draws alone, and other seeds draw otherwise."""
    model, params = random_model("full attention"), SamplingParams(8, temperature=1.0)

    (_, (second, third)) = generate(model, PROMPTS[:2], [[7, 8], [8, 9]], params)

    ((alone,),) = generate(model, PROMPTS[1:2], [[8]], params)
    assert second.token_ids == alone.token_ids != third.token_ids


@pytest.mark.parametrize("module", [decoding.__name__, "service.engine.torch.loading", "trainer.sample"])
def test_the_trainer_needs_no_package_of_the_server(module: str) -> None:
    """What trainer and judge share imports only what the trainer's extra installs."""
    program = f"import sys; sys.modules.update(dict.fromkeys({SERVER_PACKAGES})); import {module}"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_step_tells_how_many_tokens_it_drew() -> None:
    """Together as many as the texts have and the tokens that ended them: progress can be shown within a batch."""
    model, told = random_model("full attention"), list[int]()
    params = SamplingParams(8, stop_ids=tuple(range(0, 64, 4)), temperature=1.0)

    texts = [text for own in generate(model, PROMPTS, [[0, 1]] * 3, params, told.append) for text in own]

    assert told[0] == len(texts)
    assert sum(told) == sum(len(text.token_ids) + text.ended for text in texts)
