"""The vLLM engine against the torch engine, and starts that must fail.

`make test-vllm` runs these; they need vLLM and are not skipped without it. The models are a random one made on the spot
and SmolLM2, fetched once into the user's cache; JUDGE_TEST_PAIRS says how many samples it reads.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bench.vllm_agreement import compare, judge_prompts, side, torch_loader, vllm_loader
from client.errors import ErrorCode
from service.engine.contract import ClassifyItem, Generated, GenerateItem, ItemFailure, LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import TorchGenerator
from service.engine.vllm.config import Lora, VllmOptions, VllmStartError
from service.engine.vllm.engine import VllmEngine
from service.models.resolve import resolve
from tests.engine.vllm import SHAPE, VLLM_MARKS, VOCABULARY
from tests.support.reference import rewardbench_pairs

pytestmark = VLLM_MARKS

SMOLLM = "smollm2-135m-instruct"
PAIRS = int(os.environ.get("JUDGE_TEST_PAIRS", "8"))
# Compiling graphs takes a minute at each start and changes nothing that is tested here.
EAGER = {"enforce_eager": True}


@pytest.fixture(scope="module")
def engine(vllm_model: Path) -> Iterator[VllmEngine]:
    """vLLM with the random model in fp32; prompts of up to 255 tokens."""
    engine = VllmEngine.load(vllm_model, VllmOptions(task="labels", max_tokens=255, dtype="float32", extra=EAGER))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def writer(vllm_model: Path) -> Iterator[VllmEngine]:
    """The same for text; prompt and text together have up to 255 tokens."""
    engine = VllmEngine.load(vllm_model, VllmOptions(task="generate", max_tokens=255, dtype="float32", extra=EAGER))
    yield engine
    engine.close()


def items(count: int, longest: int = 255) -> list[ScoreItem]:
    """Prompts of different lengths up to the longest, with one to three labels."""
    lengths = [1 + (longest - 1) * number // max(1, count - 1) for number in range(count)]
    return [
        ScoreItem([(7 * place + 13 * number) % VOCABULARY for place in range(length)], (5, 0, 77)[: 1 + number % 3])
        for number, length in enumerate(lengths)
    ]


def test_labels_have_the_torch_engines_probabilities(engine: VllmEngine, torch_engine: TorchEngine) -> None:
    """In fp32 to 1e-3, including the longest prompt; the most likely token is the same."""
    work = items(17)

    ours, theirs = engine.run(work), torch_engine.run(work)

    assert [answer.argmax_id for answer in answered(ours)] == [answer.argmax_id for answer in theirs]
    for one, other in zip(answered(ours), theirs, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def answered(answers: list[LabelLogprobs | ItemFailure]) -> list[LabelLogprobs]:
    """The answers, none of which may be a failure."""
    logprobs = [answer for answer in answers if isinstance(answer, LabelLogprobs)]
    assert len(logprobs) == len(answers)
    return logprobs


def test_a_cached_prefix_is_not_computed_again(engine: VllmEngine) -> None:
    """The answer says so, and its numbers stay."""
    item = ScoreItem([3, 1, *range(200, 450)], (5, 6))

    first, second = answered(engine.run([item]) + engine.run([item]))

    assert (first.cached_tokens, second.cached_tokens) == (0, 128)
    assert second.logprobs == pytest.approx(first.logprobs, abs=1e-4)

    engine.reset_prefix_cache()
    (third,) = answered(engine.run([item]))
    assert third.cached_tokens == 0


@pytest.mark.parametrize("ids", [[], [1] * 256, [VOCABULARY], [-1]])
def test_items_outside_the_contract_are_refused(engine: VllmEngine, ids: list[int]) -> None:
    """Empty, longer than the limit, outside the vocabulary: before vLLM sees them."""
    with pytest.raises(ValueError, match=r"reads 1 to|vocabulary"):
        engine.run([ScoreItem(ids, (5,))])


def test_an_item_past_its_deadline_fails_alone(engine: VllmEngine) -> None:
    """Its neighbours are answered, and the deadlines hold for one call only."""
    work = items(3)
    engine.set_deadlines([time.monotonic() + 60, time.monotonic() - 1, time.monotonic() + 60])

    one, late, other = engine.run(work)

    assert isinstance(late, ItemFailure)
    assert late.code is ErrorCode.DEADLINE_EXCEEDED
    assert len(answered([one, other])) == 2
    assert len(answered(engine.run(work))) == 3


@pytest.mark.parametrize("count", [10, 128, 255])
def test_many_labels_have_the_torch_engines_probabilities(
    engine: VllmEngine, torch_engine: TorchEngine, count: int
) -> None:
    """A scale of ten and a choice of 255, which is more ids than vLLM takes with one request."""
    item = ScoreItem(list(range(200, 250)), tuple(range(599, 599 - count, -1)))

    (ours,), (theirs,) = answered(engine.run([item])), torch_engine.run([item])

    assert ours.argmax_id == theirs.argmax_id
    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def test_a_text_is_stopped_at_its_deadline(writer: VllmEngine) -> None:
    """vLLM aborts the request, so that the next batch does not wait for it."""
    item = GenerateItem([1, 2, 3], 250, (), temperature=1.0)
    writer.set_deadlines([time.monotonic() + 0.05])

    (late,) = writer.run([item])

    assert isinstance(late, ItemFailure)
    assert writer.unfinished() == 0


def test_a_seed_decides_the_text(writer: VllmEngine) -> None:
    """The same seed generates the same text, another one another."""
    texts = writer.run([GenerateItem([1, 2, 3], 20, (), temperature=1.0, seed=seed) for seed in (1, 1, 2**62)])

    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_greedy_texts_are_the_torch_engines(writer: VllmEngine, vllm_model: Path) -> None:
    """Token by token, also where a stop token ends them: it is not part of the text."""
    long = GenerateItem([9, 8, 7, 6], 12, ())
    (text,) = written(writer, long)
    stopped = GenerateItem([9, 8, 7, 6], 12, (text.token_ids[3],))
    generator = TorchGenerator.load(vllm_model, dtype="float32", max_tokens=255)

    assert [text, *written(writer, stopped)] == generator.run([long, stopped])


def test_an_engine_does_its_own_task_alone(engine: VllmEngine, writer: VllmEngine) -> None:
    """An item of another task is refused."""
    with pytest.raises(ValueError, match="answers ScoreItem only"):
        engine.run([GenerateItem([1, 2], 3, ())])
    with pytest.raises(ValueError, match="answers GenerateItem only"):
        writer.run([ScoreItem([1, 2], (5,))])


def written(engine: VllmEngine, item: GenerateItem) -> list[Generated]:
    """The text, without the count of cached tokens, which is the engine's own."""
    (text,) = engine.run([item])
    assert isinstance(text, Generated)
    return [Generated(text.token_ids, text.ended)]


