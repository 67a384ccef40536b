"""From prompt specs to token ids: render, tokenize once, find the labels, refuse or shorten what is too long.

A prompt is first tokenized as it is. Only where that gives other control tokens than the template's own (see
rendering.py) is it done again, guarded, by a copy of the tokenizer that splits control strings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Final

from tokenizers import Encoding

from client.errors import ErrorCode
from client.schema import Message, Truncation
from service.engine.contract import ScoreItem
from service.errors import ServiceError
from service.prompts.chat_template import ChatFrame, ConversationFrame
from service.prompts.labels import LabelFinder
from service.prompts.rendering import Pieces, Rendered, Renderer, Span, texts_of
from service.prompts.tokenizer import Codec
from service.prompts.truncation import (
    CUT_MARK,
    Shortening,
    cut_roughly,
    cuttable,
    template_too_long,
    too_long,
)
from service.questions import Layout, PromptSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUGE: Final = 16
"""Characters per token beyond which it pays to ask whether a text can fit at all before tokenizing it."""
_SLICE_CHARS: Final = 200_000
_SLICE_ITEMS: Final = 64


@dataclass(frozen=True, slots=True)
class JudgePrompt(ScoreItem):
    """A prompt as an engine is asked about it; without labels where the judge reads none.

    Of `label_ids` the first `spellings[0]` belong to the question's first option, and so on. `truncated`: its texts
    were cut.
    """

    spellings: tuple[int, ...] = ()
    truncated: bool = False

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt before it is tokenized; `truncated` where its texts are already cut."""

    spec: PromptSpec
    pieces: Pieces
    texts: list[str]
    truncated: bool
    rendered: Rendered


@dataclass(frozen=True, slots=True)
class _Tokenized:
    """A rendered prompt and its tokens: `ids` are those of `encoding`, behind `ahead` more that the tokenizer puts
    before a raw text."""

    rendered: Rendered
    guarded: bool
    encoding: Encoding
    ids: list[int]
    ahead: int


