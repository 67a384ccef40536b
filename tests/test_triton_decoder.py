"""The kernels for GPUs: the model's own numbers, and the same bits whatever is beside an item.

On a machine without a GPU Triton's interpreter runs them (conftest.py), which knows no bfloat16; test_gpu.py has what
needs a GPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from service.engine.contract import EngineItem
from service.engine.decoder_layers import UnsupportedModelError, read_decoder
from service.engine.packing import plan
from service.engine.torch_head import LastTokenHead
from tests.test_torch_packed import CONFIGS, SMALL, VOCABULARY, every, own_logprobs

pytest.importorskip("triton", reason="Triton is there on Linux alone")
from service.engine import triton_kernels
from service.engine.triton_decoder import TritonDecoder
from tests.compile_kernels import SHARED_MEMORY, reader_of

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes seconds for some hundred rows of the tiny models. It computes with numpy, which warns of
# infinities and of numbers that are none; a GPU does not.
pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def few_items() -> list[EngineItem]:
    """Two prompts behind one head with two answers each; one of them is longer than a block of queries."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    head = tokens(7)
    shared = [head + tokens(5), head + tokens(26)]
    answers = [tokens(count) for count in (3, 19, 70, 11)]
    return [EngineItem(shared[n // 2] + answer, (5, 9), (7, len(shared[n // 2]))) for n, answer in enumerate(answers)]


class Judge:
    """A random model of this kind, and what the kernels say of items."""

    def __init__(self, config: Any, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype).to(DEVICE)
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.decoder = TritonDecoder(read_decoder(self.model), LastTokenHead(self.model.get_output_embeddings()))

    def logprobs(self, items: Sequence[EngineItem], pack_rows: int = 4096) -> list[list[float]]:
        """Of each item's labels."""
        self.decoder.prepare(max(len(item.token_ids) for item in items))
        states: dict[int, torch.Tensor] = {}
        for pack in plan(items, pack_rows):
            states |= self.decoder.read(pack)
        logits = self.decoder.logits(torch.stack([states[index] for index in range(len(items))]))
        logits = logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
        totals, _ = self.decoder.summaries(logits)
        return [
            [row[label].item() - total.item() for label in item.label_ids]
            for item, row, total in zip(items, logits, totals, strict=True)
        ]

    def expected(self, items: Sequence[EngineItem]) -> list[list[float]]:
        """What the model itself says."""
        return [own_logprobs(self.model, item) for item in items]


@every
def test_items_get_the_models_own_numbers_in_any_company(kind: str) -> None:
    """In fp32 to 2e-5; alone, in another order and in other packs an item keeps its bits."""
    judge = Judge(CONFIGS[kind]())
    items = few_items()

    together = judge.logprobs(items)

    assert together == [pytest.approx(row, abs=2e-5) for row in judge.expected(items)]
    assert judge.logprobs(items[::-1], pack_rows=60)[::-1] == together
    assert judge.logprobs(items[1:2]) == together[1:2]


@pytest.mark.parametrize("kind", ["llama with biases", "gemma3"])
def test_sixteen_bits_move_numbers_by_their_rounding(kind: str) -> None:
    """Near what the same weights give in fp32."""
    judge = Judge(CONFIGS[kind](), torch.float16)
    items = few_items()

    together = judge.logprobs(items)
    judge.model.float()

    assert together == [pytest.approx(row, abs=0.05) for row in judge.expected(items)]
    assert together[0] != together[1]


def test_a_row_is_summed_alike_beside_any_number_of_rows() -> None:
    """A product of one row, and of three hundred, have equal bits; so have the summaries of their rows."""
    torch.manual_seed(0)
    weight, rows = torch.randn(200, 96, device=DEVICE), torch.randn(300, 96, device=DEVICE)
    product = triton_kernels.Product(weight)
    all_rows, one = torch.empty(300, 200, device=DEVICE), torch.empty(1, 200, device=DEVICE)

    product(rows, all_rows)
    product(rows[77:78].contiguous(), one)

    assert torch.equal(all_rows[77:78], one)
    assert torch.allclose(all_rows, rows @ weight.T, atol=1e-4)
    assert triton_kernels.summaries(all_rows)[0][77] == triton_kernels.summaries(one)[0][0]


@pytest.mark.parametrize("columns", [1, 37, 4096, 5000])
def test_summaries_are_the_logarithm_of_the_sum_and_the_first_maximum(columns: int) -> None:
    """For any number of columns, where several are the highest, and where one is not a number."""
    torch.manual_seed(0)
    logits = torch.randn(4, columns, device=DEVICE) * 30
    logits[1, :] = 2.5
    logits[2, -1] = float("nan")

    totals, argmax = triton_kernels.summaries(logits)

    assert totals.tolist() == pytest.approx(logits.logsumexp(1).tolist(), abs=1e-4, nan_ok=True)
    assert argmax[[0, 1, 3]].tolist() == logits[[0, 1, 3]].argmax(1).tolist()


def test_a_number_that_overflows_spoils_its_own_item_only() -> None:
    """A token with broken embeddings makes NaN of its item; its neighbour keeps its bits."""
    judge = Judge(transformers.LlamaConfig(**SMALL))
    judge.model.get_input_embeddings().weight.data[100] = float("nan")
    judge.decoder._head.weight = torch.nn.Parameter(torch.randn_like(judge.decoder._head.weight))
    items = [EngineItem([9, 7, 100, 8], (5,), (2,)), EngineItem([9, 7, 8, 10], (5,), (2,))]

    spoiled, beside = judge.logprobs(items)

    assert not torch.isfinite(torch.tensor(spoiled)).any()
    assert judge.logprobs(items[1:]) == [beside]


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"hidden_size": 60, "head_dim": 32}, "widths"), ({"hidden_act": "relu"}, "the activation ReLU")],
)
def test_what_the_kernels_cannot_do_is_said(change: dict[str, Any], reason: str) -> None:
    """UnsupportedModelError with the reason, so that the padded way is taken."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**(SMALL | change)))

    with pytest.raises(UnsupportedModelError, match=reason):
        reader_of(model.to(DEVICE))


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that cannot be started."""

    def fail(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("service.engine.triton_decoder.attend", fail)


@pytest.mark.parametrize("capability", [89, 90])
def test_the_kernels_can_be_compiled_and_find_room_in_shared_memory(capability: int) -> None:
    """For a GPU with 99 KiB of it and for one with 227, with no GPU there; kernels that need more could not start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels", str(capability)]

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"_add_and_norm", "_attend", "_product", "_rotate", "_summaries"}
    assert max(kernel["shared"] for kernel in kernels) <= SHARED_MEMORY[capability]


@pytest.mark.usefixtures("broken_compiler")
def test_kernels_that_do_not_run_here_are_no_reader() -> None:
    """What a compiler or a device raises is told as the reason for the padded way."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL)).to(DEVICE)

    with pytest.raises(UnsupportedModelError, match="no such instruction"):
        reader_of(model)
