"""From a template and texts to token ids: render, tokenise once, find the labels, refuse or shorten what is too long.

Control tokens (`<|im_end|>`) come from the model's chat template and from the layout of a raw template, in files and
requests alike, because a raw layout is the very text that the model reads. The same strings anywhere else (prompt,
responses, instruction, a chat layout) stay plain text. A prompt is first tokenised as it is; only where that gives
other control tokens than the template's own is it done again, by a copy of the tokenizer which splits control strings
and in which the template's own are written as secret stand-ins that no text can hold but by guessing 128 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from tokenizers import Encoding

from client.errors import ErrorCode
from client.schema import Message, Truncation
from service.errors import ServiceError
from service.prompts.chat_template import ChatFrame, ConversationFrame, bad_template
from service.prompts.labels import LabelFinder
from service.prompts.templates import INLINE, REQUIRED_SLOTS, Side, Template, split_layout
from service.prompts.tokenizer import Codec
from service.prompts.truncation import (
    CUT_MARK,
    MIN_KEPT_TOKENS,
    cut_roughly,
    cuttable,
    kept_behind,
    kept_evenly,
    template_too_long,
    too_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUGE: Final = 16
"""Characters per token from which on it pays to ask whether a text can fit at all before tokenising it."""
_SLICE_CHARS: Final = 200_000
_SLICE_ITEMS: Final = 64
_SPEAKERS: Final = {"system": "System", "user": "User", "assistant": "Assistant"}

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a judgement is to show: two answers for a pairwise template, else one.

    Without a template the judge reads the conversation itself, the answer as its last turn.
    """

    template: Template | None
    prompt: str | Sequence[Message]
    answers: Sequence[str]
    truncation: Truncation = "error"


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """What an engine reads for one judgement; see ScoreItem.

    `label_ids` are distinct, `weights` what each counts as, from 0 (No) to 1 (Yes). Both are empty where the judge
    reads no labels.
    """

    token_ids: tuple[int, ...]
    label_ids: tuple[int, ...]
    weights: tuple[float, ...]
    boundaries: tuple[int, ...]
    truncated: bool

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.token_ids)

    @property
    def yes_ids(self) -> tuple[int, ...]:
        """The labels that are wholly Yes."""
        return tuple(id_ for id_, weight in zip(self.label_ids, self.weights, strict=True) if weight == 1)

    @property
    def no_ids(self) -> tuple[int, ...]:
        """The labels that are wholly No."""
        return tuple(id_ for id_, weight in zip(self.label_ids, self.weights, strict=True) if weight == 0)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A template ready to be filled: `pieces` of text around the slots, plain and with stand-ins for control tokens.

    `slots` says which text follows each piece but the last (first the prompt, then the responses), `control` which
    control tokens the pieces write, in order. `chat`: what comes of it is the message in the chat template. `turns` is
    the number of texts that are the prompt: with no template, one for each turn of the conversation.
    """

    chat: bool
    slots: tuple[int, ...]
    pieces: tuple[tuple[str, ...], tuple[str, ...]]
    control: tuple[int, ...]
    sides: tuple[Side, ...] = ()
    turns: int = 1
    conversation: bool = False


@dataclass(frozen=True, slots=True)
class _Text:
    """What the model reads, as text. `spans` are the character ranges of the prompt and of each response, `control` the
    control tokens that the template writes."""

    text: str
    spans: list[Span]
    control: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Draft:
    """A judgement before it is tokenised; `truncated` where its texts are already cut."""

    wanted: Wanted
    plan: _Plan
    texts: list[str]
    truncated: bool
    rendered: _Text


@dataclass(frozen=True, slots=True)
class _Reading:
    """A rendered prompt and its tokens.

    `encoding` is that of `text`; `ids` begins with `ahead` more tokens that the tokenizer puts before a raw text.
    """

    text: str
    spans: list[Span]
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

        `conversation` is for judgements without a template. `chat_date`: see chat_frame.renderer.
        """
        self.has_chat_template = bool(tokenizer.chat_template)
        self.max_tokens = max_tokens
        self._chat = ChatFrame(tokenizer, chat_date)
        self._conversation = conversation
        self.chat_text = self._chat.written + (conversation.written if conversation else "")
        """All that the model's chat template writes around texts."""
        self._codec = Codec(tokenizer, self.chat_text)
        self._bos_id: int | None = tokenizer.bos_token_id
        self._named_plan = lru_cache(maxsize=1024)(self._plan)
        self._labels = LabelFinder(self._codec)

    def build(
        self, template: Template | None, prompt: str | Sequence[Message], answers: Sequence[str], truncation: Truncation
    ) -> JudgePrompt:
        """Render and tokenise one judgement; see Wanted.

        Raises ServiceError: CONTEXT_LENGTH_EXCEEDED for what is too long and may not be cut, or not far enough;
        BAD_LABEL for a label that is not one token here; BAD_TEMPLATE for a chat format that the model has not got;
        INVALID_REQUEST for control strings in a text that the tokenizer cannot read as plain text.
        """
        (built,) = self.build_all([Wanted(template, prompt, answers, truncation)])
        if isinstance(built, ServiceError):
            raise built
        return built

    def build_all(self, wanted: Sequence[Wanted]) -> list[JudgePrompt | ServiceError]:
        """`build` for each of these, in order, at less cost: they are tokenised side by side on all cores."""
        return list(self.build_each(wanted))

    def build_each(self, wanted: Sequence[Wanted]) -> Iterator[JudgePrompt | ServiceError]:
        """`build_all`, some at a time: who stops asking has no more of them built."""
        return (built for some in _slices(wanted) for built in self._build_some(some))

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A number of tokens that the texts have at least, at the cost of reading them once."""
        return self._codec.fewest_tokens(texts)

    def _build_some(self, wanted: Sequence[Wanted]) -> list[JudgePrompt | ServiceError]:
        drafts = [self._draft(each) for each in wanted]
        encodings = iter(self._codec.encode_all([each.rendered.text for each in drafts if isinstance(each, _Draft)]))
        return [each if isinstance(each, ServiceError) else self._finish(each, next(encodings)) for each in drafts]

    def _draft(self, wanted: Wanted) -> _Draft | ServiceError:
        try:
            plan, texts = self._planned(wanted)
            texts, truncated = self._foresee(plan.turns, texts, wanted.truncation)
            return _Draft(wanted, plan, texts, truncated, self._render(plan, texts, False))
        except ServiceError as error:
            return error

    def _planned(self, wanted: Wanted) -> tuple[_Plan, list[str]]:
        """What is to be filled in, and the texts to fill in."""
        template, prompt = wanted.template, wanted.prompt
        if template is None:
            return self._conversation_plan(prompt, wanted.answers)
        if len(wanted.answers) != len(REQUIRED_SLOTS[template.mode]) - 1:
            raise ValueError(f"{len(wanted.answers)} answers for a {template.mode} template")
        plan = self._inline_plan(template) if template.name == INLINE else self._named_plan(template)
        return plan, [prompt if isinstance(prompt, str) else flatten(prompt), *wanted.answers]

    def _inline_plan(self, template: Template) -> _Plan:
        own = [*split_layout(template.layout, template.mode)[::2], template.instruction]
        if sum(map(len, own)) > _HUGE * self.max_tokens and self._codec.fewest_tokens(own) > self.max_tokens:
            raise template_too_long(self.max_tokens)
        return self._plan(template)

    def _conversation_plan(self, prompt: str | Sequence[Message], answers: Sequence[str]) -> tuple[_Plan, list[str]]:
        if self._conversation is None or len(answers) != 1:
            raise ValueError("a judgement without a template needs a builder for conversations, and one answer")
        asked = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        turns = [(message.role, message.content) for message in asked] + [("assistant", answers[0])]
        pieces, texts = self._conversation.around(turns)
        guarded = tuple(map(self._codec.guard, pieces))
        control = tuple(id_ for piece in pieces for id_ in self._codec.control_in(piece))
        slots = tuple(range(len(turns)))
        return _Plan(False, slots, (pieces, guarded), control, turns=len(asked), conversation=True), texts

    def _finish(self, draft: _Draft, encoding: Encoding) -> JudgePrompt | ServiceError:
        wanted, plan, truncated = draft.wanted, draft.plan, draft.truncated
        try:
            reading = self._accept(plan, draft.rendered, False, encoding) or self._read_guarded(plan, draft.texts)
            if len(reading.ids) > self.max_tokens:
                reading, truncated = self._shorten(plan, draft.texts, reading, wanted.truncation), True
            label_ids, weights = self._label_ids(plan.sides, reading)
        except ServiceError as error:
            return error
        return JudgePrompt(tuple(reading.ids), label_ids, weights, _boundaries(plan, reading), truncated)

    def _label_ids(self, sides: tuple[Side, ...], reading: _Reading) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The labels' ids behind the prompt and their weights."""
        if not sides:
            return (), ()
        found = self._labels.find(sides, reading.text, reading.ids, reading.guarded)
        weights = [side.weight for side, ids in zip(sides, found.sides, strict=True) for _ in ids]
        return tuple(id_ for ids in found.sides for id_ in ids), tuple(weights)

    def check(self, template: Template | None) -> None:
        """Build a probe, so that a template that cannot work with this model is found at start-up.

        Raises ServiceError as `build` does, and BAD_TEMPLATE where the prompt begins with two BOS tokens.
        """
        answers = ["A probe."] * (len(REQUIRED_SLOTS[template.mode]) - 1 if template else 1)
        ids = self.build(template, "A probe?", answers, "error").token_ids
        if self._bos_id is not None and ids[:2] == (self._bos_id, self._bos_id):
            name = template.id if template else "the model's chat template"
            raise ServiceError(ErrorCode.BAD_TEMPLATE, f"prompts of {name} begin with two BOS tokens")

    def text_of(self, token_ids: Sequence[int]) -> str:
        """What a model wrote, as text, without control tokens."""
        return self._codec.decode(token_ids)

    def _plan(self, template: Template) -> _Plan:
        chat = template.format == "chat"
        if chat and not self.has_chat_template:
            raise bad_template("this model has no chat template: use format raw")
        names = REQUIRED_SLOTS[template.mode]
        plain, guarded = [""], [""]
        slots: list[int] = []
        control: tuple[int, ...] = ()
        for index, part in enumerate(split_layout(template.layout, template.mode)):
            if part in names and index % 2:
                slots.append(names.index(part))
                plain.append("")
                guarded.append("")
            elif index % 2:
                plain[-1] += template.instruction
                guarded[-1] += template.instruction
            else:
                plain[-1] += part
                guarded[-1] += part if chat else self._codec.guard(part)
                control += () if chat else self._codec.control_in(part)
        return _Plan(chat, tuple(slots), (tuple(plain), tuple(guarded)), control, template.labels)

    def _render(self, plan: _Plan, texts: Sequence[str], guarded: bool) -> _Text:
        pieces = plan.pieces[guarded]
        parts, at, spans = [pieces[0]], len(pieces[0]), [(0, 0)] * len(texts)
        for slot, piece in zip(plan.slots, pieces[1:], strict=True):
            spans[slot] = (at, at + len(texts[slot]))
            parts += (texts[slot], piece)
            at = spans[slot][1] + len(piece)
        content = "".join(parts)
        if not plan.chat:
            return _Text(content, spans, plan.control)
        head, body, tail, trimmed = self._chat.around(content)
        control = self._codec.control_in(head) + self._codec.control_in(tail)
        if guarded:
            head, tail = self._codec.guard(head), self._codec.guard(tail)
        low, high, shift = len(head), len(head) + len(body), len(head) - trimmed
        spans = [_clip((start + shift, end + shift), low, high) for start, end in spans]
        return _Text(head + body + tail, spans, control)

    def _read(self, plan: _Plan, texts: Sequence[str]) -> _Reading:
        rendered = self._render(plan, texts, False)
        (encoding,) = self._codec.encode_all([rendered.text])
        return self._accept(plan, rendered, False, encoding) or self._read_guarded(plan, texts)

    def _read_guarded(self, plan: _Plan, texts: Sequence[str]) -> _Reading:
        rendered = self._render(plan, texts, True)
        reading = self._accept(plan, rendered, True, self._codec.encode_guarded(rendered.text))
        if reading is None:
            raise ServiceError(
                ErrorCode.INVALID_REQUEST, "a text holds a control token that this model cannot read as plain text"
            )
        return reading

    def _accept(self, plan: _Plan, rendered: _Text, guarded: bool, encoding: Encoding) -> _Reading | None:
        """The tokens, unless they hold other control tokens than the template's own."""
        ids = self._codec.ids_of(encoding, guarded)
        if not self._codec.holds_only(rendered.control, ids, rendered.text, guarded):
            return None
        ahead = () if plan.chat or plan.conversation else self._codec.ahead_of(ids)
        return _Reading(rendered.text, rendered.spans, guarded, encoding, [*ahead, *ids], len(ahead))

    def _foresee(self, turns: int, texts: list[str], truncation: Truncation) -> tuple[list[str], bool]:
        """Refuse, or cut roughly, what surely does not fit however it is tokenised; says whether it was cut."""
        if sum(map(len, texts)) <= _HUGE * self.max_tokens or self._codec.fewest_tokens(texts) <= self.max_tokens:
            return texts, False
        which = cuttable(turns, len(texts), truncation)
        least = self._codec.fewest_tokens([text for index, text in enumerate(texts) if index not in which])
        if least > self.max_tokens:
            raise too_long(turns, texts, f"at least {least}", self.max_tokens, truncation)
        window = 2 * _HUGE * self.max_tokens
        return [cut_roughly(t, i < turns, window) if i in which else t for i, t in enumerate(texts)], True

    def _shorten(self, plan: _Plan, texts: Sequence[str], reading: _Reading, truncation: Truncation) -> _Reading:
        """Cut at token boundaries, then render and tokenise the shorter texts, until what comes out fits."""
        which = cuttable(plan.turns, len(texts), truncation)
        if not which:
            raise too_long(plan.turns, texts, str(len(reading.ids)), self.max_tokens, truncation)
        kept_of = kept_behind if truncation == "prompt_left" else kept_evenly
        tokens = [_token_range(reading, index) for index in which]
        lengths = [end - start for start, end in tokens]
        drop, shorter = 0, reading
        while (excess := len(shorter.ids) - self.max_tokens) > 0:
            drop += excess
            kept = kept_of(lengths, drop)
            if any(keep < min(length, MIN_KEPT_TOKENS) for keep, length in zip(kept, lengths, strict=True)):
                raise too_long(plan.turns, texts, str(len(reading.ids)), self.max_tokens, truncation)
            cut = list(texts)
            for index, span, keep in zip(which, tokens, kept, strict=True):
                if keep < span[1] - span[0]:
                    start = reading.spans[index][0]
                    cut[index] = _cut(reading, texts[index], start, span, keep, left=index < plan.turns)
            shorter = self._read(plan, cut)
        return shorter


