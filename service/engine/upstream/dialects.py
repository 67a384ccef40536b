"""Two of the ways in which the upstream engine asks: request bodies, and where an answer has the labels.

The other two are in decisions.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from client.errors import ErrorCode
from service.engine.contract import (
    Generated,
    GeneratedText,
    GenerateItem,
    ScoreItem,
    TextGenerateItem,
    TextScoreItem,
    split_labels,
)
from service.engine.upstream.errors import RefusalError, UpstreamError
from service.engine.upstream.logprobs import (
    TopLogprobs,
    by_id,
    by_text,
    by_word,
    label_index,
    merge_answers,
    parse_logprobs,
)
from service.engine.upstream.returned import Returned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ScoreT = TypeVar("ScoreT", bound=ScoreItem | TextScoreItem)
GenerateT = TypeVar("GenerateT", bound=GenerateItem | TextGenerateItem)

# vLLM refuses longer lists of `logprob_token_ids`.
_MOST_LABEL_IDS: Final = 128
# OpenAI's API refuses more stop strings.
_MOST_STOPS: Final = 4
# Not LABEL_NOT_RETURNED: this says nothing about the label's probability, and a retry may help.
_NO_LIST: Final = "the upstream server returned its chosen token alone, without the likeliest ones that were asked for"
# Some servers take seeds of 31 bits only.
_SEEDS: Final = 1 << 31


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The same for every request: the server's name of the model, how many of the most likely tokens to ask for, and
    extra fields of the body."""

    model: str
    top_logprobs: int = 20
    extra: Mapping[str, Any] = field(default_factory=dict)


class Dialect(Protocol[ScoreT, GenerateT]):
    """A way of asking, and the kinds of items it can ask for."""

    path: str
    score_kind: type[ScoreT]
    generate_kind: type[GenerateT]

    def parts(self, item: ScoreT) -> Sequence[ScoreT]:
        """The item, or several that share its labels out if one request cannot ask for all of them."""

    def score_body(self, item: ScoreT) -> dict[str, Any]:
        """The body of a request for labels."""

    def returned(self, contents: Sequence[bytes], item: ScoreT) -> Returned:
        """What the response bodies, one for each part, say of the item's labels. Raises UpstreamError."""

    def generate_body(self, item: GenerateT) -> dict[str, Any]:
        """The body of a request for generated text."""

    def generated(self, reply: GeneratedText) -> Generated | GeneratedText:
        """The reply as the item's answer."""

    def adapt(self, refusal: RefusalError) -> bool:
        """Change what is sent so that a server which refused it may accept it. False if there is nothing to change."""