class PromptBuilder:
    """Builds the prompts of one model. Safe for any number of threads: it shares nothing that changes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        conversation: ConversationFrame | None = None,
        chat_date: date | None = None,
    ) -> None:
        """`tokenizer` must be a fast one; it is copied. `max_tokens` is the length of the longest prompt allowed.

        `conversation` is for judgements without a layout. `chat_date`: see chat_template.renderer.
        """
        self.has_chat_template = bool(tokenizer.chat_template)
        self.max_tokens = max_tokens
        chat = ChatFrame(tokenizer, chat_date)
        self.chat_text = chat.written + (conversation.written if conversation else "")
        """All that the model's chat template writes around texts."""
        self._codec = Codec(tokenizer, self.chat_text)
        self._renderer = Renderer(chat, self._codec, conversation, self.has_chat_template)
        self._labels = LabelFinder(self._codec)
        self._bos_id: int | None = tokenizer.bos_token_id

    def build(
        self, layout: Layout | None, prompt: str | Sequence[Message], answers: Sequence[str], truncation: Truncation
    ) -> JudgePrompt:
        """Render and tokenize one judgement; see PromptSpec.

        Raises ServiceError: CONTEXT_LENGTH_EXCEEDED for what is too long and may not be cut, or not far enough;
        BAD_LABEL for a label that is not one token here; BAD_TEMPLATE for a chat format that the model does not have;
        INVALID_REQUEST for control strings in a text that the tokenizer cannot read as plain text.
        """
        (built,) = self.build_all([PromptSpec(layout, prompt, answers, truncation)])
        if isinstance(built, ServiceError):
            raise built
        return built

    def build_all(self, specs: Sequence[PromptSpec]) -> list[JudgePrompt | ServiceError]:
        """`build` for each spec, in order, at less cost: they are tokenized side by side on all cores."""
        return list(self.build_each(specs))

    def build_each(self, specs: Sequence[PromptSpec]) -> Iterator[JudgePrompt | ServiceError]:
        """`build_all`, a slice at a time: when the caller stops iterating, no more are built."""
        return (prompt for some in _slices(specs) for prompt in self._build_slice(some))

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A lower bound of the texts' number of tokens, at the cost of reading them once."""
        return self._codec.fewest_tokens(texts)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What a model generated, as text, without control tokens."""
        return self._codec.decode(token_ids)

    def single_tokens(self, layout: Layout, texts: Iterable[str]) -> Iterator[str]:
        """Those of the texts that are one token each behind the layout's prompts, all distinct, in order.

        Raises ServiceError(BAD_TEMPLATE) for a chat layout where there is no chat template.
        """
        probe = replace(layout, question=None)
        pieces = self._renderer.pieces_of(probe)
        tokenized = self._tokenize(pieces, ["A probe."] * len(layout.slots))
        return self._labels.single_tokens(texts, tokenized.rendered.text, tokenized.guarded)

    def check(self, layout: Layout | None) -> None:
        """Build a probe, so that a layout that cannot work with this model is found at start-up.

        Raises ServiceError as `build` does, and BAD_TEMPLATE where the prompt begins with two BOS tokens.
        """
        answers = ["A probe."] * (len(layout.slots) - 1 if layout else 1)
        ids = self.build(layout, "A probe?", answers, "error").token_ids
        if self._bos_id is not None and list(ids[:2]) == [self._bos_id, self._bos_id]:
            name = getattr(layout, "id", "the model's chat template")
            raise ServiceError(ErrorCode.BAD_TEMPLATE, f"prompts of {name} begin with two BOS tokens")

    def _build_slice(self, specs: Sequence[PromptSpec]) -> list[JudgePrompt | ServiceError]:
        drafts = [self._draft(spec) for spec in specs]
        texts = [draft.rendered.text for draft in drafts if isinstance(draft, _Draft)]
        encodings = iter(self._codec.encode_all(texts))
        return [draft if isinstance(draft, ServiceError) else self._finish(draft, next(encodings)) for draft in drafts]

    def _draft(self, spec: PromptSpec) -> _Draft | ServiceError:
        try:
            pieces, texts = self._pieces(spec)
            texts, truncated = self._precut(pieces.turns, texts, spec.truncation)
            return _Draft(spec, pieces, texts, truncated, self._renderer.render(pieces, texts, guarded=False))
        except ServiceError as error:
            return error

    def _pieces(self, spec: PromptSpec) -> tuple[Pieces, list[str]]:
        layout = spec.layout
        if layout is None:
            (answer,) = spec.answers
            return self._renderer.conversation_of(spec.prompt, answer)
        if layout.inline:
            layout.check()
            own = [*layout.parts[::2], layout.instruction]
            if sum(map(len, own)) > _HUGE * self.max_tokens and self._codec.fewest_tokens(own) > self.max_tokens:
                raise template_too_long(self.max_tokens)
        return self._renderer.pieces_of(layout), texts_of(spec)

    def _precut(self, turns: int, texts: list[str], truncation: Truncation) -> tuple[list[str], bool]:
        """Refuse, or cut roughly, what cannot fit however it is tokenized; says whether it was cut."""
        if sum(map(len, texts)) <= _HUGE * self.max_tokens or self._codec.fewest_tokens(texts) <= self.max_tokens:
            return texts, False
        which = cuttable(turns, len(texts), truncation)
        least = self._codec.fewest_tokens([text for index, text in enumerate(texts) if index not in which])
        if least > self.max_tokens:
            raise too_long(turns, texts, f"at least {least}", self.max_tokens, truncation)
        window = 2 * _HUGE * self.max_tokens
        return [cut_roughly(t, i < turns, window) if i in which else t for i, t in enumerate(texts)], True

    def _finish(self, draft: _Draft, encoding: Encoding) -> JudgePrompt | ServiceError:
        pieces, truncated = draft.pieces, draft.truncated
        try:
            tokenized = self._accepted(pieces, draft.rendered, False, encoding) or self._guarded(pieces, draft.texts)
            if len(tokenized.ids) > self.max_tokens:
                tokenized, truncated = self._shorten(pieces, draft.texts, tokenized, draft.spec.truncation), True
            text, guarded = tokenized.rendered.text, tokenized.guarded
            by_option = self._labels.find(pieces.options, text, tokenized.ids, guarded) if pieces.options else ()
        except ServiceError as error:
            return error
        label_ids = tuple(id_ for ids in by_option for id_ in ids)
        boundaries = _boundaries(pieces, tokenized)
        return JudgePrompt(tuple(tokenized.ids), label_ids, boundaries, tuple(map(len, by_option)), truncated)

    def _tokenize(self, pieces: Pieces, texts: Sequence[str]) -> _Tokenized:
        rendered = self._renderer.render(pieces, texts, guarded=False)
        (encoding,) = self._codec.encode_all([rendered.text])
        return self._accepted(pieces, rendered, False, encoding) or self._guarded(pieces, texts)

    def _guarded(self, pieces: Pieces, texts: Sequence[str]) -> _Tokenized:
        rendered = self._renderer.render(pieces, texts, guarded=True)
        tokenized = self._accepted(pieces, rendered, True, self._codec.encode_guarded(rendered.text))
        if tokenized is None:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST, "a text holds a control token that this model cannot read as plain text"
            )
        return tokenized

    def _accepted(self, pieces: Pieces, rendered: Rendered, guarded: bool, encoding: Encoding) -> _Tokenized | None:
        """The tokens, unless they hold other control tokens than the template's own."""
        ids = self._codec.ids_of(encoding, guarded)
        if not self._codec.holds_only(rendered.control, ids, rendered.text, guarded):
            return None
        ahead = () if pieces.chat or pieces.conversation else self._codec.ahead_of(ids)
        return _Tokenized(rendered, guarded, encoding, [*ahead, *ids], len(ahead))

    def _shorten(self, pieces: Pieces, texts: list[str], whole: _Tokenized, truncation: Truncation) -> _Tokenized:
        """Cut at token boundaries, then render and tokenize the shorter texts, until the result fits."""
        ranges = {index: _token_range(whole, index) for index in cuttable(pieces.turns, len(texts), truncation)}
        shorter = whole

        def cut(index: int, keep: int) -> str:
            return _cut(whole, texts[index], index, ranges[index], keep, left=index < pieces.turns)

        def measure(cut_texts: list[str]) -> int:
            nonlocal shorter
            shorter = self._tokenize(pieces, cut_texts)
            return len(shorter.ids) - self.max_tokens

        lengths = {index: end - start for index, (start, end) in ranges.items()}
        refusal = too_long(pieces.turns, texts, str(len(whole.ids)), self.max_tokens, truncation)
        excess = len(whole.ids) - self.max_tokens
        Shortening(texts, lengths, truncation, refusal).until_it_fits(excess, cut, measure)
        return shorter


