"""What every engine that is given token ids does with labels, whatever computes its numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from service.engine.contract import AnyItem, ClassifyItem, Engine, LabelLogprobs, ScoreItem, split_labels
from service.engine.fake import FakeEngine
from service.engine.torch.engine import TorchEngine

LABELS = tuple(range(3, 258))


@pytest.fixture(params=["fake", "torch", "upstream"])
def engine(request: pytest.FixtureRequest, tiny_model: Path) -> Engine:
    """One engine after the other."""
    match request.param:
        case "fake":
            return FakeEngine()
        case "torch":
            return TorchEngine.load(tiny_model, dtype="float32")
        case _:
            by_ids: Engine = request.getfixturevalue("by_ids")
            return by_ids


def logprobs_of(engine: Engine, *labels: int) -> tuple[float, ...]:
    """The answer to one prompt with these labels."""
    (answer,) = engine.run([ScoreItem((5, 6, 7), labels)])
    assert isinstance(answer, LabelLogprobs)
    return answer.logprobs


@pytest.mark.parametrize("count", [1, 2, 10, 255])
def test_labels_are_answered_one_for_one(engine: Engine, count: int) -> None:
    """A yes-no question, a scale of ten and a choice of 255 alike: shares of one distribution, none floored."""
    (answer,) = engine.run([ScoreItem((5, 6, 7), LABELS[:count])])

    assert isinstance(answer, LabelLogprobs)
    assert len(answer.logprobs) == count
    assert 0 < math.fsum(map(math.exp, answer.logprobs)) <= 1 + 1e-6
    assert not answer.floored


def test_two_labels_log_odds_do_not_depend_on_the_others(engine: Engine) -> None:
    """In whatever order they are asked for."""
    first, *_, last = logprobs_of(engine, *LABELS)
    one, other = logprobs_of(engine, LABELS[-1], LABELS[0])

    assert first - last == pytest.approx(other - one, abs=1e-5)


@pytest.mark.parametrize("item", [ScoreItem((), (3,)), ScoreItem((5,), ()), ClassifyItem((5,))])
def test_an_item_outside_the_contract_is_refused(engine: Engine, item: AnyItem) -> None:
    """No tokens, no labels, another task: and nothing is computed for the others of the batch."""
    with pytest.raises(ValueError, match=r"tokens|label|loaded for one task"):
        engine.run([ScoreItem((5,), (3,)), item])


def test_a_split_item_has_every_label_once() -> None:
    """In order, no part with more than the limit; a prompt with few labels is not split."""
    item = ScoreItem((5,), LABELS, boundaries=(1,))

    parts = split_labels(item, 128)
    assert [len(part.label_ids) for part in parts] == [128, 127]
    assert sum((part.label_ids for part in parts), ()) == LABELS
    assert {(part.token_ids, part.boundaries) for part in parts} == {((5,), (1,))}
    assert split_labels(item, 255) == [item]
