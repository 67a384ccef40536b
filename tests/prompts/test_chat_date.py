"""Chat templates that ask for today's date: prompts are the same on every day, and in every process."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from client.errors import ErrorCode
from client.schema import Message
from service.errors import ServiceError
from service.judge.template_files import load_library
from service.prompts.builder import PromptBuilder
from service.prompts.chat_template import ConversationFrame
from tests.support.live import live_service
from tests.support.tiny import CHAT_TEMPLATE, tiny_tokenizer
from trainer.policy.tokenizers import chat_ids, load_tokenizer

NOW = "{{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}\n" + CHAT_TEMPLATE
LLAMA = (
    "{% if not date_string is defined %}"
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}Today Date: {{ date_string }}\n"
    + CHAT_TEMPLATE
)
TOLD = "{{ date_string if date_string is defined else 'no day' }}\n" + CHAT_TEMPLATE
CHAT = load_library("chat").default("pointwise")


def tokenizer_with(template: str) -> Any:
    """The tiny tokenizer with this chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def ids(template: str, day: date | None = None) -> tuple[int, ...]:
    """A prompt of a builder made now."""
    return PromptBuilder(tokenizer_with(template), 2048, chat_date=day).build(CHAT, "2+2?", ["4"], "error").token_ids


def text(template: str, day: date | None = None) -> str:
    """The same prompt, decoded."""
    return str(tiny_tokenizer().decode(list(ids(template, day))))


def folder_with(template: str, folder: Path) -> Path:
    """A model's folder as far as the fake engine needs one."""
    tokenizer_with(template).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    return folder


def test_the_moment_at_which_a_process_starts_is_in_no_prompt() -> None:
    """Not a microsecond of it: two processes give the same bits."""
    assert ids(NOW) == ids(NOW)
    assert text(NOW).startswith("26 Jul 2024, 00:00:00.000000")


@pytest.mark.parametrize("template", [LLAMA, TOLD])
def test_the_date_is_a_setting(template: str) -> None:
    """By both of the names under which templates ask for it."""
    assert "31 Jan 2025" in text(template, date(2025, 1, 31))


def test_unset_it_is_what_templates_take_by_themselves() -> None:
    """Llama's own date, and no `date_string` where nobody gave one."""
    assert text(LLAMA).startswith("Today Date: 26 Jul 2024")
    assert text(TOLD).startswith("no day")


def test_a_conversation_has_the_date_too() -> None:
    """What a reward model reads is rendered by the same template."""
    pieces = [ConversationFrame(tokenizer_with(NOW)).around([("user", "a"), ("assistant", "b")]) for _ in range(2)]

    assert pieces[0] == pieces[1]
    assert "26 Jul 2024" in pieces[0][0][0]


@pytest.mark.parametrize("draw", ["{{ [1, 2, 3, 4] | random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_is_refused(draw: str) -> None:
    """Always, and not now and then."""
    with pytest.raises(ServiceError, match="another text each time") as caught:
        ids(draw + CHAT_TEMPLATE)

    assert caught.value.code is ErrorCode.BAD_TEMPLATE


@pytest.mark.parametrize(
    "fails", ["{{ 1 // 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ raise_exception('x') }}"]
)
def test_whatever_a_template_raises_is_a_bad_template(fails: str) -> None:
    """A division by zero, too long a range, its own exception."""
    with pytest.raises(ServiceError) as caught:
        ids(fails + CHAT_TEMPLATE)

    assert caught.value.code is ErrorCode.BAD_TEMPLATE


def test_another_date_is_another_judge(tmp_path: Path) -> None:
    """Where it changes prompts, results carry another fingerprint, so that runs and calibrations do not mix."""
    folder = str(folder_with(LLAMA, tmp_path))
    days: list[dict[str, object]] = [{}, {"chat_date": "2024-07-26"}, {"chat_date": "2025-01-31"}]
    found = []
    for day in days:
        with live_service(model=folder, **day) as live:
            found.append(live.http.get("/v1/models").json()["data"][0]["fingerprint"])
            scored = live.http.post("/score", json={"prompt": "2+2?", "response": "4"}).json()

    assert found[0] == found[1] != found[2] == scored["fingerprint"]


def test_a_date_that_no_prompt_shows_changes_nothing(tmp_path: Path) -> None:
    """The fingerprint is that of the model."""
    folder = str(folder_with(CHAT_TEMPLATE, tmp_path))
    with live_service(model=folder) as usual, live_service(model=folder, chat_date="2025-01-31") as dated:
        found = {live.http.get("/v1/models").json()["data"][0]["fingerprint"] for live in (usual, dated)}

    assert len(found) == 1


def test_a_run_of_the_trainer_has_the_same_prompts_on_every_day(tmp_path: Path) -> None:
    """Sampling, and training after it, which may be on another day."""
    folder = folder_with(NOW, tmp_path)
    messages = [Message(role="user", content="2+2?")]

    first, second = (chat_ids(load_tokenizer(folder), messages) for _ in range(2))

    assert first == second
    assert tiny_tokenizer().decode(first).startswith("26 Jul 2024")
