"""What an engine is: the only seam between the service and a model runtime.

An engine is loaded for one task and has one method, `run`: labels' probabilities for `ScoreItem`s, a classification
head's logit for `ClassifyItem`s, or generated text for `GenerateItem`s. An engine that asks a server whose tokenizer
is not known here gets text in place of token ids: `TextScoreItem`s and `TextGenerateItem`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from client.errors import ErrorCode

Task: TypeAlias = Literal["labels", "classify", "generate"]

TOKEN_BYTES: Final = 4
"""Bytes of UTF-8 for one token, where a text's tokens can only be estimated: about what they are in English prose."""


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One prompt whose next token is asked about.

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
    """The answer for one item: natural-log probabilities over the full vocabulary, in the order of the item's labels.

    `argmax_id` is the likeliest next token; for text it is the place of the label that the token is, or the number of
    labels where it is none. `cached_tokens` counts the tokens whose work was not done again. `floored`:
    an API did not return every label, and a probability that was set for this case stands in for what is missing.
    """

    logprobs: tuple[float, ...]
    argmax_id: int
    cached_tokens: int = 0
    floored: bool = False


@dataclass(frozen=True, slots=True)
class ClassifyItem:
    """One text for a classification head with one output. `token_ids` and `boundaries` as in ScoreItem."""

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

    At most `max_new_tokens` are generated; one of `stop_ids` (the model's end-of-sequence ids) ends the text.
    `temperature` 0 takes the likeliest token each time; else `seed` (0 to 2**63 - 1, of which the torch engine uses
    the lower 32 bits) alone decides the draws, whatever stands beside the item, but for the rounding of a batch of
    another shape.
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

    @property
    def new_tokens(self) -> int:
        """Its length in tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TextScoreItem:
    """A prompt as text, for a server that tokenizes it. `labels` are the distinct words whose log-probability as the
    first word of a reply is asked for."""

    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextGenerateItem:
    """A prompt as text that is to be replied to. The rest as in GenerateItem; the server knows what ends a reply."""

    text: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A generated reply; `ended` is False where the limit cut it off. `new_tokens` is its length in tokens."""

    text: str
    ended: bool
    new_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """What befell one item alone: it is passed on to the item's caller, and the item is not tried again."""

    code: ErrorCode
    message: str


TokenItem: TypeAlias = ScoreItem | ClassifyItem | GenerateItem
TextItem: TypeAlias = TextScoreItem | TextGenerateItem
AnyItem: TypeAlias = TokenItem | TextItem
AnyAnswer: TypeAlias = LabelLogprobs | Classified | Generated | GeneratedText
Item = TypeVar("Item", bound=AnyItem)


@dataclass(frozen=True, slots=True)
class Executor:
    """The code and the hardware that compute an engine's numbers.

    `rung` names the way (`compiled-amx`, `packed`, …), `digest` stands for all that the last digits depend on besides
    the model's files and the item. `stable` says whether an item was found to have the same bits in any company: True
    or False where that was checked when the model was loaded, None where it was not.
    """

    rung: str
    digest: str
    stable: bool | None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself once it is loaded.

    `engine` is its kind (`torch`, `vllm`, …), `dtype` the number format of the weights, `max_tokens` the longest prompt
    in tokens, `batch_tokens` the number of tokens that fill one call well: the worker forms batches of about that many.
    """

    engine: str
    task: Task
    dtype: str
    max_tokens: int
    batch_tokens: int
    executor: Executor

    @property
    def variant(self) -> str:
        """All that an answer depends on besides the model's files and the item, our release included."""
        return f"{version('judge-as-api')} {self.engine} {self.executor.rung} {self.executor.digest} {self.dtype}"


class Engine(Protocol):
    """A loaded model. One thread calls it; it need not be safe for more."""

    @property
    def info(self) -> EngineInfo:
        """What it is; the same from load to close."""

    def run(self, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
        """One answer for each item, in order.

        Every item has 1 to `info.max_tokens` tokens, those that may be generated included. Raises ValueError for an
        item of another task or outside these bounds, before anything is computed, and whatever the runtime raises when
        it fails as a whole; the worker then tries the items one by one.
        """

    def close(self) -> None:
        """Free the model."""


def text_tokens(text: str) -> int:
    """An estimate of a text's tokens, of which only the server's tokenizer knows the number: see TOKEN_BYTES."""
    return -(-len(text.encode()) // TOKEN_BYTES)


def prompt_tokens(item: AnyItem) -> int:
    """What is read for an item, in tokens; an estimate for text."""
    return text_tokens(item.text) if isinstance(item, TextItem) else len(item.token_ids)


def tokens_of(item: AnyItem) -> int:
    """What is read for an item and may be generated, in tokens."""
    new = item.max_new_tokens if isinstance(item, GenerateItem | TextGenerateItem) else 0
    return prompt_tokens(item) + new


def items_of(kind: type[Item], items: Sequence[AnyItem]) -> list[Item]:
    """The items, all of this kind; raises ValueError for another task's."""
    found: list[Item] = [item for item in items if isinstance(item, kind)]
    if len(found) != len(items):
        raise ValueError(f"this engine answers {kind.__name__} only: it was loaded for one task")
    return found


def digest_of(*parts: str) -> str:
    """12 hexadecimal digits that stand for these texts."""
    return sha256("\0".join(parts).encode()).hexdigest()[:12]


def check_ids(token_ids: Sequence[int], most: int, vocabulary: int) -> None:
    """Raise ValueError for too many ids, none, or one that the model has not got.

    Engines check before anything is computed: ids out of range would abort the whole CUDA context, not just this call.
    """
    if not 1 <= len(token_ids) <= most:
        raise ValueError(f"an item has {len(token_ids)} tokens; this engine reads 1 to {most}")
    if min(token_ids) < 0 or max(token_ids) >= vocabulary:
        raise ValueError(f"a token id is outside the model's vocabulary of {vocabulary}")
