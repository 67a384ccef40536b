"""The comparison of two engines resumes where it was stopped; vLLM itself is not needed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.vllm_agreement import Side, compare, judge_prompts, side
from service.engine.contract import ItemFailure, LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from service.prompts.builder import JudgePrompt

TEXTS = [("What is 2+2?", answer) for answer in ("4", "5", "four", "a number", "no idea")]


@pytest.fixture
def prompts(tiny_model: Path) -> list[JudgePrompt]:
    """Five prompts."""
    return judge_prompts(tiny_model, TEXTS)


class Counting(FakeEngine):
    """Counts the prompts of each batch, and fails on the one that comes after `last`."""

    def __init__(self, last: int = 100) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._last = last

    def run(self, items: list[ScoreItem]) -> list[LabelLogprobs | ItemFailure]:
        """The fake engine's answers."""
        self.asked.append(len(items))
        if sum(self.asked) > self._last:
            raise RuntimeError("enough")
        return list(super().run(items))


def test_an_interrupted_side_resumes(prompts: list[JudgePrompt], tmp_path: Path) -> None:
    """What was answered is not asked for again, and the numbers are those of a run in one go."""
    whole = side("a", Counting, prompts, tmp_path / "whole.jsonl")
    stopped, second = Counting(last=4), Counting()
    with pytest.raises(RuntimeError, match="enough"):
        side("b", lambda: stopped, prompts, tmp_path / "part.jsonl", call_tokens=1)
    resumed = side("b", lambda: second, prompts, tmp_path / "part.jsonl", call_tokens=1)

    assert resumed.log_odds == whole.log_odds
    assert second.asked == [1, 1, 1]  # the first call is the warm-up
    assert len((tmp_path / "part.jsonl").read_text().splitlines()) == 5


def test_a_complete_side_loads_no_engine(prompts: list[JudgePrompt], tmp_path: Path) -> None:
    """A reference is computed once; a shorter run takes its part of it."""
    first = side("a", Counting, prompts, tmp_path / "a.jsonl")

    def load() -> FakeEngine:
        raise AssertionError("loaded")

    assert side("a", load, prompts, tmp_path / "a.jsonl").answers == first.answers
    assert side("a", load, prompts[3:], tmp_path / "a.jsonl").answers == first.answers[3:]


def test_calls_are_filled_up_to_the_tokens(prompts: list[JudgePrompt], tmp_path: Path) -> None:
    """All at once where there is room for them."""
    engine = Counting()
    side("a", lambda: engine, prompts, tmp_path / "a.jsonl", call_tokens=10**6)

    assert engine.asked == [1, 5]


def test_the_limit_depends_on_the_number_format(prompts: list[JudgePrompt], tmp_path: Path) -> None:
    """Numbers in float32, ranks in others."""
    one = side("a", Counting, prompts[:4], tmp_path / "a.jsonl")
    moved = [answer.model_copy(update={"log_odds": answer.log_odds + 0.01}) for answer in one.answers]

    found = compare(one, Side("b", moved))
    assert found.largest == pytest.approx(0.01)
    assert (found.holds("float32"), found.holds("bfloat16")) == (False, True)


def test_winners_are_those_of_neighbours(prompts: list[JudgePrompt], tmp_path: Path) -> None:
    """Two answers are a pair; the engines agree on it where the same one is ahead."""
    one = side("a", Counting, prompts[:4], tmp_path / "a.jsonl")
    turned = [answer.model_copy(update={"log_odds": -answer.log_odds}) for answer in one.answers]

    assert compare(one, one).same_winner == 1
    assert compare(one, Side("b", turned)).same_winner == 0
    assert compare(one, Side("b", [*one.answers[:2], *turned[2:]])).same_winner == 0.5
