"""What is cut from a prompt that is too long: which texts, and how much of each; and how the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from client.errors import ErrorCode
from client.schema import Truncation
from service.errors import ServiceError

CUT_MARK: Final = " [...] "
"""Replaces the middle of a response that was cut."""
MIN_KEPT_TOKENS: Final = 4
"""A text that is cut keeps at least this many tokens; if that is still too much, the request is refused."""


def cuttable(turns: int, texts: int, truncation: Truncation) -> range:
    """Which of the texts may be cut: the first `turns` are the prompt's, the rest are responses."""
    return {"error": range(0), "prompt_left": range(turns), "response_middle": range(turns, texts)}[truncation]


@dataclass(frozen=True, slots=True)
class Shortening:
    """Cuts `texts` until the prompt fits. `lengths` has the tokens of each text that may be cut, by its index.

    `refusal` is raised where nothing may be cut, or not enough.
    """

    texts: Sequence[str]
    lengths: Mapping[int, int]
    truncation: Truncation
    refusal: ServiceError

    def until_it_fits(
        self, excess: int, cut: Callable[[int, int], str], measure: Callable[[list[str]], int]
    ) -> list[str]:
        """The shorter texts, from a prompt of `excess` tokens too many.

        `cut(index, keep)` gives a text with so many of its tokens, `measure(texts)` by how many tokens the prompt of
        these texts is still too long: a cut changes how its neighbourhood is tokenized, so the sum is not enough.
        """
        if not self.lengths:
            raise self.refusal
        kept_of = kept_behind if self.truncation == "prompt_left" else kept_evenly
        shorter, drop = list(self.texts), 0
        while excess > 0:
            drop += excess
            kept = kept_of(list(self.lengths.values()), drop)
            shorter = list(self.texts)
            for (index, length), keep in zip(self.lengths.items(), kept, strict=True):
                if keep < min(length, MIN_KEPT_TOKENS):
                    raise self.refusal
                if keep < length:
                    shorter[index] = cut(index, keep)
            excess = measure(shorter)
        return shorter


def kept_behind(lengths: Sequence[int], drop: int) -> list[int]:
    """How many tokens each of the prompt's texts keeps when `drop` are cut from the left.

    All but the last keep a few. The last one may come out below its minimum, or below 0.
    """
    kept = []
    for length in lengths[:-1]:
        keep = max(min(length, MIN_KEPT_TOKENS), length - drop)
        drop -= length - keep
        kept.append(keep)
    return [*kept, lengths[-1] - drop]


def kept_evenly(lengths: Sequence[int], drop: int) -> list[int]:
    """How many tokens each of one or two texts keeps when `drop` are cut: from the longer one until both are equally
    long, then from both. A number may come out below its minimum, or below 0."""
    longest, others = max(lengths), sum(lengths) - max(lengths)
    level = longest - drop
    if len(lengths) > 1 and level < others:
        level = (longest + others - drop) // 2
    return [min(length, level) for length in lengths]


def cut_roughly(text: str, left: bool, window: int) -> str:
    """The text without its first characters, or with the middle ones replaced by a mark, if it is longer than `window`:
    tokenising what is to be cut anyway then costs little."""
    if len(text) <= window:
        return text
    return text[-window:] if left else text[: window // 2] + CUT_MARK + text[-window // 2 :]


def too_long(turns: int, texts: Sequence[str], tokens: str, most: int, truncation: Truncation) -> ServiceError:
    """The error for a prompt of so many `tokens`, where `most` are read and it may not be cut, or not far enough."""
    advice = (
        "shorten it, or allow truncation where the route has that option"
        if truncation == "error"
        else f"truncation {truncation} cannot cut enough: shorten the rest"
    )
    return ServiceError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"the judge's prompt is {tokens} tokens long, and this model reads at most {most}: {advice}",
        param="prompt" if sum(map(len, texts[:turns])) >= max(map(len, texts[turns:]), default=0) else "response",
    )


def template_too_long(most: int) -> ServiceError:
    """The error for a template that leaves no room for texts."""
    return ServiceError(
        ErrorCode.CONTEXT_LENGTH_EXCEEDED,
        f"the template alone is longer than the {most} tokens that this model reads: shorten it",
        param="template",
    )
