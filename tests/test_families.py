"""Every family that transformers builds takes the rung that it is said to take, and gets its own numbers there."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from service.engine.torch.cpu import kernel
from service.engine.torch.engine import TorchEngine
from service.engine.torch.loading import Loaded
from tests.families import COMPILED, PACKED, SINGLE, build
from tests.test_packed_forward import bits, own_logprobs, some_items

# Up to 170 tokens: beyond every window, chunk and original length of these models.
ITEMS = some_items(2, 3)
HERE = "packed" if kernel.isa() is None else f"compiled-{kernel.isa()}"


def logprobs_on(rung: str, model: Any, *, native: bool, max_tokens: int = 512) -> list[list[float]]:
    """Of the items, which have the same bits alone, together and in another order."""
    with closing(TorchEngine(Loaded(model, max_tokens, 512), "labels", native_kernels=native)) as engine:
        assert engine.info.executor.rung == rung
        items = [item for item in ITEMS if len(item.token_ids) <= max_tokens]
        together = bits(engine.run(items))
        assert bits(engine.run(items[::-1]))[::-1] == together
        assert [bits(engine.run([item]))[0] for item in items] == together
        return [list(row) for row in together]


def own(model: Any) -> list[Any]:
    """What the model's own forward says of the items."""
    return [own_logprobs(model, item) for item in ITEMS]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str) -> None:
    """In float32 with bfloat16 weights, by compiled code where this CPU has what it takes."""
    model = build(name)
    expected = own(model)

    found = logprobs_on(HERE, model, native=True)

    assert found == [pytest.approx(row, abs=2e-4) for row in expected]


@pytest.mark.parametrize("name", COMPILED | PACKED)
def test_packed(name: str) -> None:
    """In float32 by torch's operations; compiled code is asked first and knows what it does not do."""
    model = build(name)
    expected = own(model)

    found = logprobs_on("packed", model, native=name in PACKED)

    assert found == [pytest.approx(row, abs=2e-5) for row in expected]


@pytest.mark.parametrize("name", SINGLE)
def test_single(name: str) -> None:
    """One prompt at a time, by the model's own forward."""
    model = build(name)
    expected = own(model)

    found = logprobs_on("single", model, native=True)

    assert found == [pytest.approx(row, abs=2e-5) for row in expected]
