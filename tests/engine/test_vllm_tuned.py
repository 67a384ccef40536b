"""A judge that was trained on labels, served by vLLM: merged, and as an adapter, with the trainer's own numbers.

`make test-vllm` runs these; they need vLLM, and PEFT for the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from service.engine.contract import DType, LabelLogprobs
from service.engine.vllm.config import Lora, VllmOptions
from service.engine.vllm.engine import VllmEngine
from service.judge.scoring import label_judgement
from tests.engine.vllm import VLLM_MARKS
from tests.trainer.judge.makers import examples_of, toy_labels, toy_settings, train_toy
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.readings import read_held_out
from trainer.tuning.rounding import merge_and_measure

pytestmark = VLLM_MARKS
# bf16 rounds each activation to 8 bits, every engine at other places.
OFF: dict[DType, float] = {"float32": 1e-3, "bfloat16": 0.1}


@dataclass(frozen=True)
class Tuned:
    """A base, the run's folder with adapter/ and merged/, and labels held out."""

    base: Path
    folder: Path
    held_out: Sequence[Example]

    def own(self, dtype: DType, model: Path | None = None) -> list[float]:
        """What the trainer reads of them, by default in the merged model: the log-odds of each answer."""
        file = self.folder / f"{'after' if model is None else 'before'}-{dtype}.jsonl"
        rows = read_held_out(
            model or self.folder / "merged", self.held_out, toy_settings(dtype=dtype), file, lambda _: None
        )
        return [log_odds for row in rows for log_odds in row.log_odds]

    def served(self, model: Path, dtype: DType, lora: Lora | None = None) -> list[float]:
        """What vLLM says of them."""
        options = VllmOptions(task="labels", max_tokens=512, dtype=dtype, lora=lora, extra={"enforce_eager": True})
        engine = VllmEngine.load(model, options)
        prompts = [prompt for example in self.held_out for prompt in example.prompts]
        answers = engine.run(prompts)
        engine.close()
        question = self.held_out[0].template.question
        assert question is not None
        return [
            label_judgement(question, answer, prompt.label_ids, prompt.spellings).log_odds
            for prompt, answer in zip(prompts, answers, strict=True)
            if isinstance(answer, LabelLogprobs)
        ]


@pytest.fixture(scope="module")
def tuned(vllm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """The random model, trained on a few labels."""
    folder = tmp_path_factory.mktemp("tuned")
    train_toy(vllm_model, examples_of(vllm_model, toy_labels(24)), folder, rank=8)
    merge_and_measure(folder / "adapter", folder / "merged", str(vllm_model), "bfloat16")
    return Tuned(vllm_model, folder, examples_of(vllm_model, toy_labels(30)[24:]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_merged_judge_has_the_trainers_numbers(tuned: Tuned, dtype: DType) -> None:
    """vLLM gives the merged model's log-odds as the trainer read them."""
    assert tuned.served(tuned.folder / "merged", dtype) == pytest.approx(tuned.own(dtype), abs=OFF[dtype])


def test_the_adapter_has_the_merged_judges_numbers(tuned: Tuned) -> None:
    """Served by `--lora` on the base as it was, training has the same effect as in the merged model."""
    bare, own = tuned.own("float32", tuned.base), tuned.own("float32")

    adapted = tuned.served(tuned.base, "float32", Lora("judge", tuned.folder / "adapter"))

    effect = max(abs(one - other) for one, other in zip(own, bare, strict=True))
    assert effect > 1
    assert adapted == pytest.approx(own, abs=0.02 * effect)
