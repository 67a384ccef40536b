"""The core alone, as a wire uses it: any question goes through prompts, queue, worker and engine as it is."""

from __future__ import annotations

import math
import time

import pytest

from client.errors import ErrorCode
from service.errors import ServiceError
from service.judge.dispatch import Call
from service.judge.pipeline import Pipeline
from service.judge.scoring import Judgement
from service.questions import Choice, Layout, Option, Predicate, PromptSpec, Question, Scale
from tests.judge.makers import logprobs
from tests.support.reference import Reference

INPUT = "The quick brown fox jumps over the lazy dog."


def layout(question: Question, instruction: str = "Which?") -> Layout:
    """A layout with a slot for the input alone, as a wire makes one for its own questions."""
    return Layout(
        format="raw",
        text="{input}\n{instruction}\nAnswer:",
        slots=("input",),
        instruction=instruction,
        question=question,
    )


@pytest.fixture(scope="module")
def words(reference: Reference) -> list[str]:
    """Texts that are one token behind the layouts' end, 300 of them."""
    before = reference.tokenizer("\nAnswer:").input_ids
    texts = (reference.tokenizer.decode([id_]) for id_ in range(3, len(reference.tokenizer)))
    single = (t for t in texts if t.isprintable() and reference.tokenizer("\nAnswer:" + t).input_ids[:-1] == before)
    return list(dict.fromkeys(single))[:300]


async def judge(pipeline: Pipeline, *specs: PromptSpec) -> list[Judgement]:
    """The judgements of one group."""
    (group,) = await pipeline.judge([specs], Call(time.monotonic() + 60))
    if isinstance(group, ServiceError):
        raise group
    return group


async def test_a_choice_of_255_options(pipeline: Pipeline, reference: Reference, words: list[str]) -> None:
    """Every option has the probability that the model's own forward gives it, among themselves they sum to 1."""
    options = words[:255]
    choice = Choice(tuple(Option(f"option {k}", (word,)) for k, word in enumerate(options)))

    (judged,) = await judge(pipeline, PromptSpec(layout(choice), INPUT, []))

    expected = logprobs(reference, f"{INPUT}\nWhich?\nAnswer:", options)
    assert judged.logprobs == pytest.approx(expected, abs=1e-4)
    assert judged.label_mass == pytest.approx(sum(map(math.exp, expected)), rel=1e-4)
    assert sum(judged.distribution) == pytest.approx(1, abs=1e-12)
    assert judged.log_odds == pytest.approx(expected[0] - math.log(sum(map(math.exp, expected[1:]))), abs=1e-4)


async def test_a_scale_of_10_levels(pipeline: Pipeline, reference: Reference, words: list[str]) -> None:
    """Its level is the expected one within the labels, its score a ninth of that."""
    levels = words[:10]

    (judged,) = await judge(pipeline, PromptSpec(layout(Scale.of(levels)), INPUT, []))

    chances = [math.exp(value) for value in logprobs(reference, f"{INPUT}\nWhich?\nAnswer:", levels)]
    expected = sum(k * chance for k, chance in enumerate(chances)) / sum(chances)
    assert judged.grade == pytest.approx(expected, rel=1e-4)
    assert judged.score == pytest.approx(expected / 9, rel=1e-4)


async def test_questions_of_every_kind_in_one_group_are_those_asked_alone(pipeline: Pipeline, words: list[str]) -> None:
    """Whatever is asked with it, and though they share the input, a question has the same bits."""
    questions = [
        Predicate.of(words[:2], words[2:4]),
        Choice(tuple(Option(word, (word,)) for word in words[:40])),
        Scale.of(words[:7]),
    ]
    specs = [PromptSpec(layout(each, f"Question {n}?"), INPUT, []) for n, each in enumerate(questions)]

    together = await judge(pipeline, *specs)
    alone = [(await judge(pipeline, spec))[0] for spec in specs]

    assert [judged.logprobs for judged in together] == [judged.logprobs for judged in alone]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ((" Yes", " Yes"), "a first label and a second label are the same token"),
        ((" Yes", " No way"), "second label 0 is "),
    ],
)
async def test_options_that_no_token_tells_apart_are_refused(
    pipeline: Pipeline, labels: tuple[str, str], problem: str
) -> None:
    """Nothing is approximated: the error names the option."""
    choice = Choice((Option("first", labels[:1]), Option("second", labels[1:])))

    with pytest.raises(ServiceError) as caught:
        await judge(pipeline, PromptSpec(layout(choice), INPUT, []))

    assert caught.value.code is ErrorCode.BAD_LABEL
    assert problem in caught.value.message


async def test_a_group_fails_as_a_whole_and_alone(pipeline: Pipeline, words: list[str]) -> None:
    """One prompt that is too long fails its group, not the group beside it."""
    predicate = layout(Predicate.of(words[:1], words[1:2]))
    good, long = PromptSpec(predicate, INPUT, []), PromptSpec(predicate, INPUT * 1000, [])

    failed, judged = await pipeline.judge([[good, long], [good, good]], Call(time.monotonic() + 60))

    assert isinstance(failed, ServiceError)
    assert failed.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
    assert isinstance(judged, list)
    assert len(judged) == 2
