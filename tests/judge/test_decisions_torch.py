"""Typed decisions over HTTP on a real model: what shares an input is read once, and changes no bit of anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.stats import logsumexp
from service.engine.torch.engine import TorchEngine
from service.judge.template_files import load_library
from service.models.resolve import resolve
from tests.judge.makers import logprobs
from tests.support.live import Live, live_service
from tests.support.reference import Reference
from tests.support.tiny import CORPUS, make_tiny_model, tiny_tokenizer

STATE = " ".join([*CORPUS, *CORPUS])[:1500]
PREDICATES = [{"type": "predicate", "instructions": f"Does it say {word}?"} for word in ("fox", "Paris", "add", "Yes")]
CHOICE = {
    "type": "choice",
    "instructions": "What is it about?",
    "choices": [{"value": "animals"}, {"value": "cities", "description": "and countries"}, {"value": False}],
}
SCORE = {
    "type": "score",
    "instructions": "How long is it?",
    "levels": [{"label": "short"}, {"label": "long", "description": "more than a line"}],
}
METRICS = ("judge_batch_jobs_count", "judge_tokens_total", "judge_cached_tokens_total")
EIGHT = [*PREDICATES, CHOICE, SCORE, {**CHOICE, "instructions": "And not?"}, {**SCORE, "instructions": "How good?"}]


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Live]:
    """A service over the model in fp32 that remembers nothing."""
    options = {"dtype": "float32", "device": "cpu", "threads": 1, **options}
    with (
        closing(TorchEngine.load(folder, **options)) as engine,
        live_service(engine, model=str(folder), cache_entries=0, log_level="error") as live,
    ):
        yield live


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Over the tiny model, by compiled code where the machine has the units."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"), heads=2, rounded=True)
    with serving(folder, batch_tokens=2048) as service:
        yield service


def decide(live: Live, state: str, *questions: object) -> dict[str, Any]:
    """The answer's body."""
    answer = live.http.post("/v1/decisions", json={"input": state, "questions": questions})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_eight_questions_are_eight_requests_and_read_their_input_once(live: Live) -> None:
    """All numbers are the same to the last bit. Seven of the eight prompts find the input there, although together they
    are more tokens than a batch may have."""
    alone = [decide(live, STATE, question) for question in EIGHT]
    before = [live.value(name) for name in METRICS]

    together = decide(live, STATE, *EIGHT)

    assert together["answers"] == [answer for result in alone for answer in result["answers"]]
    usage, length = together["usage"], len(tiny_tokenizer()(STATE).input_ids)
    assert usage["input_tokens"] == sum(result["usage"]["input_tokens"] for result in alone)
    assert usage["input_tokens"] > 2048
    assert [result["usage"]["input_tokens_details"]["cached_tokens"] for result in alone] == [0] * 8
    cached = usage["input_tokens_details"]["cached_tokens"]
    assert 7 * length < cached < 7 * (length + 20)
    after = [live.value(name) for name in METRICS]
    assert [late - early for early, late in zip(before, after, strict=True)] == [1, usage["input_tokens"], cached]


def shown(state: str, question: str, options: list[str]) -> str:
    """What SmolLM2 reads of a choice, written out."""
    instruction = load_library("chat").get("choice").instruction
    listed = "\n".join(f"{mark}. {option}" for mark, option in zip("ABCDEFGH", options, strict=False))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    asked = f"Input:\n{state}\n\nQuestion:\n{question}\n\nOptions:\n{listed}\n\n{instruction}"
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.models
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("native", "tolerance"), [(False, 1e-5), (True, 4e-5)])
def test_a_choices_probabilities_are_those_of_smollm2(native: bool, tolerance: float) -> None:
    """In fp32, those of transformers' own forward over the same words."""
    folder = resolve("smollm2-135m-instruct").path
    state, question = "The parcel arrived broken, and nobody answers the phone.", "Which team should answer?"
    teams = ["billing", "delivery: parcels", "sales", "bill", "legal"]
    choices = [{"value": name.partition(": ")[0]} for name in teams]
    choices[1]["description"] = "parcels"
    reference = Reference(folder)
    expected = logprobs(reference, shown(state, question, teams), list("ABCDE"))

    with serving(folder, native_kernels=native, threads=2) as live:
        (answer,) = decide(live, state, {"type": "choice", "instructions": question, "choices": choices})["answers"]

    chances = [math.exp(value - logsumexp(expected)) for value in expected]
    assert [entry["probability"] for entry in answer["probabilities"]] == pytest.approx(chances, rel=0, abs=tolerance)
    # The mass is a sum over the options against all other tokens, and takes up the rounding of every logit.
    assert answer["x_label_mass"] == pytest.approx(math.exp(logsumexp(expected)), rel=0, abs=4e-5)


@pytest.mark.models
@pytest.mark.timeout(1800)
def test_smollm2_has_marks_for_255_options() -> None:
    """Letters, digits and pairs of letters that are one token each."""
    choices = [{"value": f"number {number}"} for number in range(255)]

    with serving(resolve("smollm2-135m-instruct").path, threads=2) as live:
        (answer,) = decide(live, "7 * 6", {"type": "choice", "instructions": "What is it?", "choices": choices})[
            "answers"
        ]

    assert sum(entry["probability"] for entry in answer["probabilities"]) == pytest.approx(1, abs=1e-9)
    assert len({entry["probability"] for entry in answer["probabilities"]}) > 250
