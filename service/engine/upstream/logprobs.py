"""What a server's answer says of the next token, and which of it is which label's.

Three forms are read: the chat API's `content`, a list of tokens with their `top_logprobs` (llama.cpp gives ids with it,
in both APIs); the completions API's columns, with text for tokens (SGLang); the same with `token_id:123` for tokens
(vLLM with `return_tokens_as_token_ids`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from client.errors import ErrorCode
from client.stats import logsumexp
from service.engine.contract import GeneratedText, text_tokens
from service.engine.upstream.openai_client import UpstreamError

UNSEEN: Final = -9999.0
"""The log-probability of a spelling that was not returned while another one of its label was: nothing. Servers
themselves write so for zero."""

_TOKEN_ID: Final = "token_id:"

# Digits of a token's id.
_ID_DIGITS: Final = 10
# A little above 0: what rounding gives for certainty. Some servers write the lowest float for zero.
_Logprob = Annotated[float, Field(allow_inf_nan=False, le=1e-3), AfterValidator(lambda value: max(value, UNSEEN))]


class _Listed(BaseModel):
    token: str
    logprob: _Logprob
    id: int | None = None
    bytes: list[int] | None = None


class _Chosen(_Listed):
    top_logprobs: list[_Listed] = []


class _Content(BaseModel):
    content: list[_Chosen] = Field(min_length=1)


class _Columns(BaseModel):
    tokens: list[str] = Field(min_length=1)
    token_logprobs: list[_Logprob | None] = Field(min_length=1)
    top_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    logprobs: _Content | _Columns | None = None
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Details(BaseModel):
    cached_tokens: int | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Body(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token that may come next. `id` is None where the server says its text only."""

    text: str
    logprob: float
    id: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The token that the server chose, and all that it returned, that one included, each once."""

    chosen: Token
    tokens: tuple[Token, ...]
    cached_tokens: int = 0

    @property
    def likeliest(self) -> Token:
        """The likeliest of them."""
        return max(self.tokens, key=lambda token: token.logprob)

    @property
    def collapsed(self) -> bool:
        """Whether the likeliest tokens were left out: only the chosen one, and one that stands for nothing.

        vLLM 0.32 does so in a step in which another caller's request has `logprob_token_ids` (its pull request 51789).
        """
        return len(self.tokens) > 1 == sum(token.logprob > UNSEEN for token in self.tokens)

    @property
    def least(self) -> float:
        """The lowest log-probability among them but for those of nothing: what was not returned has no higher one."""
        return min((token.logprob for token in self.tokens if token.logprob > UNSEEN), default=0.0)


def read(content: bytes) -> Answer:
    """The answer in the body of a response. Raises UpstreamError for what is none, or says no probabilities."""
    body = _body(content)
    logprobs = body.choices[0].logprobs
    if logprobs is None:
        raise _unreadable("holds no logprobs: it, or this model of it, does not give them")
    chosen, listed = _of_content(logprobs) if isinstance(logprobs, _Content) else _of_columns(logprobs)
    if not any(_same(chosen, token) for token in listed):
        listed = [chosen, *listed]
    return Answer(chosen, tuple(listed), _cached(body))


def read_text(content: bytes) -> GeneratedText:
    """The text in the body of a response; its tokens as the server counts them, else estimated.

    Raises UpstreamError for what is none, or was not finished otherwise.
    """
    body = _body(content)
    choice = body.choices[0]
    text = choice.message.content if choice.message else choice.text
    if text is None or choice.finish_reason not in {"stop", "length"}:
        raise _unreadable("holds no text that was written to its end or to the limit")
    told = body.usage.completion_tokens if body.usage else None
    # No text has more tokens than bytes: what else a server counts is a mistake.
    new_tokens = told if told is not None and 0 <= told <= len(text.encode()) + 1 else text_tokens(text)
    return GeneratedText(text, choice.finish_reason == "stop", new_tokens, _cached(body))


def _body(content: bytes) -> _Body:
    try:
        body = _Body.model_validate_json(content)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise _unreadable("is not JSON: does a proxy answer, or is --upstream-url another server's?") from exc
        where = ".".join(str(step) for step in first["loc"])
        raise _unreadable(f"is not in the form of OpenAI's API ({where}: {first['msg']})") from exc
    if body.choices[0].finish_reason == "content_filter":
        raise _unreadable("was withheld by its content filter")
    return body


def _cached(body: _Body) -> int:
    details = body.usage and body.usage.prompt_tokens_details
    return max(0, (details.cached_tokens if details else None) or 0)


def _of_content(logprobs: _Content) -> tuple[Token, list[Token]]:
    first = logprobs.content[0]
    # A token that is listed twice is one; two tokens of one text (SentencePiece's with and without its space) are two.
    distinct = {
        (entry.token, tuple(entry.bytes or ()), entry.logprob) if entry.id is None else entry.id: entry
        for entry in first.top_logprobs
    }
    return _token(first), [_token(entry) for entry in distinct.values()]


def _of_columns(logprobs: _Columns) -> tuple[Token, list[Token]]:
    logprob = logprobs.token_logprobs[0]
    if logprob is None:
        raise _unreadable("holds no probability of its first token")
    top = (logprobs.top_logprobs or [None])[0] or {}
    return _named(logprobs.tokens[0], logprob), [_named(name, value) for name, value in top.items()]


def _token(entry: _Listed) -> Token:
    return Token(entry.token, entry.logprob, entry.id) if entry.id is not None else _named(entry.token, entry.logprob)


def _named(name: str, logprob: float) -> Token:
    digits = name.removeprefix(_TOKEN_ID)
    known = digits != name and digits.isascii() and digits.isdecimal() and len(digits) <= _ID_DIGITS
    return Token(name, logprob, int(digits) if known else None)


def _same(one: Token, other: Token) -> bool:
    return one.text == other.text if one.id is None or other.id is None else one.id == other.id


def _unreadable(what: str) -> UpstreamError:
    return UpstreamError(ErrorCode.INFERENCE_FAILED, f"the upstream server's answer {what}")


def by_id(tokens: Iterable[Token], label_ids: Sequence[int]) -> list[float | None]:
    """The log-probability of each id; None for what was not returned."""
    found = {token.id: token.logprob for token in tokens}
    return [found.get(label) for label in label_ids]


def by_text(tokens: Iterable[Token], labels: Sequence[str]) -> list[float | None]:
    """The log-probability of each text, letter by letter; None for what was not returned."""
    found = {token.text: token.logprob for token in tokens}
    return [found.get(label) for label in labels]


def word_of(text: str) -> str:
    """The word of a token or a label: some servers write the space before a word as their tokenizer does."""
    return text.removeprefix("\u2581").removeprefix("\u0120").strip()


def owner(text: str, labels: Sequence[str]) -> int | None:
    """Which label a reply that begins with this token gives: white space around it does not count, all else does.

    Among labels that differ in white space only, it is the one that is written like the token, else the first.
    """
    word = word_of(text)
    like = [index for index, label in enumerate(labels) if word_of(label) == word] if word else []
    return next((index for index in like if labels[index] == text), like[0] if like else None)


def by_word(tokens: Iterable[Token], labels: Sequence[str]) -> list[float | None]:
    """The log of the summed probabilities of each label's tokens (see `owner`), each token counted once.

    None for a label of which no token was returned. Labels that differ in white space only are spellings of one
    reply: it suffices that one of them was returned, and the others are UNSEEN.
    """
    shares: list[list[float]] = [[] for _ in labels]
    for token in tokens:
        index = owner(token.text, labels)
        if index is not None:
            shares[index].append(token.logprob)
    seen = {word_of(label) for label, share in zip(labels, shares, strict=True) if share}
    return [
        logsumexp(share) if share else UNSEEN if word_of(label) in seen else None
        for label, share in zip(labels, shares, strict=True)
    ]
