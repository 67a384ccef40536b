"""The torch engine against the paper's rule, written a second time in tests/support/reference.py."""

from __future__ import annotations

import math
import os
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.judge.template_files import load_library
from service.models.resolve import resolve
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder
from tests.support.reference import Judgement, Reference, generated_pairs, paper_file, paper_text, rewardbench_pairs

SCORE_TOLERANCE = 1e-5
LOG_ODDS_TOLERANCE = 5e-5
# Compiled kernels round what a weight is multiplied by to 2^-18 of it, where float32 rounds to 2^-24.
NATIVE_FACTOR = 4.0


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    """The paper's rule on the tiny model."""
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TorchEngine:
    """The engine on the tiny model, in fp32."""
    return TorchEngine.load(tiny_model, dtype="float32")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """A hundred prompts of mixed length and content."""
    return [paper_text(*pair) for pair in generated_pairs(100)]


@pytest.fixture(scope="module")
def expected(reference: Reference, texts: list[str]) -> list[Judgement]:
    """What the paper's rule gives the prompts."""
    return [reference.judge(text) for text in texts]


@pytest.fixture(scope="module")
def items(reference: Reference, texts: list[str]) -> list[ScoreItem]:
    """The prompts as the engine takes them."""
    return [to_item(reference, text) for text in texts]


@pytest.fixture(scope="module")
def alone(engine: TorchEngine, items: list[ScoreItem]) -> list[LabelLogprobs]:
    """The answers to the first 32 items, each judged in a call of its own."""
    return [engine.run([item])[0] for item in items[:32]]


def to_item(reference: Reference, text: str) -> ScoreItem:
    """The text as an engine's item that asks for " Yes" and " No"."""
    return ScoreItem(reference.tokenizer(text).input_ids, (reference.label_id(" Yes"), reference.label_id(" No")))


def judgement(answer: LabelLogprobs) -> Judgement:
    """The score from an engine's answer."""
    yes, no = answer.logprobs
    return Judgement(1 / (1 + math.exp(no - yes)), yes - no, math.exp(yes) + math.exp(no))


def assert_same(ours: list[LabelLogprobs], theirs: list[Judgement], factor: float = 1.0) -> None:
    """Scores and label masses agree to 1e-5, log-odds to 5e-5, or to `factor` times that."""
    mine = [judgement(answer) for answer in ours]
    score, log_odds = SCORE_TOLERANCE * factor, LOG_ODDS_TOLERANCE * factor
    assert [j.score for j in mine] == pytest.approx([j.score for j in theirs], rel=0, abs=score)
    assert [j.label_mass for j in mine] == pytest.approx([j.label_mass for j in theirs], rel=0, abs=score)
    assert [j.log_odds for j in mine] == pytest.approx([j.log_odds for j in theirs], rel=0, abs=log_odds)


def test_a_hundred_prompts_get_the_papers_number(
    engine: TorchEngine, items: list[ScoreItem], expected: list[Judgement]
) -> None:
    """In one call, every prompt gets the score that the paper's rule gives it alone."""
    answers = engine.run(items)

    assert_same(answers, expected)


def test_the_prompts_of_this_file_tell_a_wrong_rule_apart(expected: list[Judgement]) -> None:
    """The hundred scores are spread widely, so that a mixed-up or constant answer cannot pass."""
    scores = sorted(judgement.score for judgement in expected)

    assert scores[10] < 0.35
    assert scores[-10] > 0.65


@given(order=st.permutations(range(32)), calls=st.sampled_from([1, 2, 5, 16, 32]))
@settings(max_examples=15, deadline=None)
def test_neighbours_do_not_change_a_number(
    engine: TorchEngine, items: list[ScoreItem], alone: list[LabelLogprobs], order: list[int], calls: int
) -> None:
    """In any order, and cut into calls of any size, an item gets the number it gets alone."""
    answers: list[LabelLogprobs] = []
    for start in range(0, len(order), calls):
        answers += engine.run([items[index] for index in order[start : start + calls]])

    assert_same(answers, [judgement(alone[index]) for index in order])


def test_the_services_prompts_get_the_papers_number(
    reference: Reference, engine: TorchEngine, expected: list[Judgement], tmp_path: Path
) -> None:
    """Rendered and tokenised by the service from a template in the paper's form, every pair gets the same score."""
    template = load_library("raw", [paper_file(tmp_path)]).get("paper/rewardbench/all")
    builder = PromptBuilder(reference.tokenizer, engine.info.max_tokens)

    prompts = [builder.build(template, prompt, [response], "error") for prompt, response in generated_pairs(100)]

    assert_same(engine.run(prompts), expected)


@pytest.mark.models
@pytest.mark.timeout(1800)
def test_a_hundred_real_pairs_get_the_papers_number_from_smollm2(tmp_path: Path) -> None:
    """SmolLM2 in fp32, real pairs through the service's prompts, in calls of 32: what the paper's rule gives each,
    with and without compiled kernels."""
    folder = resolve("smollm2-135m-instruct").path
    reference = Reference(folder)
    template = load_library("raw", [paper_file(tmp_path)]).get("paper/rewardbench/all")
    builder = PromptBuilder(load_tokenizer(folder), 8192)
    pairs = rewardbench_pairs(100)
    expected = [reference.judge(paper_text(*pair)) for pair in pairs]

    prompts = [builder.build(template, prompt, [response], "error") for prompt, response in pairs]
    for native, factor in ((False, 1.0), (True, NATIVE_FACTOR)):
        with closing(
            TorchEngine.load(folder, dtype="float32", threads=os.cpu_count(), native_kernels=native)
        ) as engine:
            answers = [a for start in range(0, 100, 32) for a in engine.run(prompts[start : start + 32])]
        assert_same(answers, expected, factor)