class Completions:
    """Token ids over `/completions`."""

    path = "/completions"
    score_kind = ScoreItem
    generate_kind = GenerateItem

    def __init__(self, options: RequestOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._extended = True

    def parts(self, item: ScoreItem) -> Sequence[ScoreItem]:
        """See Dialect."""
        return split_labels(item, _MOST_LABEL_IDS) if self._extended else [item]

    def score_body(self, item: ScoreItem) -> dict[str, Any]:
        """At temperature 0, so that the sampled token is the most likely one: vLLM lists no other beside the labels."""
        extensions: dict[str, Any] = {
            "logprob_token_ids": list(item.label_ids),
            "return_tokens_as_token_ids": True,
            # A model's own generation settings may contain one, which would change the sampled token.
            "repetition_penalty": 1.0,
        }
        return {
            "model": self._options.model,
            "prompt": list(item.token_ids),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self._options.top_logprobs,
            **(extensions if self._extended else {}),
            **self._options.extra,
        }

    def returned(self, contents: Sequence[bytes], item: ScoreItem) -> Returned:
        """By id, or by text if the server names tokens by text."""
        return _among_tokens(contents, lambda answer: self._labels(answer, item))

    def _labels(self, answer: TopLogprobs, item: ScoreItem) -> tuple[list[float | None], int]:
        argmax = answer.argmax
        if argmax.id is not None:
            return by_id(answer.tokens, item.label_ids), argmax.id
        labels = [self._text(label) for label in item.label_ids]
        # The id of a token that is no label is not known: any id that is no label's will do.
        other = next(token for token in range(len(labels) + 1) if token not in item.label_ids)
        argmax_id = dict(zip(labels, item.label_ids, strict=True)).get(argmax.text, other)
        return by_text(answer.tokens, labels), argmax_id

    def generate_body(self, item: GenerateItem) -> dict[str, Any]:
        """The item's stop ids go beside the server's own, as ids if the server takes them."""
        # As in `score_body`: what is left out, a server may take from the model's own generation settings.
        extensions: dict[str, Any] = {
            "stop_token_ids": list(item.stop_ids),
            "repetition_penalty": 1.0,
            "top_k": -1,
        }
        return {
            "model": self._options.model,
            "prompt": list(item.token_ids),
            "max_tokens": item.max_new_tokens,
            **_sampling_fields(item),
            **(extensions if self._extended else self._stop_strings(item)),
            **self._options.extra,
        }

    def _stop_strings(self, item: GenerateItem) -> dict[str, Any]:
        texts = [token for stop in item.stop_ids if (token := self._tokenizer.backend_tokenizer.id_to_token(stop))]
        return {"stop": texts[:_MOST_STOPS]} if texts else {}

    def generated(self, reply: GeneratedText) -> Generated:
        """Tokenized here; the model may have generated the same text as other tokens."""
        ids = self._tokenizer.backend_tokenizer.encode(reply.text, add_special_tokens=False).ids
        return Generated(tuple(ids), reply.ended, reply.cached_tokens)

    def adapt(self, refusal: RefusalError) -> bool:  # noqa: ARG002 strict servers word this differently
        """Drop vLLM's extensions."""
        extended, self._extended = self._extended, False
        return extended

    def _text(self, label: int) -> str:
        """The text of this token. Raises UpstreamError if another token has the same text."""
        backend = self._tokenizer.backend_tokenizer
        piece = backend.id_to_token(label) or ""
        # SentencePiece has pieces with and without a leading space (U+2581) that decode to the same text when alone.
        twin = backend.token_to_id(piece.removeprefix("\u2581") if piece.startswith("\u2581") else f"\u2581{piece}")
        text = str(backend.decode([label], skip_special_tokens=False))
        if twin is not None and str(backend.decode([twin], skip_special_tokens=False)) == text:
            raise UpstreamError(
                ErrorCode.INFERENCE_FAILED,
                "the upstream server names tokens by text, and two tokens of this model share a label's text: "
                "use --upstream-api chat",
            )
        return text


class Chat:
    """Text over `/chat/completions`: each prompt is the content of one user message."""

    path = "/chat/completions"
    score_kind = TextScoreItem
    generate_kind = TextGenerateItem

    def __init__(self, options: RequestOptions) -> None:
        self._options = options
        self._limit_field = "max_tokens"

    def parts(self, item: TextScoreItem) -> Sequence[TextScoreItem]:
        """See Dialect: the API returns the most likely tokens, whatever the labels."""
        return [item]

    def score_body(self, item: TextScoreItem) -> dict[str, Any]:
        """With temperature and top_p 1, because some servers apply them to the log-probabilities that they report."""
        return {
            "model": self._options.model,
            "messages": [{"role": "user", "content": item.text}],
            self._limit_field: 1,
            "temperature": 1,
            "top_p": 1,
            "logprobs": True,
            "top_logprobs": self._options.top_logprobs,
            **self._options.extra,
        }

    def returned(self, contents: Sequence[bytes], item: TextScoreItem) -> Returned:
        """By word: see `by_word`."""

        def labels(answer: TopLogprobs) -> tuple[list[float | None], int]:
            index = label_index(answer.argmax.text, item.labels)
            return by_word(answer.tokens, item.labels), len(item.labels) if index is None else index

        return _among_tokens(contents, labels)

    def generate_body(self, item: TextGenerateItem) -> dict[str, Any]:
        """Only fields of OpenAI's API, since strict servers refuse others.

        The model's own generation settings, such as a repetition penalty, therefore apply unless `extra` overrides
        them.
        """
        return {
            "model": self._options.model,
            "messages": [{"role": "user", "content": item.text}],
            self._limit_field: item.max_new_tokens,
            **_sampling_fields(item),
            **self._options.extra,
        }

    def generated(self, reply: GeneratedText) -> GeneratedText:
        """Unchanged."""
        return reply

    def adapt(self, refusal: RefusalError) -> bool:
        """Use the limit's newer name, which OpenAI's newer models insist on."""
        if self._limit_field == "max_completion_tokens" or "max_completion_tokens" not in refusal.said:
            return False
        self._limit_field = "max_completion_tokens"
        return True


def _among_tokens(
    contents: Sequence[bytes], labels: Callable[[TopLogprobs], tuple[list[float | None], int]]
) -> Returned:
    """The labels among the tokens of all these responses; `labels` gives their log-probabilities and the argmax."""
    answers = [parse_logprobs(content) for content in contents]
    answer = merge_answers(answers)
    logprobs, argmax_id = labels(answer)
    if None in logprobs and any(answer.collapsed for answer in answers):
        raise UpstreamError(ErrorCode.INFERENCE_FAILED, _NO_LIST)
    listed = f"among the {len(answer.tokens)} tokens that the upstream server returned"
    return Returned(logprobs, argmax_id, answer.cached_tokens, answer.lowest, listed)


def _sampling_fields(item: GenerateItem | TextGenerateItem) -> dict[str, Any]:
    seed = {"seed": item.seed % _SEEDS} if item.temperature else {}
    return {"temperature": item.temperature, "top_p": 1, **seed}
