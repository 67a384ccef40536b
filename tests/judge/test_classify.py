"""The engine for reward models: the logits of transformers' own forward, whatever stands beside an item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from service.engine.contract import Classified, ClassifyItem, DType, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.torch.ladder import probe_prompts
from service.engine.torch.loading import EngineLoadError
from tests.support.tiny import make_tiny_model

PADDING = 0
# The last token of a prompt that the model is tried on when it is loaded.
LAST_OF_A_PROBE = probe_prompts(600, 256)[0].token_ids[-1]


def llama(folder: Path, *, labels: int = 1, padding: int | None = PADDING) -> Path:
    """A tiny Llama with a classification head, on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        num_labels=labels,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=padding,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[PADDING, None, 7, LAST_OF_A_PROBE])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with a padding token, one without, and one whose padding token stands in the texts."""
    return llama(tmp_path_factory.mktemp("reward"), padding=request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[TorchEngine]:
    """The engine in fp32."""
    engine = TorchEngine.load(folder, "classify", dtype="float32", device="cpu")
    yield engine
    engine.close()


def items(count: int) -> list[ClassifyItem]:
    """Random texts of different lengths, one of them all of token 7, some that end in it."""
    rng = Random(1)
    texts = [[rng.randrange(1, 600) for _ in range(rng.randint(2, 60))] for _ in range(count - 2)]
    return [ClassifyItem(text) for text in [*texts, [7, 7, 7], [5, 6, 7, 7]]]


def own_logits(folder: Path, texts: Sequence[ClassifyItem]) -> list[float]:
    """What transformers gives for each text alone."""
    model = LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [float(model(input_ids=torch.tensor([list(text.token_ids)])).logits[0, 0]) for text in texts]


def logits(answers: Sequence[Classified]) -> list[float]:
    """Their numbers."""
    return [answer.logit for answer in answers]


def test_logits_are_the_models_own(engine: TorchEngine, folder: Path) -> None:
    """A packed batch gives what transformers gives for each text alone, wherever the padding token stands."""
    texts = items(12)

    answers = engine.run(texts)

    assert logits(answers) == pytest.approx(own_logits(folder, texts), abs=1e-5)
    assert len({round(value, 4) for value in logits(answers)}) == len(texts)


def test_a_text_does_not_see_its_neighbours(engine: TorchEngine) -> None:
    """One by one, together and backwards the logits are the same."""
    texts = items(8)
    alone = [engine.run([text])[0].logit for text in texts]

    assert logits(engine.run(texts)) == alone
    assert logits(engine.run(texts[::-1])) == alone[::-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("native", [True, False])
def test_neighbours_do_not_move_a_bit(dtype: DType, native: bool, tmp_path: Path) -> None:
    """In 20 calls of other sizes and orders, behind prefixes that others share or none, a text keeps its bits."""
    rng = Random(5)
    heads = [[rng.randrange(1, 600) for _ in range(rng.randint(5, 60))] for _ in range(4)]
    texts = [
        ClassifyItem([*head, *(rng.randrange(1, 600) for _ in range(rng.randint(1, 90)))], (len(head),))
        for head in heads
        for _ in range(4)
    ]
    llama(tmp_path)
    with closing(TorchEngine.load(tmp_path, "classify", dtype=dtype, device="cpu", native_kernels=native)) as engine:
        alone = [engine.run([text])[0].logit for text in texts]
        calls = [rng.sample(range(len(texts)), rng.randint(1, len(texts))) for _ in range(20)]
        found = [logits(engine.run([texts[index] for index in call])) for call in calls]

    assert found == [[alone[index] for index in call] for call in calls]
    assert len(set(alone)) == len(texts)


def test_bfloat16_is_near(folder: Path) -> None:
    """In bf16 the head is still computed in fp32, and the logits are those of fp32 but for the rounding."""
    texts = items(6)
    engine = TorchEngine.load(folder, "classify", dtype="bfloat16", device="cpu")

    answers = engine.run(texts)

    exact = own_logits(folder, texts)
    assert logits(answers) == pytest.approx(exact, abs=0.1 * max(map(abs, exact)))
    assert engine.info.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "message"),
    [([], "0 tokens"), ([5] * 257, r"257 tokens; .* 1 to 256"), ([600], "vocabulary"), ([-1], "voc")],
)
def test_an_item_outside_the_contract_is_refused(engine: TorchEngine, text: list[int], message: str) -> None:
    """Before anything is computed."""
    with pytest.raises(ValueError, match=message):
        engine.run([ClassifyItem([5]), ClassifyItem(text)])


def test_a_reward_engine_does_nothing_else(engine: TorchEngine) -> None:
    """An item that asks for labels is refused; the texts are packed."""
    with pytest.raises(ValueError, match="answers ClassifyItem only"):
        engine.run([ScoreItem([5, 6], (7,))])

    assert engine.info.executor.rung in {"compiled-amx", "compiled-avx512", "packed"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_looks_both_ways_is_run_by_its_own_forward(tmp_path: Path) -> None:
    """BERT sees padding, so its texts go one at a time, and get its own numbers."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        num_labels=1,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    texts = items(5)

    answers = TorchEngine.load(tmp_path, "classify", dtype="float32", device="cpu").run(texts)

    with torch.inference_mode():
        own = [float(model(input_ids=torch.tensor([list(text.token_ids)])).logits[0, 0]) for text in texts]
    assert logits(answers) == pytest.approx(own, abs=1e-5)


def causal(folder: Path) -> Path:
    """A causal language model."""
    return make_tiny_model(folder)


def two_outputs(folder: Path) -> Path:
    """A classifier of two classes."""
    return llama(folder, labels=2)


def headless(folder: Path) -> Path:
    """A reward model whose head was not saved."""
    from safetensors.torch import load_file, save_file

    file = llama(folder) / "model.safetensors"
    save_file({name: weights for name, weights in load_file(file).items() if "score" not in name}, file)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (causal, "LlamaForCausalLM is not a reward model: .* judges with --judge yes-no"),
        (two_outputs, "has 2 outputs"),
        (headless, "lacks weights of the model .*score"),
    ],
)
def test_what_is_no_reward_model_is_refused(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    """The message says what the folder holds, and what to do."""
    with pytest.raises(EngineLoadError, match=message):
        TorchEngine.load(make(tmp_path), "classify", device="cpu")


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    """The engine for labels refuses it, and names the judge that it is for."""
    with pytest.raises(EngineLoadError, match=r"not a causal language model .* --judge reward-model"):
        TorchEngine.load(llama(tmp_path), device="cpu")