def _slices(wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
    """In parts of bounded length: what the tokenizer says of a text takes 20 times the text's memory."""
    some: list[Wanted] = []
    size = 0
    for each in wanted:
        length = len(each.prompt) if isinstance(each.prompt, str) else sum(len(turn.content) for turn in each.prompt)
        size += length + sum(map(len, each.answers))
        some.append(each)
        if size >= _SLICE_CHARS or len(some) >= _SLICE_ITEMS:
            yield some
            some, size = [], 0
    if some:
        yield some


def flatten(messages: Sequence[Message]) -> str:
    """A conversation as one text: a single user message as it is, else `User: …`, a blank line, `Assistant: …`."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{_SPEAKERS[message.role]}: {message.content}" for message in messages)


def _boundaries(plan: _Plan, reading: _Reading) -> tuple[int, ...]:
    """Where the template's head ends and, where the prompt comes first, where the prompt ends.

    A token that straddles such a place counts as behind it.
    """
    places = [reading.spans[plan.slots[0]][0]]
    if plan.slots[0] == 0:
        places.append(reading.spans[plan.turns - 1][1])
    offsets = {reading.ahead + _first_token(reading.encoding, place, len(reading.text)) for place in places}
    return tuple(sorted(offsets - {0, len(reading.ids)}))


def _first_token(encoding: Encoding, place: int, end: int) -> int:
    """The index of the first token that reaches behind a place in the text; some characters belong to no token."""
    index = encoding.char_to_token(place) if place < end else len(encoding.ids)
    if index is not None:
        return index
    behind = ((max(start, place), index) for index, (start, stop) in enumerate(encoding.offsets) if stop > place)
    return min(behind, default=(end, len(encoding.ids)))[1]


def _token_range(reading: _Reading, index: int) -> Span:
    """The tokens of the prompt (index 0) or of a response."""
    start, end = (_first_token(reading.encoding, place, len(reading.text)) for place in reading.spans[index])
    return start, end


def _cut(reading: _Reading, text: str, start: int, tokens: Span, keep: int, *, left: bool) -> str:
    """The text without its first tokens, or with the middle ones replaced by a mark; it begins at character `start`."""

    def place(token: int, side: int) -> int:
        chars = reading.encoding.token_to_chars(token)
        assert chars is not None  # only tokens that post-processing adds have no characters
        return max(0, chars[side] - start)

    first, last = tokens
    if left:
        return text[place(last - keep, 0) :]
    end = place(first + keep - keep // 2 - 1, 1)
    right = place(last - keep // 2, 0)
    return text[:end] + CUT_MARK + text[max(end, right) :]


def _clip(span: Span, low: int, high: int) -> Span:
    return min(max(span[0], low), high), min(max(span[1], low), high)
