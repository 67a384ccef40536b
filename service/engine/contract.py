"""The seam between the service and a model runtime: an engine answers batches of items.

An engine is loaded for one task and takes the items of that task only:

    task        item          answer           what the answer holds
    labels      ScoreItem     LabelLogprobs    the log-probability of every label as the next token
    classify    ClassifyItem  Classified       the logit of a classification head
    generate    GenerateItem  Generated        new tokens

An upstream server whose tokenizer is not known here is sent text: TextScoreItem -> LabelLogprobs, TextGenerateItem ->
GeneratedText. A failure that concerns one item only is its answer, an ItemFailure.

All log-probabilities are natural logarithms over the full vocabulary. Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from client.errors import ErrorCode

Task: TypeAlias = Literal["labels", "classify", "generate"]
DType: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]

BYTES_PER_TOKEN: Final = 4
"""UTF-8 bytes per token in length estimates, for text whose tokenizer is not known: about right for English prose."""


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """A prompt and the labels that may follow it.

    `token_ids`: the whole prompt, special tokens included. `label_ids`: the token ids whose log-probabilities are
    wanted, one or more, all different, in any order.

    `boundaries`: increasing offsets into `token_ids` where a shared prefix may end (after the template's head, after
    the question). An engine that shares prefixes must split the prompt at every one of them, even where nothing is
    shared: the split changes rounding, and a score must not depend on the other items of its batch.
    """

    token_ids: Sequence[int]
    label_ids: tuple[int, ...]
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelLogprobs:
    """The answer to a ScoreItem or TextScoreItem.

    `logprobs`: one per label, in the item's order. `argmax_id`: the most likely next token, or any id that is no
    label's if an API does not say which it is; for a TextScoreItem the index of the label that it spells, or the number
    of labels if it spells none. `cached_tokens`: how many of the prompt's tokens were taken from a prefix cache.
    `floored`: an API did not return every label, and the missing ones have the configured floor instead of their own
    log-probability.
    """

    logprobs: tuple[float, ...]
    argmax_id: int
    cached_tokens: int = 0
    floored: bool = False


@dataclass(frozen=True, slots=True)
class ClassifyItem:
    """A text for a classification head with one output. `token_ids` and `boundaries` as in ScoreItem."""

    token_ids: Sequence[int]
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Classified:
    """The raw logit of the head, without an activation, in fp32 from the last token's hidden state."""

    logit: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """A prompt to continue. `token_ids` and `boundaries` as in ScoreItem.

    Generation stops at one of `stop_ids` (usually the model's end-of-sequence ids) or after `max_new_tokens`.
    `temperature` 0 is greedy. Above 0 `seed`, 0 to 2**63 - 1, fixes the draws whatever else is in the batch, but a
    batch of another shape may round logits differently. The torch engine uses the seed's lower 32 bits.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    seed: int = 0
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """The new tokens without the stop token. `ended` is False if `max_new_tokens` cut the text off."""

    token_ids: tuple[int, ...]
    ended: bool
    cached_tokens: int = 0

    @property
    def new_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class TextScoreItem:
    """A ScoreItem as text, for a server that tokenizes: the user message `text`, and the labels that may begin the
    reply, all different."""

    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextGenerateItem:
    """A GenerateItem as text: the user message `text`. The server decides where the reply ends."""

    text: str
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """A reply of `new_tokens` tokens. `ended` is False if `max_new_tokens` cut it off."""

    text: str
    ended: bool
    new_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """A failure of this item alone. Its caller gets the code and the message; the item is not retried."""

    code: ErrorCode
    message: str


TokenItem: TypeAlias = ScoreItem | ClassifyItem | GenerateItem
TextItem: TypeAlias = TextScoreItem | TextGenerateItem
AnyItem: TypeAlias = TokenItem | TextItem
AnyAnswer: TypeAlias = LabelLogprobs | Classified | Generated | GeneratedText
ItemT = TypeVar("ItemT", bound=AnyItem)


@dataclass(frozen=True, slots=True)
class Executor:
    """The code and hardware that an engine computes with.

    `rung`: which implementation (`compiled-amx`, `packed`, `vllm`, …). `digest` covers everything that the last digits
    depend on except the model's files and the item. `stable`: whether an item has the same bits in every batch, as
    checked when the model was loaded; None if it was not checked.
    """

    rung: str
    digest: str
    stable: bool | None


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine says about itself.

    `engine`: its kind (`torch`, `vllm`, …). `dtype`: the weights' number format. `max_tokens`: the longest item, prompt
    and new tokens together. `batch_tokens`: how many tokens make a full batch; the scheduler aims for that.
    `shares_prefixes`: whether tokens before an item's last boundary are computed once for all items of a batch that
    begin with them.
    """

    engine: str
    task: Task
    dtype: str
    max_tokens: int
    batch_tokens: int
    executor: Executor
    shares_prefixes: bool = False

    @property
    def variant(self) -> str:
        """Everything an answer depends on except the model's files and the item, our release included: a cache key."""
        return f"{version('judge-as-api')} {self.engine} {self.executor.rung} {self.executor.digest} {self.dtype}"


