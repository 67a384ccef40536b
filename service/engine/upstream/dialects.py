"""The two ways in which the upstream engine asks: what a request's body holds, and where its answer has the labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from client.errors import ErrorCode
from service.engine.contract import Generated, GeneratedText, GenerateItem, ScoreItem, TextGenerateItem, TextScoreItem
from service.engine.upstream.logprobs import Answer, by_id, by_text, by_word, owner
from service.engine.upstream.openai_client import RefusalError, UpstreamError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = TypeVar("Score", bound=ScoreItem | TextScoreItem)
Generate = TypeVar("Generate", bound=GenerateItem | TextGenerateItem)

_MOST_STOPS: Final = 4
# Seeds below are taken everywhere.
_SEEDS: Final = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked in every request. `model` is the server's name for it, `top` how many of the likeliest tokens are
    asked for, `extra` more fields of the request's body."""

    model: str
    top: int = 20
    extra: Mapping[str, Any] = field(default_factory=dict)


class Dialect(Protocol[Score, Generate]):
    """A way of asking, and the kinds of items that are asked for in it."""

    path: str
    score_kind: type[Score]
    generate_kind: type[Generate]

    def body(self, item: Score) -> dict[str, Any]:
        """The request's body."""

    def find(self, answer: Answer, item: Score) -> tuple[list[float | None], int]:
        """The labels' log-probabilities, None for one that was not returned, and the likeliest token: see
        LabelLogprobs."""

    def text_body(self, item: Generate) -> dict[str, Any]:
        """The request's body for a text."""

    def generated(self, reply: GeneratedText) -> Generated | GeneratedText:
        """The reply in the form in which it was asked for."""

    def adapt(self, refusal: RefusalError) -> bool:
        """Leave away, or say otherwise, what this server does not take; False where there is nothing left to try."""


class Completions:
    """Token ids over `/completions`."""

    path = "/completions"
    score_kind = ScoreItem
    generate_kind = GenerateItem

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
        # Of a token that is no label the id is not known: any that no label has says the same.
        other = next(token for token in range(len(labels) + 1) if token not in item.label_ids)
        argmax = dict(zip(labels, item.label_ids, strict=True)).get(likeliest.text, other)
        return by_text(answer.tokens, labels), argmax

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

    def generated(self, reply: GeneratedText) -> Generated:
        """In the tokens that the tokenizer gives the text; the model may have written it in others."""
        ids = self._tokenizer.backend_tokenizer.encode(reply.text, add_special_tokens=False).ids
        return Generated(tuple(ids), reply.ended, reply.cached_tokens)

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
    """Text over `/chat/completions`, each prompt as the content of one message."""

    path = "/chat/completions"
    score_kind = TextScoreItem
    generate_kind = TextGenerateItem

    def __init__(self, question: Question) -> None:
        self._question = question
        self._limit = "max_tokens"

    def body(self, item: TextScoreItem) -> dict[str, Any]:
        """Temperature and top_p 1: servers that apply them to what they report then report the model's own."""
        return {
            "model": self._question.model,
            "messages": [{"role": "user", "content": item.text}],
            self._limit: 1,
            "temperature": 1,
            "top_p": 1,
            "logprobs": True,
            "top_logprobs": self._question.top,
            **self._question.extra,
        }

    def find(self, answer: Answer, item: TextScoreItem) -> tuple[list[float | None], int]:
        """By word: see `by_word`."""
        likeliest = owner(answer.likeliest.text, item.labels)
        return by_word(answer.tokens, item.labels), len(item.labels) if likeliest is None else likeliest

    def text_body(self, item: TextGenerateItem) -> dict[str, Any]:
        """The server ends the reply itself.

        What its model's own settings say of sampling, such as a repetition penalty, holds unless the question's `extra`
        says otherwise: strict servers refuse fields that they do not know.
        """
        return {
            "model": self._question.model,
            "messages": [{"role": "user", "content": item.text}],
            self._limit: item.max_new_tokens,
            **_sampling(item),
            **self._question.extra,
        }

    def generated(self, reply: GeneratedText) -> GeneratedText:
        """As it is."""
        return reply

    def adapt(self, refusal: RefusalError) -> bool:
        """OpenAI's newer models want the limit under its newer name."""
        if self._limit == "max_completion_tokens" or "max_completion_tokens" not in refusal.said:
            return False
        self._limit = "max_completion_tokens"
        return True


def _sampling(item: GenerateItem | TextGenerateItem) -> dict[str, Any]:
    seed = {"seed": item.seed % _SEEDS} if item.temperature else {}
    return {"temperature": item.temperature, "top_p": 1, **seed}
