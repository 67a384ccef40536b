"""The torch engine: what it loads and refuses, and that models of every kind get their own numbers in any call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from service.engine.contract import DType, Engine, GenerateItem, ScoreItem
from service.engine.torch.engine import EngineLoadError, TorchEngine
from tests.support.causal import logprobs, near, own_logprobs, random_ids, write_model, write_with_broken_embedding

VOCABULARY = 128
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 24,
    "rope_theta": 1e4,
    "factor": 8.0,
}
PACKED = {
    "untied": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "soft-capped logits": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=16
    ),
    "divided logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
    "scaled logits": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "sliding window": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
}
SINGLE = {
    "bias in the output layer": lambda: transformers.PhiConfig(**SMALL),
    "experts": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "frequencies by length": lambda: transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=24, rope_parameters=LONGROPE
    ),
    "recurrent": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8
    ),
    "not causal": lambda: transformers.BertConfig(**SMALL, architectures=["BertLMHeadModel"]),
}
CONFIGS = PACKED | SINGLE


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[TorchEngine]:
    """The tiny model in fp32."""
    with closing(TorchEngine.load(tiny_model, dtype="float32")) as engine:
        yield engine


def random_items(count: int) -> list[ScoreItem]:
    """Items of 1 to 60 random tokens that ask for two labels."""
    rng = Random(1)
    return [ScoreItem(random_ids(rng, 1, 60), (5, 9)) for _ in range(count)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_gives_its_own_numbers(kind: str, tmp_path: Path) -> None:
    """Forty items of mixed length in one call get what the model's own forward gives each alone."""
    model = write_model(tmp_path, CONFIGS[kind]())
    items = random_items(40)

    answers = TorchEngine.load(tmp_path, dtype="float32").run(items)

    assert logprobs(answers) == near(own_logprobs(model, items), 2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_has_its_rung(kind: str, dtype: DType, tmp_path: Path) -> None:
    """Known families are packed; every other causal kind runs one prompt at a time, with its output layer in fp32."""
    write_model(tmp_path, CONFIGS[kind]())

    executor = TorchEngine.load(tmp_path, dtype=dtype, native_kernels=False).info.executor

    assert executor.rung == ("packed" if kind in PACKED else "single")
    assert executor.stable


@pytest.mark.usefixtures("own_threads")
def test_the_executors_digest_tells_scores_apart(tiny_model: Path) -> None:
    """The code and the dtype are in it; the number of threads is not."""
    one, other = (TorchEngine.load(tiny_model, dtype="float32", native_kernels=False, threads=n) for n in (1, 2))
    coarse = TorchEngine.load(tiny_model, dtype="bfloat16", native_kernels=False)

    assert one.info.executor == other.info.executor
    assert one.info.variant == other.info.variant != coarse.info.variant
    assert one.info.executor.digest != coarse.info.executor.digest


def test_an_item_of_another_task_is_refused(engine: TorchEngine) -> None:
    """An engine is loaded for one task."""
    with pytest.raises(ValueError, match="answers ScoreItem only"):
        engine.run([GenerateItem([7], 3, ())])


def test_the_output_layer_is_in_fp32_for_bf16_weights_too(tiny_model: Path, engine: TorchEngine) -> None:
    """In bf16 the log-probabilities are finer than bf16 can hold, and near the fp32 ones."""
    items = random_items(20)

    coarse = torch.tensor(logprobs(TorchEngine.load(tiny_model, dtype="bfloat16").run(items)))

    assert (coarse != coarse.bfloat16().float()).float().mean() > 0.9
    assert coarse == pytest.approx(torch.tensor(logprobs(engine.run(items))), abs=0.5)


def test_probabilities_cover_the_whole_vocabulary(engine: TorchEngine, tiny_model: Path) -> None:
    """Asked for every token, the probabilities sum to 1, and `argmax_id` names the likeliest."""
    size = transformers.AutoConfig.from_pretrained(tiny_model).vocab_size

    (answer,) = engine.run([ScoreItem([7, 8, 9], tuple(range(size)))])

    assert torch.tensor(answer.logprobs).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert answer.logprobs[answer.argmax_id] == max(answer.logprobs)


def test_items_at_the_limits_are_answered(tiny_model: Path) -> None:
    """One token and `max_tokens` tokens, in a call larger than `batch_tokens`; and no items at all."""
    engine: Engine = TorchEngine.load(tiny_model, dtype="float32", max_tokens=64, batch_tokens=32)

    assert len(engine.run([ScoreItem([7], (5,)), ScoreItem([7] * 64, (5,))])) == 2
    assert engine.run([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ScoreItem([], (5,)), "0 tokens"),
        (ScoreItem([7] * 2049, (5,)), "2049 tokens"),
        (ScoreItem([7], ()), "no label ids"),
        (ScoreItem([10**6], (5,)), "outside the model's vocabulary"),
        (ScoreItem([7], (-1,)), "outside the model's vocabulary"),
    ],
)
def test_an_item_outside_the_contract_is_refused(engine: TorchEngine, bad: ScoreItem, message: str) -> None:
    """Wrong lengths and ids raise ValueError that says which."""
    with pytest.raises(ValueError, match=message):
        engine.run([ScoreItem([7], (5,)), bad])


def test_a_closed_engine_says_so(engine: TorchEngine) -> None:
    """After `close` a call raises instead of crashing."""
    engine.close()

    with pytest.raises(RuntimeError, match="closed"):
        engine.run([ScoreItem([7], (5,))])


def test_broken_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A model whose logits are not finite is not loaded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)

    with pytest.raises(EngineLoadError, match="not finite"):
        TorchEngine.load(tmp_path)


def test_an_item_that_overflows_spoils_itself_only(tiny_model: Path, tmp_path: Path) -> None:
    """A token with broken embeddings gives NaN to its own item, and a number to the other one in the call."""
    write_with_broken_embedding(transformers.AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path, 300)
    engine = TorchEngine.load(tmp_path, dtype="float32")

    spoiled, fine = engine.run([ScoreItem([300, 7, 8], (5,)), ScoreItem([9, 7, 8], (5,))])

    assert not torch.isfinite(torch.tensor(spoiled.logprobs)).any()
    assert torch.isfinite(torch.tensor(fine.logprobs)).all()


def test_missing_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A tensor that the folder lacks is not replaced with random numbers."""
    transformers.AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tensors = load_file(tiny_model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EngineLoadError, match="lacks weights"):
        TorchEngine.load(tmp_path)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    """The error names the model's kind."""
    transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)

    with pytest.raises(EngineLoadError, match="BertForSequenceClassification is not a causal language model"):
        TorchEngine.load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """The error names the folder."""
    with pytest.raises(EngineLoadError, match=tmp_path.name):
        TorchEngine.load(tmp_path)


def test_max_tokens_can_only_lower_the_models_limit(tiny_model: Path) -> None:
    """A higher limit is an error; none means the model's."""
    with pytest.raises(EngineLoadError, match="the model reads 1 to 2048"):
        TorchEngine.load(tiny_model, max_tokens=4096)

    assert TorchEngine.load(tiny_model, max_tokens=100).info.max_tokens == 100
    assert TorchEngine.load(tiny_model).info.max_tokens == 2048


def test_the_dtype_can_be_chosen(tiny_model: Path) -> None:
    """Whatever the file holds."""
    assert TorchEngine.load(tiny_model, dtype="bfloat16").info.dtype == "bfloat16"
    assert TorchEngine.load(tiny_model, dtype="float32").info.dtype == "float32"
    assert TorchEngine.load(tiny_model).info.dtype in {"bfloat16", "float32"}