class Engine(Protocol):
    """A loaded model. Called from one thread at a time; it need not be thread-safe."""

    @property
    def info(self) -> EngineInfo:
        """Constant from load to close."""

    def run(self, items: Sequence[AnyItem]) -> Sequence[AnyAnswer | ItemFailure]:
        """Answer a batch: one answer per item, in order. Returns when all of them are answered.

        Every item has at least one token, at most `info.max_tokens` including the tokens to generate, and, if it asks
        for labels, at least one. Raises ValueError for an item of another task or outside these limits, before
        computing anything. Any other exception fails the batch as a whole; the worker then tries each item alone.
        """

    def close(self) -> None:
        """Free the model. The engine cannot be used afterwards."""


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has, by its length in bytes."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def prompt_tokens(item: AnyItem) -> int:
    """The length of an item's prompt in tokens; estimated for text."""
    return estimate_tokens(item.text) if isinstance(item, TextItem) else len(item.token_ids)


def total_tokens(item: AnyItem) -> int:
    """The length of an item's prompt plus the most tokens that may be generated for it."""
    new = item.max_new_tokens if isinstance(item, GenerateItem | TextGenerateItem) else 0
    return prompt_tokens(item) + new


def check_kind(kind: type[ItemT], items: Sequence[AnyItem]) -> list[ItemT]:
    """The items, typed. Raises ValueError if one of them is of another kind."""
    matching: list[ItemT] = [item for item in items if isinstance(item, kind)]
    if len(matching) != len(items):
        raise ValueError(f"this engine answers {kind.__name__} only: it was loaded for one task")
    return matching


def split_labels(item: ScoreItem, most: int) -> list[ScoreItem]:
    """The item once per `most` of its labels, in their order, for a runtime that limits how many it takes at once."""
    parts = [item.label_ids[start : start + most] for start in range(0, len(item.label_ids), most)]
    return [ScoreItem(item.token_ids, part, item.boundaries) for part in parts]


def short_digest(*parts: str) -> str:
    """12 hex digits of a SHA-256 over these strings."""
    return sha256("\0".join(parts).encode()).hexdigest()[:12]


def check_ids(token_ids: Sequence[int], most: int, vocabulary: int) -> None:
    """Raise ValueError unless there are 1 to `most` ids, each below `vocabulary`.

    Engines call this before computing anything: on a GPU an id out of range aborts the whole CUDA context.
    """
    if not 1 <= len(token_ids) <= most:
        raise ValueError(f"an item has {len(token_ids)} tokens; this engine reads 1 to {most}")
    if min(token_ids) < 0 or max(token_ids) >= vocabulary:
        raise ValueError(f"a token id is outside the model's vocabulary of {vocabulary}")
