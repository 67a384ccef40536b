"""What an engine is: the only seam between the service and a model runtime.

An engine answers items of one kind, by the judge it was loaded for: labels' probabilities (`ScoreItem`), a
classification head's logit (`ClassifyItem`), or generated text (`GenerateItem`). `tasks` says which it can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final, Literal, Protocol, TypeAlias, cast

from client.errors import ErrorCode

Task: TypeAlias = Literal["labels", "classify", "generate"]


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One prompt to be read.

    `token_ids` is the whole prompt, special tokens included. `label_ids` are the distinct ids whose log-probability
    is asked for. `boundaries` are rising offsets into `token_ids` at which the prompt's content changes (after the
    template's head, after the question): items with equal tokens before a boundary may share that prefix's work, and
    an engine that shares must always split there, so that an item's number does not depend on its neighbours.
    """

    token_ids: Sequence[int]
    label_ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """The answer for one item: natural-log probabilities over the full vocabulary, in the order of `label_ids`.

    `argmax_id` is the likeliest next token; `cached_tokens` counts the tokens whose work was not done again. `floored`:
    an API did not return every label, and a probability that was set for this case stands in for what is missing.
    """

    logprobs: tuple[float, ...]
    argmax_id: int
    cached_tokens: int = 0
    floored: bool = False


@dataclass(frozen=True, slots=True)
class ClassifyItem:
    """One text to be read by a classification head with one output. `token_ids` and `boundaries` as in ScoreItem."""

    token_ids: Sequence[int]
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Classified:
    """The raw logit of the head, computed in fp32 from the last token's hidden state."""

    logit: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """One prompt to be continued. `token_ids` and `boundaries` as in ScoreItem.

    At most `max_new_tokens` are written; one of `stop_ids` (the model's end-of-sequence ids) ends the text.
    `temperature` 0 takes the likeliest token each time; else `seed` (0 to 2**63 - 1) alone decides the draws, whatever
    stands beside the item, but for the rounding of a batch of another shape.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """The new tokens, without the one that ended them; `ended` is False where the limit cut the text off."""

    token_ids: tuple[int, ...]
    ended: bool
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """What befell one item alone: it is passed on to the item's caller, and the item is not tried again."""

    code: ErrorCode
    message: str


AnyItem: TypeAlias = ScoreItem | ClassifyItem | GenerateItem
AnyAnswer: TypeAlias = LabelLogprobs | Classified | Generated


class Engine(Protocol):
    """A loaded model. One thread calls it; it need not be safe for more.

    It has the methods of its `tasks`: `LabelEngine`, `ClassifyEngine`, `GenerateEngine`. Each of these gives one answer
    for each item, in order. Every item has 1 to `max_tokens` tokens. They raise whatever the runtime raises when it
    fails as a whole; the worker then tries the items one by one.
    """

    @property
    def name(self) -> str:
        """`torch`, `fake`, …"""

    @property
    def tasks(self) -> frozenset[Task]:
        """What this engine, as it is loaded, can be asked for."""

    @property
    def max_tokens(self) -> int:
        """The longest prompt, in tokens, that the model reads."""

    @property
    def batch_tokens(self) -> int:
        """The number of tokens that fill one call well; the worker forms batches of about this many."""

    @property
    def dtype(self) -> str:
        """The number format of the weights: `bfloat16`, `float32`, …"""

    @property
    def executor(self) -> str:
        """The code and the hardware that compute the numbers: what else they depend on, in their last digits."""

    def close(self) -> None:
        """Free the model."""


class LabelEngine(Engine, Protocol):
    """An engine whose tasks hold `labels`."""

    def label_logprobs(self, items: Sequence[ScoreItem]) -> Sequence[LabelLogprobs | ItemFailure]:
        """The labels' log-probabilities for each item."""


class ClassifyEngine(Engine, Protocol):
    """An engine whose tasks hold `classify`."""

    def classify(self, items: Sequence[ClassifyItem]) -> Sequence[Classified | ItemFailure]:
        """The head's logit for each item."""


class GenerateEngine(Engine, Protocol):
    """An engine whose tasks hold `generate`."""

    def generate(self, items: Sequence[GenerateItem]) -> Sequence[Generated | ItemFailure]:
        """A continuation of each item; its tokens and `max_new_tokens` together are at most `max_tokens`."""


_TASK_OF: Final[dict[type[AnyItem], Task]] = {
    ScoreItem: "labels",
    ClassifyItem: "classify",
    GenerateItem: "generate",
}


def variant_of(engine: Engine) -> str:
    """All that an answer depends on besides the model's files and the item: our release, and what the engine says."""
    return f"{version('judge-as-api')} {engine.name} {engine.executor} {engine.dtype}"


def answers_to(engine: Engine, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
    """Ask the engine for what the items, all of one kind, want; raises ValueError where it cannot do that."""
    kinds = {_TASK_OF[type(item)] for item in items}
    if len(kinds) != 1 or not kinds <= engine.tasks:
        raise ValueError(f"the engine {engine.name} does {', '.join(sorted(engine.tasks))}, not {', '.join(kinds)}")
    some: Any = engine
    match kinds.pop():
        case "labels":
            return cast(LabelEngine, some).label_logprobs(cast(Sequence[ScoreItem], items))
        case "classify":
            return cast(ClassifyEngine, some).classify(cast(Sequence[ClassifyItem], items))
        case "generate":
            return cast(GenerateEngine, some).generate(cast(Sequence[GenerateItem], items))


def check_ids(token_ids: Sequence[int], most: int, vocabulary: int) -> None:
    """Raise ValueError for too many ids, none, or one that the model has not got.

    Engines check before anything is computed: ids out of range would abort the whole CUDA context, not just this call.
    """
    if not 1 <= len(token_ids) <= most:
        raise ValueError(f"an item has {len(token_ids)} tokens; this engine reads 1 to {most}")
    if min(token_ids) < 0 or max(token_ids) >= vocabulary:
        raise ValueError(f"a token id is outside the model's vocabulary of {vocabulary}")
