"""Labels where nobody gave any: good answers, each against one that was made worse in a known way.

    other_request   an answer to the most similar other request
    broken_code     the same code with one small bug
    broken_number   the same solution with the end of its calculation wrong
    refusal         a refusal; where the request is harmful, the refusal is the better answer
    cut_off         the answer's first half
    repeated        the answer's beginning, whose last sentence repeats

All are decided by the seed and the answers alone, and fewer are part of more. What they teach is to see these faults,
and not what people prefer: whoever shows numbers says that the labels are synthetic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, islice, repeat
from random import Random
from typing import Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, Field

from client.schema import Message
from client.texts import is_refusal
from trainer.run.records import Record
from trainer.tuning.judge.broken_code import broken
from trainer.tuning.judge.broken_number import wrong_ends
from trainer.tuning.judge.labels import Label
from trainer.tuning.judge.refusals import refusals
from trainer.tuning.judge.similarity import SimilarTexts, overlap, words_of

Kind: TypeAlias = Literal["other_request", "broken_code", "broken_number", "refusal", "cut_off", "repeated"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

# More than memory holds, so that a count with too many zeros is told at once.
_MOST_LABELS: Final = 10_000_000
# Requests and answers that are more alike than this may be right for each other.
_SAME_REQUEST: Final = 0.8
_SAME_ANSWER: Final = 0.5
_LEAST_WORDS: Final = 16
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n+")
_Pair: TypeAlias = tuple[str, str]


class GoodAnswer(Record):
    """An answer that is known to be good, unless the request is `harmful`: then it complies, and should not."""

    id: str
    prompt: str | tuple[Message, ...]
    text: str
    category: str | None = None
    harmful: bool = False

    @property
    def request(self) -> str:
        """The last thing that the user says."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1].content


class Contrast(BaseModel):
    """Which contrasts to make. `count` is how many at most, `each` how many for one answer.

    `category` is the labels' category, and so their template; by default that of each answer. `only` are the categories
    of the answers that are used. `length_ratio` bounds the longer of two answers to so many times the other, for kinds
    that take another answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    count: int | None = Field(default=None, ge=1, le=_MOST_LABELS, strict=True)
    each: int = Field(default=1, ge=1, le=_MOST_LABELS, strict=True)
    category: str | None = None
    only: tuple[str, ...] | None = None
    length_ratio: float | None = Field(default=None, ge=1, allow_inf_nan=False)


def contrasts(answers: Sequence[GoodAnswer], contrast: Contrast, seed: int) -> list[Label]:
    """The labels of one contrast, in an order that the seed decides; none if no answer is fit for it."""
    only = contrast.only
    usable = [one for one in answers if only is None or one.category in only]
    usable = sorted(usable, key=lambda one: sha256(f"{seed}\0{contrast.kind}\0{one.id}".encode()).digest())
    made = _MAKERS[contrast.kind](usable, contrast, seed)
    return list(islice(_labels(made, contrast), contrast.count))


def _labels(made: Iterable[tuple[GoodAnswer, Iterator[_Pair]]], contrast: Contrast) -> Iterator[Label]:
    for answer, pairs in made:
        for number, (better, worse) in enumerate(islice(pairs, contrast.each)):
            name = f"{contrast.kind}/{answer.id}"
            yield Label(
                id=f"{name}/{number}" if number else name,
                prompt=answer.prompt,
                answers=(better, worse),
                category=contrast.category or answer.category,
                kind=contrast.kind,
            )


_Made: TypeAlias = Iterator[tuple[GoodAnswer, Iterator[_Pair]]]
_Maker: TypeAlias = Callable[[Sequence[GoodAnswer], Contrast, int], _Made]


def _by_itself(worse: Callable[[str, Random], Iterator[str]]) -> _Maker:
    """A maker of contrasts that needs the answer alone; answers to harmful requests are left out."""

    def make(answers: Sequence[GoodAnswer], contrast: Contrast, seed: int) -> _Made:
        for one in answers:
            if not one.harmful:
                draw = Random(f"{seed}\0{contrast.kind}\0{one.id}")
                yield one, zip(repeat(one.text), worse(one.text, draw), strict=False)

    return make


def _other_request(answers: Sequence[GoodAnswer], contrast: Contrast, _: int) -> _Made:
    fit = [one for one in answers if not one.harmful and not is_refusal(one.text)]
    similar = SimilarTexts([one.request for one in fit])
    words = [frozenset(words_of(one.text)) for one in fit]
    most = contrast.length_ratio or math.inf

    def others(index: int) -> Iterator[_Pair]:
        one = fit[index]
        for other, cosine in similar.nearest(index):
            short, long = sorted((len(one.text), len(fit[other].text)))
            is_other = cosine < _SAME_REQUEST and one.prompt != fit[other].prompt
            if is_other and long <= most * short and overlap(words[index], words[other]) < _SAME_ANSWER:
                yield one.text, fit[other].text

    for index, one in enumerate(fit):
        yield one, others(index)


def _refusal(answers: Sequence[GoodAnswer], contrast: Contrast, seed: int) -> _Made:
    """As many harmful requests as harmless ones, if there are both."""
    complying = [one for one in answers if not is_refusal(one.text)]
    harmful, harmless = ([one for one in complying if one.harmful is side] for side in (True, False))
    for one in chain.from_iterable(zip(harmful, harmless, strict=False)) if harmful and harmless else complying:
        said = refusals(one.request, Random(f"{seed}\0{contrast.kind}\0{one.id}"))
        yield one, _refused(one, said)


def _refused(one: GoodAnswer, said: Iterable[str]) -> Iterator[_Pair]:
    yield from ((text, one.text) if one.harmful else (one.text, text) for text in said)


def _cut_off(text: str, draw: Random) -> Iterator[str]:
    """The first half or so, which ends within a sentence."""
    words = list(re.finditer(r"\S+", text))
    if len(words) < _LEAST_WORDS:
        return
    inside = [word for word in words[len(words) // 3 : 2 * len(words) // 3] if word[0][-1].isalnum()]
    draw.shuffle(inside)
    yield from (text[: word.end()] for word in inside)


def _repeated(text: str, draw: Random) -> Iterator[str]:
    """The first sentences, the last of them repeated until the length is the answer's."""
    ends = [found.start() for found in _SENTENCE_END.finditer(text.strip())]
    if not ends or len(text.split()) < _LEAST_WORDS:
        return
    kept = list(range(len(ends)))
    draw.shuffle(kept)
    for index in kept:
        beginning = text.strip()[: ends[index]]
        again = beginning[ends[index - 1] if index else 0 :].strip()
        times = round((len(text) - len(beginning)) / (len(again) + 1))
        if again and times > 0:
            yield " ".join([beginning, *[again] * times])


_MAKERS: Final[dict[Kind, _Maker]] = {
    "other_request": _other_request,
    "broken_code": _by_itself(broken),
    "broken_number": _by_itself(wrong_ends),
    "refusal": _refusal,
    "cut_off": _by_itself(_cut_off),
    "repeated": _by_itself(_repeated),
}