def _slices(specs: Sequence[PromptSpec]) -> Iterator[list[PromptSpec]]:
    """Slices of bounded length: what the tokenizer says of a text takes 20 times the text's memory."""
    part: list[PromptSpec] = []
    size = 0
    for spec in specs:
        size += spec.size
        part.append(spec)
        if size >= _SLICE_CHARS or len(part) >= _SLICE_ITEMS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _boundaries(pieces: Pieces, tokenized: _Tokenized) -> tuple[int, ...]:
    """Where the template's head ends and, where the prompt comes first, where the prompt ends.

    A token that straddles such a place counts as behind it.
    """
    spans, first = tokenized.rendered.spans, pieces.slots[0]
    places = [spans[first][0]]
    if first == 0:
        places.append(spans[pieces.turns - 1][1])
    offsets = {tokenized.ahead + _first_token(tokenized, place) for place in places}
    return tuple(sorted(offsets - {0, len(tokenized.ids)}))


def _first_token(tokenized: _Tokenized, place: int) -> int:
    """The index of the first token that reaches behind a place in the text; some characters belong to no token."""
    encoding, end = tokenized.encoding, len(tokenized.rendered.text)
    index = encoding.char_to_token(place) if place < end else len(encoding.ids)
    if index is not None:
        return index
    behind = ((max(start, place), index) for index, (start, stop) in enumerate(encoding.offsets) if stop > place)
    return min(behind, default=(end, len(encoding.ids)))[1]


def _token_range(tokenized: _Tokenized, index: int) -> Span:
    """The tokens of one of the texts: the first one, and the one after the last."""
    start, end = (_first_token(tokenized, place) for place in tokenized.rendered.spans[index])
    return start, end


def _cut(tokenized: _Tokenized, text: str, index: int, tokens: Span, keep: int, *, left: bool) -> str:
    """The text with `keep` of its tokens: the last ones, or its two ends with a mark between them."""
    start = tokenized.rendered.spans[index][0]

    def place(token: int, side: int) -> int:
        chars = tokenized.encoding.token_to_chars(token)
        assert chars is not None  # only tokens that post-processing adds have no characters
        return max(0, chars[side] - start)

    first, last = tokens
    if left:
        return text[place(last - keep, 0) :]
    end = place(first + keep - keep // 2 - 1, 1)
    right = place(last - keep // 2, 0)
    return text[:end] + CUT_MARK + text[max(end, right) :]
