"""Log-odds and gradients of packed prompts: those of the model's own forward, whatever is packed with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.torch.packing import PackedBatch
from service.prompts.builder import JudgePrompt
from tests.ladder.families import COMPILED, PACKED, SINGLE, build
from tests.support.causal import prefix_items
from tests.support.reference import Reference
from tests.trainer.judge.makers import examples_of, toy_labels, toy_settings
from trainer.tuning.judge.loss import LossWeights, loss_of
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.reader import OwnReader, PackedReader, choose_reader, packing_problem, passes, read_prompts
from trainer.tuning.judge.trainable import Trainable


def gradients(adapted: Trainable, reader: Any, examples: list[Example]) -> list[torch.Tensor]:
    """The gradients of the loss with this reader."""
    prompts = [prompt for example in examples for prompt in example.prompts]
    loss_of(examples, read_prompts(reader, prompts), LossWeights(1.0, 0.5, 0.25)).loss.backward()
    adapted.collect_gradients()
    found = [weight.grad for weight in adapted.weights if weight.grad is not None]
    for weight in adapted.weights:
        weight.grad = None
    return found


def test_log_odds_are_those_of_the_scoring_rule(tiny_model: Path) -> None:
    """The packed reader's numbers are those of a second implementation of the rule, prompt by prompt."""
    examples = examples_of(tiny_model, toy_labels(3))
    prompts = [prompt for example in examples for prompt in example.prompts]
    reference = Reference(tiny_model)
    texts = [reference.tokenizer.decode(prompt.token_ids) for prompt in prompts]
    expected = [reference.judge(text, "Yes", "No") for text in texts]
    adapted = Trainable.load(tiny_model, toy_settings(), 512)

    readings = read_prompts(PackedReader(adapted.base), prompts)

    assert readings.log_odds.tolist() == pytest.approx([one.log_odds for one in expected], abs=1e-4)
    assert readings.log_mass.exp().tolist() == pytest.approx([one.label_mass for one in expected], rel=1e-4)


def test_gradients_of_packed_prompts_are_the_models_own(tiny_model: Path) -> None:
    """Shared prefixes, attention and fused LoRA layers give the gradients of plain forwards with PEFT's own layers."""
    examples = examples_of(tiny_model, toy_labels(3))
    adapted = Trainable.load(tiny_model, toy_settings(), 512)
    with torch.no_grad():  # with B at 0, A would get no gradient
        for weight in adapted.weights:
            weight.normal_(std=0.1)
    adapted.refresh()
    own = OwnReader(adapted.base)
    packed = gradients(adapted, PackedReader(adapted.base), examples)
    own.activate()
    for module in adapted.base.modules():
        module.__dict__.pop("forward", None)  # PEFT's own layers

    expected = gradients(adapted, own, examples)

    assert len(packed) == len(expected) == len(adapted.weights)
    for ours, theirs in zip(packed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", COMPILED | PACKED | SINGLE)
def test_every_family_gets_its_own_logits(name: str) -> None:
    """Packed or, where a family's layers do more than attention, prompt by prompt: the numbers are the model's own.

    Windows, rotary positions and what is done to logits count; the prompts share prefixes.
    """
    model = build(name)
    prompts = [JudgePrompt(i.token_ids, i.label_ids, i.boundaries, (1, 1)) for i in prefix_items(2, 3)]
    with torch.inference_mode():
        expected = OwnReader(model).logits(prompts)

        reader = choose_reader(model, prompts, packing_problem(model, 200))

        torch.testing.assert_close(reader.logits(prompts), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert reader.packs or name not in ("llama", "qwen2", "qwen3", "mistral")


def test_shared_prompts_are_computed_once(tiny_model: Path) -> None:
    """A pass holds more tokens of prompts than it computes, and never more computed ones than allowed."""
    examples = examples_of(tiny_model, toy_labels(6))

    groups = list(passes(examples, 300))

    computed = [PackedBatch().added_tokens(p for e in group for p in e.prompts) for group in groups]
    assert sorted(example.label.id for group in groups for example in group) == list("012345")
    assert len(groups) > 1
    assert max(computed) <= 300
    assert sum(computed) < sum(example.tokens for example in examples)


def test_a_model_that_cannot_be_packed_is_read_prompt_by_prompt(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If packing gives other logits than the model itself, the model's own forward is taken, and stderr says so."""
    examples = examples_of(tiny_model, toy_labels(2))
    prompts = [prompt for example in examples for prompt in example.prompts]
    adapted = Trainable.load(tiny_model, toy_settings(), 512)
    honest = PackedReader.logits
    monkeypatch.setattr(PackedReader, "logits", lambda self, prompts: honest(self, prompts).roll(1, dims=1))

    reader = choose_reader(adapted.base, prompts, None)

    assert not reader.packs
    assert "prompts are read one at a time" in capsys.readouterr().err
    assert read_prompts(reader, prompts).log_odds.isfinite().all()