def test_a_reward_models_logit_is_raw(tmp_path: Path) -> None:
    """As the torch engine has it, not squeezed into a probability."""
    torch.manual_seed(0)
    config: Any = LlamaConfig(vocab_size=VOCABULARY, num_labels=1, **SHAPE)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    work = [ClassifyItem(item.token_ids) for item in items(5, longest=200)]

    theirs = TorchEngine.load(tmp_path, "classify", dtype="float32", device="cpu").run(work)
    engine = VllmEngine.load(tmp_path, VllmOptions(task="classify", max_tokens=256, dtype="float32", extra=EAGER))
    ours = engine.run(work)
    engine.close()

    assert [getattr(answer, "logit", None) for answer in ours] == [pytest.approx(a.logit, abs=1e-3) for a in theirs]
    assert max(abs(answer.logit) for answer in theirs) > 1


def test_an_adapter_changes_the_numbers_as_merged_weights_do(vllm_model: Path, tmp_path: Path) -> None:
    """vLLM with a LoRA against the torch engine on merged weights."""
    merged = write_adapter(vllm_model, tmp_path / "adapter", tmp_path / "merged")
    work = items(3)

    bare, theirs = [TorchEngine.load(folder, dtype="float32").run(work) for folder in (vllm_model, merged)]
    lora = Lora("mine", tmp_path / "adapter")
    engine = VllmEngine.load(
        vllm_model, VllmOptions(task="labels", max_tokens=255, dtype="float32", lora=lora, extra=EAGER)
    )
    ours = answered(engine.run(work))
    engine.close()

    assert [a.logprobs for a in ours] == [pytest.approx(a.logprobs, abs=1e-3) for a in theirs]
    assert abs(bare[-1].logprobs[0] - theirs[-1].logprobs[0]) > 0.01


def write_adapter(base: Path, adapter: Path, merged: Path) -> Path:
    """Write a random adapter of rank 4 as PEFT does, and the model with it merged into its weights."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    tensors = {}
    for number, layer in enumerate(model.model.layers):
        weight = layer.self_attn.q_proj.weight
        down, up = torch.randn(4, weight.shape[1]) / 4, torch.randn(weight.shape[0], 4) / 4
        weight.data += 2 * up @ down
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(merged)
    return merged


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization": "nonsense"}, "quantization"),
        ({"extra": {"nonsense": 1}}, "no such argument.*nonsense"),
        ({"task": "classify"}, "not a reward model"),
        ({"deterministic": True}, "needs a GPU"),
        ({"max_tokens": 10**6}, "max_model_len"),
    ],
)
def test_a_start_that_must_fail_says_why(vllm_model: Path, more: dict[str, Any], message: str) -> None:
    """No process is started."""
    options = VllmOptions(**{"task": "labels", "max_tokens": 255, **more})

    with pytest.raises(VllmStartError, match=message):
        VllmEngine.load(vllm_model, options)


def test_a_model_that_kills_vllm_is_found_out_at_start(tiny_model: Path) -> None:
    """Its heads of 16 have no kernel, which is not known before the first prompt; workers would die one by one."""
    options = VllmOptions(task="labels", max_tokens=255, dtype="float32", extra=EAGER)

    with pytest.raises(VllmStartError, match="died of the first prompt"):
        VllmEngine.load(tiny_model, options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_model_judges_alike_on_both_engines(dtype: str, tmp_path: Path) -> None:
    """SmolLM2 on RewardBench: the same ranking in bf16, the same numbers to 1e-3 in fp32."""
    folder = resolve(SMOLLM).path
    prompts = judge_prompts(folder, rewardbench_pairs(2 * PAIRS))

    own = side("torch", torch_loader(folder, dtype), prompts, tmp_path / "torch.jsonl")
    other = side("vllm", vllm_loader(folder, dtype, EAGER), prompts, tmp_path / "vllm.jsonl")
    agreement = compare(own, other)

    assert agreement.holds(dtype), agreement
