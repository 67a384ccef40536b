"""What a model's chat template puts around a judge's prompt, which is one user message, or around a conversation."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from client.chat import NO_THINKING
from client.chat_date import DEFAULT_CHAT_DATE, apply_dated
from client.errors import ErrorCode
from service.errors import ServiceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TRIES: Final = 8

Render = Callable[..., str]


def renderer(tokenizer: PreTrainedTokenizerBase, chat_date: date | None, problem: str) -> Render:
    """The model's chat template as a function of messages and options. It raises ServiceError(BAD_TEMPLATE), saying
    that the template `problem`.

    `strftime_now` gives this date, or the default one, never the clock's: else prompts would depend on the day on which
    the process started. Templates that read `date_string` have a fixed value for it, which a given date replaces. A
    template that draws random numbers is always refused, instead of now and then.
    """
    fixed: dict[str, Any] = {"tokenize": False, "day": chat_date or DEFAULT_CHAT_DATE}
    if chat_date is not None:
        fixed["date_string"] = chat_date.strftime("%d %b %Y")

    def render(messages: Sequence[dict[str, str]], **options: Any) -> str:
        if unsteady:
            raise bad_template("the model's chat template writes another text each time: use format raw")
        return once(messages, **options)

    def once(messages: Sequence[dict[str, str]], **options: Any) -> str:
        try:
            return str(apply_dated(tokenizer, list(messages), **fixed, **options))
        except Exception as error:  # a template raises what it likes
            raise bad_template(f"the model's chat template {problem}: {error}") from error

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    unsteady = False
    for probe in (turns[:1], turns):
        with suppress(ServiceError):
            unsteady |= len({once(probe) for _ in range(_TRIES)}) > 1
    return render


class ChatFrame:
    """The head before the message and the tail after it.

    Nearly every template writes a head, the message (some trim it) and a tail. Where that holds for all probes, no
    Jinja runs for a request. Otherwise each message is rendered and compared, and refused if more has changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_date: date | None = None) -> None:
        """`chat_date` is the date that the template gets; see `renderer`."""
        self._template = renderer(tokenizer, chat_date, "fails (use format raw)")
        self._mark = secrets.token_hex(16)
        self._head, self._tail = "", ""
        self._trims: tuple[bool, bool] | None = None
        with suppress(ServiceError):  # no template, or one that fails: reported when a message is rendered
            self._head, _, self._tail = self._render(self._mark).partition(self._mark)
            self._trims = self._trims_of_all(self._probes())

    @property
    def written(self) -> str:
        """All that the template itself writes; empty if it does not work."""
        return self._head + self._tail

    def around(self, content: str) -> tuple[str, str, str, int]:
        """Head, message as the template writes it, tail, and how many characters were trimmed from its left."""
        trims = self._trims or self._trims_of_all([content])
        if trims is None:
            raise bad_template("the model's chat template changes this text: use format raw")
        body, trimmed = _trim(content, *trims)
        return self._head, body, self._tail, trimmed

    def _probes(self) -> list[str]:
        space, mark = " \t\n\u00a0\u2003", self._mark
        return [
            space + mark + space,
            f"{mark} /think /no_think </think> <tool_response> {{{{ 1 }}}} {{% x %}} {mark}",
            f"<tool_response>{mark}</tool_response>",
            f"[INST] {mark} [/INST] <<SYS>> </s> <|im_end|>\n\n<think>{mark}</think>",
        ]

    def _trims_of_all(self, contents: Sequence[str]) -> tuple[bool, bool] | None:
        """On which sides these messages are trimmed; None if they change in another way."""
        rendered = [self._render(content) for content in contents]
        for left, right in ((False, False), (True, True), (True, False), (False, True)):
            if rendered == [self._head + _trim(content, left, right)[0] + self._tail for content in contents]:
                return left, right
        return None

    def _render(self, content: str) -> str:
        return self._template([{"role": "user", "content": content}], add_generation_prompt=True, **NO_THINKING)


class ConversationFrame:
    """The text before, between and after the turns of a conversation, up to the end of the assistant's last one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_date: date | None = None) -> None:
        """Raises ServiceError(BAD_TEMPLATE) for a model without a chat template."""
        if not tokenizer.chat_template:
            raise bad_template("this model has no chat template, which the judge reward-model reads answers through")
        self._template = renderer(tokenizer, chat_date, "refuses this conversation")
        self._mark = secrets.token_hex(16)
        self._pieces = lru_cache(maxsize=256)(self._pieces_of)

    @property
    def written(self) -> str:
        """All that the template itself writes around a question and its answer; empty if it fails on them."""
        with suppress(ServiceError):
            return "".join(self._pieces(("user", "assistant")))
        return ""

    def around(self, turns: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], list[str]]:
        """For turns of role and content: the pieces around the contents, one more than there are turns, and the
        contents as the template writes them (some trim).

        Raises ServiceError(BAD_TEMPLATE) where the template refuses these roles, or changes a content in another way.
        """
        pieces = self._pieces(tuple(role for role, _ in turns))
        rendered = self._render(turns)
        for left, right in ((False, False), (True, True), (True, False), (False, True)):
            texts = [_trim(content, left, right)[0] for _, content in turns]
            if rendered == _woven(pieces, texts):
                return pieces, texts
        raise bad_template("the model's chat template changes these texts beyond trimming them")

    def _pieces_of(self, roles: tuple[str, ...]) -> tuple[str, ...]:
        marks = [f"{self._mark}.{index};" for index in range(len(roles))]
        rest = self._render(list(zip(roles, marks, strict=True)))
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise bad_template("the model's chat template leaves out a turn of the conversation, or moves it")
            pieces.append(piece)
        return (*pieces, rest)

    def _render(self, turns: Sequence[tuple[str, str]]) -> str:
        return self._template([{"role": role, "content": content} for role, content in turns])


def _woven(pieces: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(part for pair in zip(pieces, texts, strict=False) for part in pair) + pieces[-1]


def bad_template(problem: str) -> ServiceError:
    """The error for a template that does not work with this model."""
    return ServiceError(ErrorCode.BAD_TEMPLATE, problem, param="template")


def _trim(text: str, left: bool, right: bool) -> tuple[str, int]:
    """The text without white space on these sides, and how many characters that was on the left."""
    kept = text.lstrip() if left else text
    return (kept.rstrip() if right else kept), len(text) - len(kept)
