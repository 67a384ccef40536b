"""Parses a server's answer into the log-probabilities of tokens, and finds the labels among them.

Three forms are understood: the chat API's `content`, a list of tokens with their `top_logprobs` (from llama.cpp with
ids, in both APIs); the completions API's columns, with tokens as text (SGLang); the same columns with tokens as
`token_id:123` (vLLM with `return_tokens_as_token_ids`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, Field

from client.stats import logsumexp
from service.engine.contract import GeneratedText, estimate_tokens
from service.engine.upstream.bodies import parse_body, unreadable
from service.engine.upstream.returned import ZERO_LOGPROB

_TOKEN_ID: Final = "token_id:"

# Longer numbers are no token ids.
_ID_DIGITS: Final = 10
# Rounding may give a little more than 0 for certainty; some servers send the lowest float for probability 0.
_Logprob = Annotated[float, Field(allow_inf_nan=False, le=1e-3), AfterValidator(lambda value: max(value, ZERO_LOGPROB))]


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
    """A token with its log-probability. `id` is None if the server names tokens by text only."""

    text: str
    logprob: float
    id: int | None = None


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """What a server returned for the next token: the sampled token, and all the tokens it listed, that one included."""

    sampled: Token
    tokens: tuple[Token, ...]
    cached_tokens: int = 0

    @property
    def argmax(self) -> Token:
        """The most likely one."""
        return max(self.tokens, key=lambda token: token.logprob)

    @property
    def collapsed(self) -> bool:
        """Whether the list is missing: it holds only the sampled token and fillers of probability 0.

        vLLM 0.32 does this in a step that also serves a request with `logprob_token_ids` (vLLM pull request 51789).
        """
        return len(self.tokens) > 1 == sum(token.logprob > ZERO_LOGPROB for token in self.tokens)

    @property
    def lowest(self) -> float:
        """The lowest log-probability above zero's: an upper bound for tokens that were not returned."""
        return min((token.logprob for token in self.tokens if token.logprob > ZERO_LOGPROB), default=0.0)


def merge_answers(answers: Sequence[TopLogprobs]) -> TopLogprobs:
    """Answers about one prompt as one, with the first one's sampled token and cached tokens."""
    return replace(answers[0], tokens=tuple(token for answer in answers for token in answer.tokens))


def parse_logprobs(content: bytes) -> TopLogprobs:
    """The log-probabilities in a response body. Raises UpstreamError if there are none."""
    body = _parse_body(content)
    logprobs = body.choices[0].logprobs
    if logprobs is None:
        advice = "if it makes decisions, --upstream-api decisions or systemone needs none"
        raise unreadable(f"holds no logprobs: it, or this model of it, does not give them; {advice}")
    sampled, listed = _from_content(logprobs) if isinstance(logprobs, _Content) else _from_columns(logprobs)
    if not any(_is_same(sampled, token) for token in listed):
        listed = [sampled, *listed]
    return TopLogprobs(sampled, tuple(listed), _cached_tokens(body))


def parse_text(content: bytes) -> GeneratedText:
    """The generated text in a response body. Its length is the server's count, or estimated if that is implausible.

    Raises UpstreamError if there is no text, or if it ended neither by itself nor at the limit.
    """
    body = _parse_body(content)
    choice = body.choices[0]
    text = choice.message.content if choice.message else choice.text
    if text is None or choice.finish_reason not in {"stop", "length"}:
        raise unreadable("holds no text that was written to its end or to the limit")
    count = body.usage.completion_tokens if body.usage else None
    # A token has at least one byte, but for the one that ends the text.
    new_tokens = count if count is not None and 0 <= count <= len(text.encode()) + 1 else estimate_tokens(text)
    return GeneratedText(text, choice.finish_reason == "stop", new_tokens, _cached_tokens(body))


def _parse_body(content: bytes) -> _Body:
    body = parse_body(_Body, content, "OpenAI's API")
    if body.choices[0].finish_reason == "content_filter":
        raise unreadable("was withheld by its content filter")
    return body


def _cached_tokens(body: _Body) -> int:
    details = body.usage and body.usage.prompt_tokens_details
    return max(0, (details.cached_tokens if details else None) or 0)


def _from_content(logprobs: _Content) -> tuple[Token, list[Token]]:
    first = logprobs.content[0]
    # An entry may be repeated, but two tokens may also have the same text (SentencePiece's with and without a leading
    # space): without ids, only entries that agree in everything are taken to be the same token.
    distinct = {
        (entry.token, tuple(entry.bytes or ()), entry.logprob) if entry.id is None else entry.id: entry
        for entry in first.top_logprobs
    }
    return _token(first), [_token(entry) for entry in distinct.values()]


def _from_columns(logprobs: _Columns) -> tuple[Token, list[Token]]:
    logprob = logprobs.token_logprobs[0]
    if logprob is None:
        raise unreadable("holds no probability of its first token")
    top = (logprobs.top_logprobs or [None])[0] or {}
    return _token_named(logprobs.tokens[0], logprob), [_token_named(name, value) for name, value in top.items()]


def _token(entry: _Listed) -> Token:
    return (
        Token(entry.token, entry.logprob, entry.id)
        if entry.id is not None
        else _token_named(entry.token, entry.logprob)
    )


def _token_named(name: str, logprob: float) -> Token:
    digits = name.removeprefix(_TOKEN_ID)
    is_id = digits != name and digits.isascii() and digits.isdecimal() and len(digits) <= _ID_DIGITS
    return Token(name, logprob, int(digits) if is_id else None)


def _is_same(one: Token, other: Token) -> bool:
    return one.text == other.text if one.id is None or other.id is None else one.id == other.id


def by_id(tokens: Iterable[Token], label_ids: Sequence[int]) -> list[float | None]:
    """The log-probability of each label id, None for one that was not returned."""
    logprobs = {token.id: token.logprob for token in tokens}
    return [logprobs.get(label) for label in label_ids]


def by_text(tokens: Iterable[Token], labels: Sequence[str]) -> list[float | None]:
    """The log-probability of each label, None for one that was not returned. Texts must be equal."""
    logprobs = {token.text: token.logprob for token in tokens}
    return [logprobs.get(label) for label in labels]


def word_of(text: str) -> str:
    """The text without surrounding white space, which some servers write in their tokenizer's alphabet."""
    return text.removeprefix("\u2581").removeprefix("\u0120").strip()


def label_index(text: str, labels: Sequence[str]) -> int | None:
    """The label that a token spells, up to white space around it; None if it spells none.

    Among labels that differ in white space only, it is the one equal to the token, else the first.
    """
    word = word_of(text)
    spelled = [index for index, label in enumerate(labels) if word_of(label) == word] if word else []
    return next((index for index in spelled if labels[index] == text), spelled[0] if spelled else None)


def by_word(tokens: Iterable[Token], labels: Sequence[str]) -> list[float | None]:
    """For each label, the log of its tokens' summed probabilities (see `label_index`); each token counts once.

    None for a label none of whose tokens was returned, unless it differs only in white space from one that was: the
    two are spellings of one reply, and the unreturned one gets ZERO_LOGPROB.
    """
    spellings: list[list[float]] = [[] for _ in labels]
    for token in tokens:
        index = label_index(token.text, labels)
        if index is not None:
            spellings[index].append(token.logprob)
    returned = {word_of(label) for label, logprobs in zip(labels, spellings, strict=True) if logprobs}
    return [
        logsumexp(logprobs) if logprobs else ZERO_LOGPROB if word_of(label) in returned else None
        for label, logprobs in zip(labels, spellings, strict=True)
    ]
