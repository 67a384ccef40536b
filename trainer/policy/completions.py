"""What is sent to a server with OpenAI's API for one response, and what its answer holds.

Four ways of asking, from the one that fixes most to the one that every server takes: the prompt as token ids
(/completions) or as messages (/chat/completions), each with fields beyond OpenAI's API or without. The further fields
turn off what a server would otherwise apply beside temperature and top_p: the model's own generation settings, or the
server's (llama.cpp's are top_k 40 and min_p 0.05).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from client.chat import NO_THINKING
from trainer.policy.requests import SampleSettings, SamplingRequest

# Some servers take seeds of 31 bits only.
_SEEDS: Final = 1 << 31


class BadAnswerError(Exception):
    """An answer that holds no response; the string says what is wrong and quotes none of it."""


@dataclass(frozen=True, slots=True)
class Asking:
    """A way of asking. `token_ids`: the prompt in the policy's tokens, not as messages. `extended`: with the fields of
    vLLM, SGLang and llama.cpp."""

    token_ids: bool
    extended: bool

    @property
    def path(self) -> str:
        """Below the base URL."""
        return "/completions" if self.token_ids else "/chat/completions"

    def body(
        self, model: str, request: SamplingRequest, seed: int, settings: SampleSettings, stops: Sequence[int]
    ) -> dict[str, Any]:
        """A request for one response, which ends at the tokens `stops` where the server takes them."""
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        prompt = {"prompt": request.token_ids} if self.token_ids else {"messages": messages}
        return {
            "model": model,
            **prompt,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed % _SEEDS,
            **(self._extensions(stops) if self.extended else {}),
        }

    def _extensions(self, stops: Sequence[int]) -> dict[str, Any]:
        thinking = {} if self.token_ids else {"chat_template_kwargs": dict(NO_THINKING)}
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        return {**neutral, **thinking, **({"stop_token_ids": list(stops)} if stops else {})}


WAYS: Final = tuple(Asking(token_ids, extended) for token_ids in (True, False) for extended in (True, False))


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    text: str | None = None
    message: _Message = _Message()
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, whether it ended by itself, and what the server counted: its tokens and the prompt's, or None."""

    text: str
    ended: bool
    tokens: int | None
    prompt_tokens: int | None


def parse_reply(content: bytes) -> Reply:
    """The response in a body. Raises BadAnswerError, also for one that was neither finished nor cut at its limit."""
    try:
        answer = _Answer.model_validate_json(content)
    except ValidationError as error:
        raise BadAnswerError("is not in the form of OpenAI's API") from error
    if not answer.choices:
        raise BadAnswerError("holds no choice")
    choice, usage = answer.choices[0], answer.usage or _Usage()
    text = choice.message.content if choice.text is None else choice.text
    if text is None:
        raise BadAnswerError("holds a choice without text")
    if choice.finish_reason not in ("stop", "length"):
        raise BadAnswerError(f"has the finish reason {str(choice.finish_reason)[:40]!r}, neither stop nor length")
    ended = choice.finish_reason == "stop"
    # The token that ended the response is counted, but does not belong to it.
    tokens = None if usage.completion_tokens is None else max(0, usage.completion_tokens - ended)
    return Reply(text, ended, tokens, usage.prompt_tokens)
