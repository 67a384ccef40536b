"""What a model's chat template puts around the one user message that a judge's prompt is."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from client.errors import ErrorCode
from service.errors import ServiceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatFrame:
    """The head before the message and the tail behind it.

    Nearly every template writes a head, the message (some trim it) and a tail. Where that holds for all of the probes,
    no Jinja runs for a request. Else each message is rendered and compared, and refused where more has changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._mark = secrets.token_hex(16)
        self._head, self._tail = "", ""
        self._trims: tuple[bool, bool] | None = None
        with suppress(ServiceError):  # no template, or one that fails: said when a message is rendered
            self._head, _, self._tail = self._render(self._mark).partition(self._mark)
            self._trims = self._trims_of_all(self._probes())

    @property
    def written(self) -> str:
        """All that the template itself writes; empty where there is none that works."""
        return self._head + self._tail

    def around(self, content: str) -> tuple[str, str, str, int]:
        """Head, message as the template writes it, tail, and the number of characters trimmed from its left."""
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
        """On which sides these messages are trimmed; None where they change in another way."""
        rendered = [self._render(content) for content in contents]
        for left, right in ((False, False), (True, True), (True, False), (False, True)):
            if rendered == [self._head + _trim(content, left, right)[0] + self._tail for content in contents]:
                return left, right
        return None

    def _render(self, content: str) -> str:
        try:
            # Qwen3 and its like think first unless told otherwise; templates ignore names that they do not know.
            rendered = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise bad_template(f"the model's chat template fails: {error}; use format raw") from error
        return str(rendered)


def bad_template(problem: str) -> ServiceError:
    """The refusal of a template that does not work with this model."""
    return ServiceError(ErrorCode.BAD_TEMPLATE, problem, param="template")


def _trim(text: str, left: bool, right: bool) -> tuple[str, int]:
    """The text without the white space on these sides, and how much of it stood on the left."""
    kept = text.lstrip() if left else text
    return (kept.rstrip() if right else kept), len(text) - len(kept)
