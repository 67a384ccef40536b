"""From prompt specs to the text that a server reads, where its tokenizer is not known here.

Control strings in a user's text are not guarded: the server tokenizes, and keeps the content of a message apart from
its own control tokens. Lengths are estimates in tokens (`estimate_tokens`): a server that finds a prompt too long says
so itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from client.schema import Message, Truncation
from service.engine.contract import BYTES_PER_TOKEN, TextScoreItem, estimate_tokens
from service.engine.upstream.logprobs import word_of
from service.errors import ServiceError
from service.prompts.builder import JudgePrompt, PromptBuilder
from service.prompts.labels import bad_label, check_lengths
from service.prompts.rendering import texts_of
from service.prompts.truncation import CUT_MARK, Shortening, cuttable, template_too_long, too_long
from service.questions import Layout, Option, PromptSpec

_TURNS: Final = 1
"""Of the texts that fill a layout, the first is the prompt; a conversation is flattened to one text."""


@dataclass(frozen=True, slots=True)
class TextPrompt(TextScoreItem):
    """A prompt as a server reads it; `spellings` and `truncated` as in JudgePrompt."""

    spellings: tuple[int, ...] = ()
    truncated: bool = False

    @property
    def tokens(self) -> int:
        """An estimate of its length."""
        return estimate_tokens(self.text)

    @property
    def label_ids(self) -> tuple[int, ...]:
        """What an answer's `argmax_id` calls the labels: their places."""
        return tuple(range(len(self.labels)))


class TextPrompts:
    """Builds the prompts of one server as PromptBuilder builds a model's, whatever format a layout has: the server
    puts its own chat template around the text. Safe for any number of threads."""

    has_chat_template: Final = True
    chat_text: Final = ""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` is the estimated length of the longest prompt allowed."""
        self.max_tokens = max_tokens

    def build(
        self, layout: Layout | None, prompt: str | Sequence[Message], answers: Sequence[str], truncation: Truncation
    ) -> TextPrompt:
        """Render one judgement; see PromptSpec.

        Raises ServiceError: CONTEXT_LENGTH_EXCEEDED for what is too long and may not be cut, or not far enough;
        BAD_LABEL for a label that is not one word, or that two options share.
        """
        return self._build(PromptSpec(layout, prompt, answers, truncation))

    def build_each(self, specs: Sequence[PromptSpec]) -> Iterator[TextPrompt | ServiceError]:
        """`build` for each of these, in order, one at a time."""
        for spec in specs:
            try:
                yield self._build(spec)
            except ServiceError as error:
                yield error

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A lower bound of the number of tokens of a prompt of these texts, by the same estimate."""
        return estimate_tokens("".join(texts))

    def single_tokens(self, _layout: Layout, texts: Iterable[str]) -> Iterator[str]:
        """The distinct words among the texts, in order: what is one token only the server knows."""
        return iter({word_of(text): text for text in texts if len(word_of(text).split()) == 1}.values())

    def check(self, layout: Layout | None) -> None:
        """Build a probe, so that a layout that cannot work is found at start-up. Raises ServiceError as `build`."""
        answers = ["A probe."] * (len(layout.slots) - 1) if layout else []
        self.build(layout, "A probe?", answers, "error")

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Raises TypeError: the answer to a text is a text."""
        raise TypeError(f"{len(token_ids)} tokens in place of a text")

    def _build(self, spec: PromptSpec) -> TextPrompt:
        texts, layout = texts_of(spec), spec.layout
        assert layout is not None  # texts_of has refused a spec without one
        layout.check()
        parts = layout.parts
        if self.fewest_tokens([*parts[::2], layout.instruction]) > self.max_tokens:
            raise template_too_long(self.max_tokens)
        whole = _filled(layout, parts, texts)
        fits = estimate_tokens(whole) <= self.max_tokens
        text = whole if fits else self._shortened(layout, parts, texts, spec.truncation)
        labels, spellings = _labels(layout.options)
        return TextPrompt(text, labels, spellings, truncated=not fits)

    def _shortened(self, layout: Layout, parts: Sequence[str], texts: list[str], truncation: Truncation) -> str:
        """The prompt with its texts cut until the estimate fits."""
        lengths = {index: estimate_tokens(texts[index]) for index in cuttable(_TURNS, len(texts), truncation)}

        def excess(cut_texts: list[str]) -> int:
            return estimate_tokens(_filled(layout, parts, cut_texts)) - self.max_tokens

        def cut(index: int, keep: int) -> str:
            return _cut(texts[index], keep, left=index < _TURNS)

        surplus = excess(texts)
        refusal = too_long(_TURNS, texts, f"about {surplus + self.max_tokens}", self.max_tokens, truncation)
        shorter = Shortening(texts, lengths, truncation, refusal).until_it_fits(surplus, cut, excess)
        return _filled(layout, parts, shorter)


Prompt: TypeAlias = JudgePrompt | TextPrompt
Prompts: TypeAlias = PromptBuilder | TextPrompts


def _filled(layout: Layout, parts: Sequence[str], texts: Sequence[str]) -> str:
    """The layout's text, split at its slots, with the texts and the instruction in them."""
    slots = {"instruction": layout.instruction, **dict(zip(layout.slots, texts, strict=True))}
    return "".join(slots[part] if index % 2 else part for index, part in enumerate(parts))


def _cut(text: str, keep: int, *, left: bool) -> str:
    """The last `keep` tokens of the text, by the estimate; or as many of its two ends, with a mark between them."""
    raw, size = text.encode(), keep * BYTES_PER_TOKEN
    # A character that the cut goes through is left out.
    if left:
        return raw[-size:].decode(errors="ignore")
    head, tail = raw[: size - size // 2], raw[-(size // 2) :]
    return head.decode(errors="ignore") + CUT_MARK + tail.decode(errors="ignore")


def _labels(options: Sequence[Option]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The distinct labels, and how many of them each option has.

    Raises ServiceError(BAD_LABEL) for a label that the first token of a reply cannot tell from others.
    """
    check_lengths(options)
    owners: dict[str, Option] = {}
    for option in options:
        for index, label in enumerate(option.spellings):
            if len(word_of(label).split()) != 1:
                raise bad_label(f"{option.name} label {index} is not one word: a reply is read by its first token")
            # White space around a word does not tell labels apart: see `logprobs.owner`.
            if (other := owners.setdefault(word_of(label), option)) is not option:
                raise bad_label(f"a {other.name} label and a {option.name} label are the same word")
    distinct = [dict.fromkeys(option.spellings) for option in options]
    return tuple(label for labels in distinct for label in labels), tuple(map(len, distinct))
