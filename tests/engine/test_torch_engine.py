"""The torch engine: what it loads, what it refuses, and that batches of every kind of model give its own numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from service.engine.contract import DType, Engine, GenerateItem, ScoreItem
from service.engine.torch.engine import EngineLoadError, TorchEngine

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
CONFIGS = {
    "untied": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "soft-capped logits": lambda: transformers.Gemma2Config(
        **SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, sliding_window=16
    ),
    "divided logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
    "scaled logits": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "bias in the output layer": lambda: transformers.PhiConfig(**SMALL),
    "sliding window": lambda: transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8),
    "experts": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
    "frequencies by length": lambda: transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=24, rope_parameters=LONGROPE
    ),
    "recurrent": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8
    ),
    "not causal": lambda: transformers.BertConfig(**SMALL, architectures=["BertLMHeadModel"]),
}


@pytest.fixture
def engine(tiny_model: Path) -> TorchEngine:
    """The tiny model in fp32."""
    return TorchEngine.load(tiny_model, dtype="float32")


def make_model(folder: Path, config: Any) -> Any:
    """A random model of this configuration, written to the folder and read back as transformers does."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def random_items(count: int, longest: int = 60) -> list[ScoreItem]:
    """Items of 1 to `longest` random tokens that ask for two labels."""
    rng = random.Random(1)
    return [
        ScoreItem([rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, longest))], (5, 9)) for _ in range(count)
    ]


@torch.no_grad()
def own_logprobs(model: Any, item: ScoreItem) -> list[float]:
    """What the model itself says of one item's labels."""
    logprobs = model(torch.tensor([item.token_ids])).logits[0, -1].float().log_softmax(-1)
    return [logprobs[label].item() for label in item.label_ids]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_gives_its_own_numbers(kind: str, tmp_path: Path) -> None:
    """Forty items of mixed length in one call get what the model's own forward gives each alone."""
    model = make_model(tmp_path, CONFIGS[kind]())
    engine = TorchEngine.load(tmp_path, dtype="float32")
    items = random_items(40)

    answers = engine.run(items)

    expected = [own_logprobs(model, item) for item in items]
    assert [list(answer.logprobs) for answer in answers] == [pytest.approx(row, abs=2e-5) for row in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_model_has_its_rung(kind: str, dtype: DType, tmp_path: Path) -> None:
    """Families that are known are packed; the fp32 output layer fits every other causal kind, one prompt at a time."""
    make_model(tmp_path, CONFIGS[kind]())

    executor = TorchEngine.load(tmp_path, dtype=dtype, native_kernels=False).info.executor

    packed = {"untied", "soft-capped logits", "sliding window", "divided logits", "scaled logits"}
    assert executor.rung == ("packed" if kind in packed else "single")
    assert executor.stable


@pytest.mark.usefixtures("own_threads")
def test_what_computes_the_numbers_has_a_name_of_its_own(tiny_model: Path) -> None:
    """The code and the dtype tell two engines' scores apart; the number of threads does not."""
    one, other = (TorchEngine.load(tiny_model, dtype="float32", native_kernels=False, threads=n) for n in (1, 2))
    coarse = TorchEngine.load(tiny_model, dtype="bfloat16", native_kernels=False)

    assert one.info.executor == other.info.executor
    assert one.info.variant == other.info.variant != coarse.info.variant
    assert one.info.executor.digest != coarse.info.executor.digest


def test_another_tasks_item_is_refused(engine: TorchEngine) -> None:
    """An engine is loaded for one task."""
    with pytest.raises(ValueError, match="answers ScoreItem only"):
        engine.run([GenerateItem([7], 3, ())])


def test_bfloat16_weights_meet_an_fp32_output_layer(tiny_model: Path) -> None:
    """In bf16 the log-probabilities are finer than bf16 can hold, and near the fp32 ones."""
    items = random_items(20)

    coarse = TorchEngine.load(tiny_model, dtype="bfloat16").run(items)
    fine = TorchEngine.load(tiny_model, dtype="float32").run(items)

    values = torch.tensor([answer.logprobs for answer in coarse])
    assert (values != values.bfloat16().float()).float().mean() > 0.9
    assert values == pytest.approx(torch.tensor([answer.logprobs for answer in fine]), abs=0.5)


def test_probabilities_cover_the_whole_vocabulary(engine: TorchEngine, tiny_model: Path) -> None:
    """Asked for every token, the probabilities sum to 1, and `argmax_id` names the likeliest."""
    size = transformers.AutoConfig.from_pretrained(tiny_model).vocab_size

    (answer,) = engine.run([ScoreItem([7, 8, 9], tuple(range(size)))])

    assert torch.tensor(answer.logprobs).exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert answer.logprobs[answer.argmax_id] == max(answer.logprobs)


def test_items_at_the_limits_are_read(tiny_model: Path) -> None:
    """One token and `max_tokens` tokens both get an answer, in a call larger than `batch_tokens`."""
    engine: Engine = TorchEngine.load(tiny_model, dtype="float32", max_tokens=64, batch_tokens=32)

    answers = engine.run([ScoreItem([7], (5,)), ScoreItem([7] * 64, (5,))])

    assert len(answers) == 2
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


def test_broken_weights_are_refused_at_load(tiny_model: Path, tmp_path: Path) -> None:
    """A model whose logits are not finite is not loaded."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path)

    with pytest.raises(EngineLoadError, match="not finite"):
        TorchEngine.load(tmp_path)


def test_an_item_that_overflows_spoils_itself_only(tiny_model: Path, tmp_path: Path) -> None:
    """One token with broken embeddings gives NaN to its own item, and the neighbour in the same call a number."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    head = model.lm_head.weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.get_input_embeddings().weight.data[300] = float("nan")
    model.save_pretrained(tmp_path)
    engine = TorchEngine.load(tmp_path, dtype="float32")

    spoiled, fine = engine.run([ScoreItem([300, 7, 8], (5,)), ScoreItem([9, 7, 8], (5,))])

    assert not torch.isfinite(torch.tensor(spoiled.logprobs)).any()
    assert torch.isfinite(torch.tensor(fine.logprobs)).all()


def test_missing_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A folder that lacks a tensor is not completed with random numbers."""
    transformers.AutoConfig.from_pretrained(tiny_model).save_pretrained(tmp_path)
    tensors = load_file(tiny_model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(EngineLoadError, match="lacks weights"):
        TorchEngine.load(tmp_path)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    """A model of another kind is named in the error."""
    transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)

    with pytest.raises(EngineLoadError, match="BertForSequenceClassification is not a causal language model"):
        TorchEngine.load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    """A folder without a model is named in the error."""
    with pytest.raises(EngineLoadError, match=tmp_path.name):
        TorchEngine.load(tmp_path)


def test_more_tokens_than_the_model_reads_are_refused(tiny_model: Path) -> None:
    """A limit over the model's own is an error; a lower one is taken; none means the model's."""
    with pytest.raises(EngineLoadError, match="the model reads 1 to 2048"):
        TorchEngine.load(tiny_model, max_tokens=4096)

    assert TorchEngine.load(tiny_model, max_tokens=100).info.max_tokens == 100
    assert TorchEngine.load(tiny_model).info.max_tokens == 2048


def test_the_number_format_can_be_asked_for(tiny_model: Path) -> None:
    """`dtype` says what the weights are in, whatever the file holds."""
    assert TorchEngine.load(tiny_model, dtype="bfloat16").info.dtype == "bfloat16"
    assert TorchEngine.load(tiny_model, dtype="float32").info.dtype == "float32"
    assert TorchEngine.load(tiny_model).info.dtype in {"bfloat16", "float32"}
