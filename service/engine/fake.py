"""An engine without a model: made-up numbers that look like a judge's, the same on every machine.

For testing the service, measuring its own overhead, and trying out a deployment without weights.
"""

from __future__ import annotations

import math
import os
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, cast

from service.engine.contract import (
    AnyItem,
    Classified,
    ClassifyItem,
    EngineInfo,
    Executor,
    Generated,
    GenerateItem,
    LabelLogprobs,
    ScoreItem,
    Task,
    TokenItem,
    check_kind,
    total_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CRASH_STATUS: Final = 70
_KINDS: Final[dict[Task, type[TokenItem]]] = {"labels": ScoreItem, "classify": ClassifyItem, "generate": GenerateItem}
_SPREAD: Final = 4.0
_GRADES: Final = 6
_RATIONALE: Final = "A fake judge reads nothing."
_LABEL_MASS: Final = (0.5, 0.99)
_SPECIAL_TOKENS: Final = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS: Final = (
    "Yes No A B C D the of and to in is it that for you was on are with as be this have or at not but what all were "
    "we when your can said there use an each which she he do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my "
    "than first water been call who its now find long down day did get come made may part over new good answer "
    "question response prompt user assistant system instruction following correct right wrong best better true false "
    "return def function class print self import from int str list value data code test if else while result string "
    "one two three four five six seven eight nine ten please explain because also just only very much most should "
    "Is The What How Answer Question Response User Assistant Write Explain Please"
)


@dataclass(frozen=True, kw_only=True)
class FakeEngine:
    """Implements Engine. An answer is a pure function of its item.

    All labels together get 0.5 to 0.99 of the probability. The log-odds of two labels lie within ±8 and do not depend
    on the other labels. A classification head's logit lies within ±8. Generated text is a sentence and a line
    `Score: n`, in the tokens of `encode` (default: those of `fake_tokenizer`); a share `unparseable` of the texts lacks
    that line. A call sleeps for `delay` seconds plus `delay_per_token` for each token of its prompts and texts.

    To rehearse failures: a batch with `poison_token` in it raises RuntimeError, an item with `nan_token` gets NaN, one
    with `crash_token` ends the process, one with `hang_token` blocks forever.
    """

    vocab_size: int = 2048
    max_tokens: int = 4096
    batch_tokens: int = 16_384
    delay: float = 0.0
    delay_per_token: float = 0.0
    poison_token: int | None = None
    nan_token: int | None = None
    crash_token: int | None = None
    hang_token: int | None = None
    unparseable: float = 0.0
    encode: Callable[[str], Sequence[int]] | None = None
    task: Task = "labels"
    name: str = "fake"
    digest: str = "made-up"
    dtype: str = "float32"

    @property
    def info(self) -> EngineInfo:
        """See Engine. `stable` holds: an answer depends on its item alone."""
        executor = Executor("fake", self.digest, stable=True)
        return EngineInfo(self.name, self.task, self.dtype, self.max_tokens, self.batch_tokens, executor)

    def run(self, items: Sequence[AnyItem]) -> list[LabelLogprobs | Classified | Generated]:
        """See Engine. Raises ValueError for an item outside the contract, RuntimeError for a poisoned batch."""
        accepted = check_kind(_KINDS[self.task], items)
        self._prefill(accepted)
        return [self._answer(item) for item in accepted]

    def close(self) -> None:
        """Nothing to free."""

    def _prefill(self, items: Sequence[TokenItem]) -> None:
        """Check the items, sleep, and rehearse failures: the same for all tasks."""
        tokens = 0
        for item in items:
            if isinstance(item, ScoreItem) and not item.label_ids:
                raise ValueError("an item has no label ids")
            if not 1 <= len(item.token_ids) <= self.max_tokens:
                raise ValueError(f"an item needs 1 to {self.max_tokens} tokens, has {len(item.token_ids)}")
            tokens += total_tokens(item)
        seconds = self.delay + self.delay_per_token * tokens
        if seconds > 0:
            time.sleep(seconds)
        self._rehearse_disaster(items)
        if any(self.poison_token in item.token_ids for item in items):
            raise RuntimeError(f"an item holds the poison token {self.poison_token}")

    def _answer(self, item: TokenItem) -> LabelLogprobs | Classified | Generated:
        match item:
            case ScoreItem():
                return self._score(item)
            case ClassifyItem():
                return Classified(self._logit(item))
            case GenerateItem():
                return self._generate(item)

    def _logit(self, item: ClassifyItem) -> float:
        if self.nan_token in item.token_ids:
            return math.nan
        return 2 * _SPREAD * (2 * _uniform(_prompt_key(item.token_ids), b"logit") - 1)

    def _generate(self, item: GenerateItem) -> Generated:
        """The text depends on the seed, unless the temperature is 0."""
        seed = item.seed if item.temperature else 0
        key = _prompt_key([*item.token_ids, seed & 0xFFFFFFFF, seed >> 32])
        graded = _uniform(key, b"graded") >= self.unparseable
        line = f"\nScore: {int(_GRADES * _uniform(key, b'grade'))}" if graded else ""
        ids = tuple((self.encode or _encode)(f"{_RATIONALE}{line}"))
        return Generated(ids[: item.max_new_tokens], ended=len(ids) < item.max_new_tokens)

    def _rehearse_disaster(self, items: Sequence[TokenItem]) -> None:
        if self.crash_token is not None and any(self.crash_token in item.token_ids for item in items):
            os._exit(CRASH_STATUS)
        while self.hang_token is not None and any(self.hang_token in item.token_ids for item in items):
            time.sleep(60)

    def _score(self, item: ScoreItem) -> LabelLogprobs:
        key = _prompt_key(item.token_ids)
        low, high = _LABEL_MASS
        mass = low + (high - low) * _uniform(key, b"mass")
        logits = [_SPREAD * (2 * _uniform(key, label.to_bytes(8, "little")) - 1) for label in item.label_ids]
        if self.nan_token in item.token_ids:
            logits = [math.nan] * len(logits)
        shift = math.log(mass) - math.log(sum(math.exp(logit) for logit in logits))
        logprobs = tuple(logit + shift for logit in logits)
        return LabelLogprobs(logprobs, self._argmax(item, logprobs, 1 - mass))

    def _argmax(self, item: ScoreItem, logprobs: Sequence[float], rest: float) -> int:
        """The most likely label, or some other token if the rest of the vocabulary has more probability than it."""
        best = max(range(len(logprobs)), key=logprobs.__getitem__)
        if math.exp(logprobs[best]) >= rest:
            return item.label_ids[best]
        return next(token for token in range(self.vocab_size) if token not in item.label_ids)


@cache
def _encode(text: str) -> tuple[int, ...]:
    return tuple(fake_tokenizer()(text).input_ids)


def _prompt_key(token_ids: Sequence[int]) -> bytes:
    """A hash of the ids as 32-bit little-endian numbers, whatever the machine's byte order."""
    ids = array("I", token_ids)
    if sys.byteorder == "big":
        ids.byteswap()
    return blake2b(ids.tobytes(), digest_size=16).digest()


def _uniform(key: bytes, purpose: bytes) -> float:
    """A pseudo-random number in [0, 1), a function of both arguments."""
    return int.from_bytes(blake2b(purpose, key=key, digest_size=6).digest(), "little") / 2**48


def fake_tokenizer(max_tokens: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's control tokens and chat template, trained on the spot in milliseconds.

    It encodes any text. Yes, No, A, B and common English words are single tokens, with and without a leading space.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([form for word in _WORDS.split() for form in (word, f" {word}")], trainer)
    fast: Any = transformers.PreTrainedTokenizerFast
    return cast(
        "PreTrainedTokenizerFast",
        fast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            additional_special_tokens=_SPECIAL_TOKENS[1:],
            chat_template=_CHAT_TEMPLATE,
            model_max_length=max_tokens,
        ),
    )
