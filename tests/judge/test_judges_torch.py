"""The judges with real parts from end to end: a tiny model on the torch engine behind the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import TorchGenerator
from tests.support.live import live_service
from tests.support.tiny import make_tiny_model, tiny_tokenizer

PROMPT, RESPONSE = "What is 2+2?", "The answer is 4."
ASKED = {"prompt": PROMPT, "response": RESPONSE}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal model on disk."""
    return make_tiny_model(tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model on disk, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored(engine: Any, folder: Path, **settings: Any) -> Any:
    """What the service answers over this engine."""
    with live_service(engine, model=str(folder), **settings) as live:
        return live.http.post("/score", json=ASKED)


def test_a_reward_is_what_the_model_cards_usage_gives(reward: Path) -> None:
    """The logit is that of transformers, fed with the tokenizer's own chat template."""
    result = scored(
        TorchEngine.load(reward, "classify", dtype="float32", device="cpu"), reward, judge="reward-model"
    ).json()

    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    ids = AutoTokenizer.from_pretrained(reward).apply_chat_template(messages, return_tensors="pt", return_dict=False)
    model = LlamaForSequenceClassification.from_pretrained(reward, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = float(model(input_ids=ids).logits[0, 0])
    assert result["log_odds"] == pytest.approx(expected, abs=1e-5)
    assert result["usage"]["prompt_tokens"] == ids.shape[1]


def test_an_expected_grade_is_what_the_whole_softmax_gives(causal: Path) -> None:
    """Grade and mass are those of the digits' probabilities after the prompt that the service says it used."""
    with live_service(
        TorchEngine.load(causal, dtype="float32", device="cpu"), model=str(causal), judge="self-reward"
    ) as live:
        result = live.http.post("/score", json=ASKED).json()
        (template,) = live.http.get("/templates").json()["templates"]

    text = template["layout"].replace("{instruction}", template["instruction"])
    text = text.replace("{prompt}", PROMPT).replace("{response}", RESPONSE)
    tokenizer = AutoTokenizer.from_pretrained(causal)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model = LlamaForCausalLM.from_pretrained(causal, dtype=torch.float32).eval()
    with torch.inference_mode():
        chances = model(input_ids=ids).logits[0, -1].double().softmax(0)
    digits = [float(chances[tokenizer.convert_tokens_to_ids(str(k))]) for k in range(6)]
    assert result["label_mass"] == pytest.approx(sum(digits), rel=1e-4)
    assert result["grade"] == pytest.approx(sum(k * p for k, p in enumerate(digits)) / sum(digits), abs=1e-4)


def test_a_model_that_writes_nonsense_states_no_grade(causal: Path) -> None:
    """Random weights write random text, which is an error and never a score."""
    engine = TorchGenerator.load(causal, dtype="float32", device="cpu")

    answer = scored(
        engine, causal, judge="self-reward", self_reward_mode="parsed", self_reward_tokens=16, self_reward_samples=2
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "unparseable")
    assert "2 attempts" in answer.json()["error"]["message"]
