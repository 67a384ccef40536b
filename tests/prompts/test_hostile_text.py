"""Texts made to cost more than their length: each costs linear time, and no other caller waits for it."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
import pytest

from service.errors import ServiceError
from service.judge.grades import parse_grade
from service.prompts.builder import PromptBuilder
from service.prompts.length_bound import least_composed
from tests.prompts.makers import composing_tokenizer, inline, tokenizer_named
from tests.support.live import Live, live_service

# What was quadratic took minutes for these sizes; what is linear takes a fraction of a second.
BOUND = 10.0
MARKS = "\u0300" * 40_000 + "\u0316" * 40_000
NAMES = ["".join(letters) for letters in islice(product(ascii_lowercase, repeat=4), 100_000)]
INLINE = {"format": "raw", "layout": "{prompt} {response}", "labels": {"yes": [" Yes"], "no": [" No"]}}
PAIR = {"prompt": "What is 2+2?", "response": "4"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A service whose tokenizer composes text to NFC, as Qwen's does."""
    folder: Path = tmp_path_factory.mktemp("composing")
    composing_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 2048}')
    with live_service(model=str(folder), max_batch_items=8) as service:
        yield service


def asked(live: Live, path: str, body: object) -> tuple[httpx.Response, float, float]:
    """The answer, how long it took, and how long /health took meanwhile, in seconds."""
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{live.url}{path}", json=body, timeout=300)
        time.sleep(0.05)
        asked_at = time.monotonic()
        httpx.get(f"{live.url}/health", timeout=300).raise_for_status()
        health = time.monotonic() - asked_at
        return answer.result(), time.monotonic() - started, health


@pytest.mark.parametrize(
    "body",
    [
        {**PAIR, "prompt": MARKS},
        {**PAIR, "response": "a" + MARKS},
        {**PAIR, "prompt": [{"role": "system", "content": MARKS}, {"role": "user", "content": "x"}]},
        {**PAIR, "template": {**INLINE, "layout": MARKS + "{prompt} {response}"}},
        {**PAIR, "template": {**INLINE, "layout": "{instruction} {prompt} {response}", "instruction": MARKS}},
    ],
    ids=["prompt", "response", "turn", "layout", "instruction"],
)
def test_a_run_of_combining_marks_is_refused_at_once(live: Live, body: dict[str, Any]) -> None:
    """Wherever it stands, it is found too long without being composed, and other callers are answered meanwhile."""
    answer, seconds, health = asked(live, "/score", body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert max(seconds, health) < BOUND


def test_a_run_of_combining_marks_is_cut_where_that_is_allowed(live: Live) -> None:
    """The cut leaves a text that is judged, in linear time."""
    answer, seconds, _ = asked(live, "/score", {**PAIR, "response": MARKS, "truncation": "response_middle"})

    assert answer.json()["truncated"]
    assert seconds < BOUND


def test_unknown_fields_without_number_are_one_error(live: Live) -> None:
    """Each used to be an error of its own, compared with every other one, on the event loop."""
    answer, seconds, health = asked(live, "/score", PAIR | dict.fromkeys(NAMES, 1))

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
    assert max(seconds, health) < BOUND


def test_the_items_of_a_batch_are_counted_before_they_are_looked_at(live: Live) -> None:
    """A body has room for millions of items that are no requests."""
    answer, seconds, health = asked(live, "/score/batch", {"items": [0] * 1_000_000})

    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "payload_too_large")
    assert max(seconds, health) < BOUND


def test_a_label_of_a_megabyte_is_refused(live: Live) -> None:
    """It cannot be one token: it is neither tokenised nor remembered."""
    labels = {"yes": ["a" * 1_000_000], "no": [" No"]}

    answer, seconds, _ = asked(live, "/score", {**PAIR, "template": {**INLINE, "labels": labels}})

    assert answer.json()["error"]["code"] == "bad_label"
    assert "over 256 characters" in answer.json()["error"]["message"]
    assert seconds < BOUND


@pytest.mark.parametrize(
    "text", ["\n" * 30_000, " \n" * 15_000, "final\n" * 5_000, "score " * 5_000, "Score" + " " * 30_000]
)
def test_a_written_grade_is_looked_for_in_linear_time(text: str) -> None:
    """A model, or a server upstream, may write nothing but line ends."""
    started = time.monotonic()

    assert parse_grade(text) is None
    assert time.monotonic() - started < BOUND


def test_characters_that_no_token_stands_for_cost_linear_time() -> None:
    """A tokenizer that drops characters is not asked about each of them."""
    tokenizer = tokenizer_named("tiny")
    backend = type(tokenizer.backend_tokenizer).from_str(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"pre_tokenizer": {"type": "WhitespaceSplit"}})
    )
    prompts = PromptBuilder(type(tokenizer)(tokenizer_object=backend), 200_000)
    started = time.monotonic()

    prompts.build(
        inline("{prompt}{response} Good:", yes=["Yes"], no=["No"]), "a " * 160_000, [" " * 160_000 + "b"], "error"
    )
    assert time.monotonic() - started < BOUND


def test_a_tokenizer_of_any_kind_is_spared_megabytes() -> None:
    """One that drops text, so that no length surely is too long, does not read what is thousands of times as long."""
    tokenizer = tokenizer_named("tiny")
    backend = type(tokenizer.backend_tokenizer).from_str(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"normalizer": {"type": "StripAccents"}})
    )

    with pytest.raises(ServiceError, match="at least"):
        PromptBuilder(type(tokenizer)(tokenizer_object=backend), 512).build(
            inline("{prompt} {response} Good:"), "2+2?", ["\u0300" * 1_000_000], "error"
        )


def test_composition_never_shrinks_a_text_below_the_bound() -> None:
    """The longest spelling of every character that can be composed, alone and between others."""
    widest: dict[str, str] = {}
    for char in map(chr, (*range(0xD800), *range(0xE000, 0x30000))):
        part = unicodedata.normalize("NFD", char)
        widest[part] = max(widest.get(part, ""), char, key=lambda each: len(each.encode()))
    composed = [parts for parts in widest if len(parts) > 1]
    spelled = ["".join(widest.get(part, part) for part in parts) for parts in composed[:2_000] + composed[2_000::50]]

    for text in [*spelled, *(f"a\u4e00{each * 3}b" for each in spelled)]:
        raw = unicodedata.normalize("NFC", text).encode()
        size, words = least_composed(text.encode())
        assert size <= len(raw)
        assert words <= sum(chr(byte).isalnum() for byte in raw if byte < 0x80)
