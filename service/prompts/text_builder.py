"""From a template and texts to the text that a server reads, where its tokenizer is not known here.

Control strings in a user's text are not guarded: it is the server that tokenizes, and keeps the content of a message
apart from its own control tokens. Lengths are estimates in tokens (`text_tokens`): a server that finds a prompt too
long says so itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final, TypeAlias

from client.schema import Message, Truncation
from service.engine.contract import TOKEN_BYTES, text_tokens
from service.engine.upstream.logprobs import word_of
from service.errors import ServiceError
from service.prompts.builder import JudgePrompt, PromptBuilder, Wanted, flatten
from service.prompts.labels import bad_label, check_lengths
from service.prompts.templates import REQUIRED_SLOTS, Side, Template, split_layout
from service.prompts.truncation import (
    CUT_MARK,
    MIN_KEPT_TOKENS,
    cuttable,
    kept_behind,
    kept_evenly,
    template_too_long,
    too_long,
)

_TURNS: Final = 1
"""Of the texts that fill a template, the first is the prompt; a conversation is flattened to one."""


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """What a server reads for one judgement; see TextScoreItem. `labels` and `weights` as in JudgePrompt."""

    text: str
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    truncated: bool

    @property
    def tokens(self) -> int:
        """An estimate of its length."""
        return text_tokens(self.text)

    @property
    def label_ids(self) -> tuple[int, ...]:
        """What an answer's `argmax_id` calls the labels: their places."""
        return tuple(range(len(self.labels)))


class TextPrompts:
    """Builds the prompts of one server as PromptBuilder builds a model's, whatever format a template has: the server
    puts its own chat template around the text. Safe for any number of threads."""

    has_chat_template: Final = True
    chat_text: Final = ""

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens` is the estimated length of the longest prompt allowed."""
        self.max_tokens = max_tokens

    def build(
        self, template: Template | None, prompt: str | Sequence[Message], answers: Sequence[str], truncation: Truncation
    ) -> TextPrompt:
        """Render one judgement; see Wanted.

        Raises ServiceError: CONTEXT_LENGTH_EXCEEDED for what is too long and may not be cut, or not far enough;
        BAD_LABEL for a label that is not one word, or stands for two sides.
        """
        if template is None or len(answers) != len(REQUIRED_SLOTS[template.mode]) - 1:
            raise ValueError(f"{len(answers)} answers for the template {template}")
        layout = split_layout(template.layout, template.mode)
        if self.fewest_tokens([*layout[::2], template.instruction]) > self.max_tokens:
            raise template_too_long(self.max_tokens)
        texts = [prompt if isinstance(prompt, str) else flatten(prompt), *answers]
        text = whole = _filled(template, layout, texts)
        if text_tokens(whole) > self.max_tokens:
            text = self._shortened(template, layout, texts, truncation)
        labels, weights = _labels(template.labels)
        return TextPrompt(text, labels, weights, truncated=text is not whole)

    def build_each(self, wanted: Sequence[Wanted]) -> Iterator[TextPrompt | ServiceError]:
        """`build` for each of these, in order, one at a time."""
        for each in wanted:
            try:
                yield self.build(each.template, each.prompt, each.answers, each.truncation)
            except ServiceError as error:
                yield error

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A number of tokens that a prompt of these texts has at least, by the same estimate."""
        return text_tokens("".join(texts))

    def check(self, template: Template | None) -> None:
        """Build a probe, so that a template that cannot work is found at start-up. Raises ServiceError as `build`."""
        answers = ["A probe."] * (len(REQUIRED_SLOTS[template.mode]) - 1) if template else []
        self.build(template, "A probe?", answers, "error")

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Raises TypeError: the answer to a text is a text."""
        raise TypeError(f"{len(token_ids)} tokens in place of a text")

    def _shortened(
        self, template: Template, layout: Sequence[str], texts: Sequence[str], truncation: Truncation
    ) -> str:
        """The prompt with its texts cut until the estimate fits."""
        which = cuttable(_TURNS, len(texts), truncation)
        lengths = [text_tokens(texts[index]) for index in which]
        kept_of = kept_behind if truncation == "prompt_left" else kept_evenly
        text, drop = _filled(template, layout, texts), 0
        refusal = too_long(_TURNS, texts, f"about {text_tokens(text)}", self.max_tokens, truncation)
        if not which:
            raise refusal
        while (excess := text_tokens(text) - self.max_tokens) > 0:
            drop += excess
            kept = kept_of(lengths, drop)
            if any(keep < min(length, MIN_KEPT_TOKENS) for keep, length in zip(kept, lengths, strict=True)):
                raise refusal
            cut = list(texts)
            for index, length, keep in zip(which, lengths, kept, strict=True):
                if keep < length:
                    cut[index] = _cut(texts[index], keep, left=index < _TURNS)
            text = _filled(template, layout, cut)
        return text


Prompt: TypeAlias = JudgePrompt | TextPrompt
Prompts: TypeAlias = PromptBuilder | TextPrompts


def _filled(template: Template, layout: Sequence[str], texts: Sequence[str]) -> str:
    """The layout, split at its slots, with the texts and the instruction in them."""
    slots = {"instruction": template.instruction, **dict(zip(REQUIRED_SLOTS[template.mode], texts, strict=True))}
    return "".join(slots[part] if index % 2 else part for index, part in enumerate(layout))


def _cut(text: str, keep: int, *, left: bool) -> str:
    """The last `keep` tokens of the text, by the estimate; or so many of its two ends, with a mark between them."""
    raw, size = text.encode(), keep * TOKEN_BYTES
    # A character that the cut goes through is left out.
    if left:
        return raw[-size:].decode(errors="ignore")
    head, tail = raw[: size - size // 2], raw[-(size // 2) :]
    return head.decode(errors="ignore") + CUT_MARK + tail.decode(errors="ignore")


def _labels(sides: Sequence[Side]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The labels and their weights; raises ServiceError(BAD_LABEL) for what no first token of a reply can tell."""
    check_lengths(sides)
    for side in sides:
        for index, label in enumerate(side.labels):
            if len(word_of(label).split()) != 1:
                raise bad_label(f"{side.name} label {index} is not one word: a reply is read by its first token")
    # White space around a word does not tell labels apart: see `logprobs.owner`.
    words = [{word_of(label) for label in side.labels} for side in sides]
    for first, second in combinations(range(len(sides)), 2):
        if not words[first].isdisjoint(words[second]):
            raise bad_label(f"a {sides[first].name} label and a {sides[second].name} label are the same word")
    weights = {label: side.weight for side in sides for label in side.labels}
    return tuple(weights), tuple(weights.values())
