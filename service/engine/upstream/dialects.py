"""The two ways in which the upstream engine asks: what a request's body holds, and where its answer has the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from client.errors import ErrorCode
from service.engine.contract import GenerateItem, ScoreItem
from service.engine.upstream.logprobs import Answer, by_id, by_text, by_word, owner
from service.engine.upstream.openai_client import RefusalError, UpstreamError
from service.engine.upstream.text import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Seeds up to here are taken everywhere.
_MOST_STOPS: Final = 4
_SEEDS: Final = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked in every request. `model` is the server's name for it, `top` how many of the likeliest tokens are
    asked for, `extra` more fields of the request's body."""

    model: str
    top: int = 20
    extra: Mapping[str, Any] = field(default_factory=dict)


class Dialect(Protocol):
    """A way of asking."""

    path: str

    def body(self, item: ScoreItem) -> dict[str, Any]:
        """The request's body."""

    def find(self, answer: Answer, item: ScoreItem) -> tuple[list[float | None], int]:
        """The label's log-probabilities, None for one that was not returned, and the id of the likeliest token."""

    def text_body(self, item: GenerateItem) -> dict[str, Any]:
        """The request's body for a text."""

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that the server wrote, as the service's side reads them."""

    def adapt(self, refusal: RefusalError) -> bool:
        """Leave away, or say otherwise, what this server does not take; False where there is nothing left to try."""


class Completions:
    """Token ids over `/completions`."""

    path = "/completions"

    def __init__(self, question: Question, tokenizer: PreTrainedTokenizerBase) -> None:
        self._question = question
        self._tokenizer = tokenizer
        self._extended = True

    def body(self, item: ScoreItem) -> dict[str, Any]:
        """Temperature 0, so that the chosen token is the likeliest one, which is not listed otherwise."""
        extensions: dict[str, Any] = {
            "logprob_token_ids": list(item.label_ids),
            "return_tokens_as_token_ids": True,
            # Some models' own settings have one, and it would move the choice.
            "repetition_penalty": 1.0,
        }
        return {
            "model": self._question.model,
            "prompt": list(item.token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self._question.top,
            **(extensions if self._extended else {}),
            **self._question.extra,
        }

    def find(self, answer: Answer, item: ScoreItem) -> tuple[list[float | None], int]:
        """By id; by text from a server that names tokens by their text."""
        likeliest = answer.likeliest
        if likeliest.id is not None:
            return by_id(answer.tokens, item.label_ids), likeliest.id
        labels = [self._text(label) for label in item.label_ids]
        found = by_text(answer.tokens, labels)
        return found, _argmax(item, labels.index(likeliest.text) if likeliest.text in labels else None)

    def text_body(self, item: GenerateItem) -> dict[str, Any]:
        """With the item's own stops, where the server takes ids of them, beside those that it knows."""
        # As in `body`: a server may take what it is not told from the model's own settings.
        extensions: dict[str, Any] = {
            "stop_token_ids": list(item.stop_ids),
            "repetition_penalty": 1.0,
            "top_k": -1,
        }
        return {
            "model": self._question.model,
            "prompt": list(item.token_ids),
            "max_tokens": item.max_new_tokens,
            **_sampling(item),
            **(extensions if self._extended else self._stops(item)),
            **self._question.extra,
        }

    def _stops(self, item: GenerateItem) -> dict[str, Any]:
        """For a server that takes stops as texts alone, of which the API allows four."""
        texts = [token for stop in item.stop_ids if (token := self._tokenizer.backend_tokenizer.id_to_token(stop))]
        return {"stop": texts[:_MOST_STOPS]} if texts else {}

    def ids(self, text: str) -> tuple[int, ...]:
        """Those that the tokenizer gives the text; the model may have written it in others."""
        return tuple(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def adapt(self, refusal: RefusalError) -> bool:  # noqa: ARG002 whatever a strict server says, these come first
        """Without the extensions."""
        extended, self._extended = self._extended, False
        return extended

    def _text(self, label: int) -> str:
        """The text that names this token alone. Raises UpstreamError where another token has the same text."""
        backend = self._tokenizer.backend_tokenizer
        piece = backend.id_to_token(label) or ""
        twin = backend.token_to_id(piece.removeprefix("\u2581") if piece.startswith("\u2581") else f"\u2581{piece}")
        text = str(backend.decode([label], skip_special_tokens=False))
        if twin is not None and str(backend.decode([twin], skip_special_tokens=False)) == text:
            raise UpstreamError(
                ErrorCode.INFERENCE_FAILED,
                "the upstream server names tokens by text, and a label's text is that of two tokens of this model: "
                "use --upstream-api chat",
            )
        return text


class Chat:
    """Text over `/chat/completions`; the ids of items are those of `upstream_text`."""

    path = "/chat/completions"

    def __init__(self, question: Question, tokenizer: PreTrainedTokenizerBase) -> None:
        self._question = question
        self._tokenizer = tokenizer
        self._limit = "max_tokens"

    def body(self, item: ScoreItem) -> dict[str, Any]:
        """Temperature and top_p 1: servers that apply them to what they report then report the model's own."""
        return {
            "model": self._question.model,
            "messages": [{"role": "user", "content": text_of(self._tokenizer, item.token_ids)}],
            self._limit: 1,
            "temperature": 1,
            "top_p": 1,
            "logprobs": True,
            "top_logprobs": self._question.top,
            **self._question.extra,
        }

    def find(self, answer: Answer, item: ScoreItem) -> tuple[list[float | None], int]:
        """By word: see `by_word`."""
        labels = [text_of(self._tokenizer, [label]) for label in item.label_ids]
        return by_word(answer.tokens, labels), _argmax(item, owner(answer.likeliest.text, labels))

    def text_body(self, item: GenerateItem) -> dict[str, Any]:
        """The server ends the reply itself.

        What its model's own settings say of sampling, such as a repetition penalty, holds unless the question's `extra`
        says otherwise: strict servers refuse fields that they do not know.
        """
        return {
            "model": self._question.model,
            "messages": [{"role": "user", "content": text_of(self._tokenizer, item.token_ids)}],
            self._limit: item.max_new_tokens,
            **_sampling(item),
            **self._question.extra,
        }

    def ids(self, text: str) -> tuple[int, ...]:
        """In the vocabulary of `upstream_text`."""
        return tuple(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def adapt(self, refusal: RefusalError) -> bool:
        """OpenAI's newer models want the limit under its newer name."""
        if self._limit == "max_completion_tokens" or "max_completion_tokens" not in refusal.said:
            return False
        self._limit = "max_completion_tokens"
        return True


def _sampling(item: GenerateItem) -> dict[str, Any]:
    seed = {"seed": item.seed % _SEEDS} if item.temperature else {}
    return {"temperature": item.temperature, "top_p": 1, **seed}


def _argmax(item: ScoreItem, label: int | None) -> int:
    """The id of the label of this index; for a token that is none, an id that no label has."""
    if label is not None:
        return item.label_ids[label]
    return next(token for token in range(len(item.label_ids) + 1) if token not in item.label_ids)
