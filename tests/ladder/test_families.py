"""Every family that transformers builds takes the rung that it is said to take, and gets its own numbers there."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.contract import ClassifyItem, GenerateItem
from service.engine.torch.cpu.library import library_forms
from service.engine.torch.engine import TorchEngine
from service.engine.torch.generate import TorchGenerator
from service.engine.torch.loading import EngineLoadError, Loaded
from tests.ladder.families import COMPILED, PACKED, SINGLE, build, build_classifier
from tests.support.causal import logprobs, near, own_logprobs, prefix_items

# Up to 170 tokens: beyond every window, chunk and original length of these models.
ITEMS = prefix_items(2, 3)
# The fastest rung on this CPU.
FASTEST = next((f"compiled-{form}" for form in library_forms()), "packed")


def logprobs_on(rung: str, model: Any, *, native: bool = True, max_tokens: int = 512) -> list[tuple[float, ...]]:
    """Of the items, which have the same bits alone, together and in another order."""
    with closing(TorchEngine(Loaded(model, max_tokens, 512), "labels", native_kernels=native)) as engine:
        assert engine.info.executor.rung == rung
        items = [item for item in ITEMS if len(item.token_ids) <= max_tokens]
        together = logprobs(engine.run(items))
        assert logprobs(engine.run(items[::-1]))[::-1] == together
        assert [logprobs(engine.run([item]))[0] for item in items] == together
        return together


def test_the_documents_have_the_same_table() -> None:
    """docs/models.md names the rung that is tested, and all families that are not run one prompt at a time."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`) \| (compiled|packed|single) \|", page, re.MULTILINE)
    documented = {name: rung for names, rung in rows for name in re.findall(r"`(\w+)`", names)}
    tested = {"compiled": COMPILED, "packed": PACKED, "single": SINGLE}

    assert documented == {name: rung for rung, models in tested.items() for name in models if name in documented}
    assert set(documented) >= {name for name in COMPILED | PACKED if name.isidentifier()}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """In float32 with bf16 weights, by compiled code if this CPU runs it."""
    model = build(name)
    expected = own_logprobs(model, ITEMS)

    assert logprobs_on(FASTEST, model) == near(expected, 2e-4)


@pytest.mark.parametrize("name", COMPILED | PACKED)
def test_packed(name: str) -> None:
    """In float32 by torch's operations; for families of this rung, compiled code refuses first."""
    model = build(name)
    expected = own_logprobs(model, ITEMS)

    assert logprobs_on("packed", model, native=name in PACKED) == near(expected, 2e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_single(name: str) -> None:
    """One prompt at a time, by the model's own forward."""
    model = build(name)
    expected = own_logprobs(model, ITEMS)

    assert logprobs_on("single", model) == near(expected, 2e-5)


@pytest.mark.parametrize("name", COMPILED | PACKED)
def test_bfloat16(name: str) -> None:
    """The rung is the same in bf16, and bits do not depend on the batch there either."""
    logprobs_on("packed" if name in PACKED else FASTEST, build(name).bfloat16())


@pytest.mark.parametrize("name", ["phi3, long", "ministral3, long"])
def test_short_prompts_are_packed(name: str) -> None:
    """If no prompt may be so long that positions change, the fast rungs are available."""
    model = build(name)
    expected = own_logprobs(model, [item for item in ITEMS if len(item.token_ids) <= 96])

    assert len(expected) > 2
    assert logprobs_on(FASTEST, model, max_tokens=96) == near(expected, 2e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_model_that_reads_images_is_loaded_to_read_text(name: str, tmp_path: Path) -> None:
    """From a folder, though transformers does not count it as a causal model."""
    model = build(name)
    model.save_pretrained(tmp_path)

    with closing(TorchEngine.load(tmp_path, dtype="float32", device="cpu", max_tokens=512)) as engine:
        assert logprobs(engine.run(ITEMS)) == near(own_logprobs(model, ITEMS), 2e-4)
        assert engine.info.executor.rung == FASTEST


@pytest.mark.parametrize(
    "name", ["phi3", "glm4", "olmo3", "exaone4", "smollm3", "gemma3_text", "qwen3_5_text", "gpt_oss"]
)
def test_reward_models(name: str) -> None:
    """A classifier's logit is its own, on the rung of its family."""
    model = build_classifier(name)
    rung = FASTEST if name in COMPILED else "packed" if name in PACKED else "single"
    items = [ClassifyItem(item.token_ids, item.boundaries) for item in ITEMS]
    with torch.inference_mode():
        expected = [model(torch.tensor([item.token_ids])).logits[0, 0].item() for item in items]

    with closing(TorchEngine(Loaded(model, 512, 512), "classify")) as engine:
        assert [answer.logit for answer in engine.run(items)] == pytest.approx(expected, abs=5e-4)
        assert engine.info.executor.rung == rung


@pytest.mark.parametrize(
    "name", ["gemma4_text", "gemma4_text, E4B", "gpt_oss", "qwen3_5_text", "llama4_text", "deepseek_v32", "lfm2"]
)
def test_text_is_the_models_own(name: str) -> None:
    """A batch of prompts of different lengths is continued as transformers continues each alone."""
    model = build(name)
    prompts = [tuple(item.token_ids[:length]) for item, length in zip(ITEMS, (40, 11, 3, 23, 17, 7), strict=True)]
    with torch.inference_mode():
        expected = [
            model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)[0].tolist()
            for prompt in prompts
        ]

    with closing(TorchGenerator(Loaded(model, 512, 512))) as engine:
        texts = engine.run([GenerateItem(prompt, 12, ()) for prompt in prompts])

    assert [[*prompt, *text.token_ids] for prompt, text in zip(prompts, texts, strict=True)] == expected


@pytest.mark.parametrize(
    ("name", "reason"),
    [("phi3, long", "generate with --max-tokens 96"), ("minimax", "cannot generate text here: MiniMax uses cache")],
)
def test_a_model_that_cannot_generate_is_refused(name: str, reason: str) -> None:
    """When it is loaded, with a message that says why."""
    with pytest.raises(EngineLoadError, match=reason):
        TorchGenerator(Loaded(build(name), 512, 512))
