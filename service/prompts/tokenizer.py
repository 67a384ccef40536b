"""Text to token ids and nothing else, from any number of threads, with control strings of a user kept as plain text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT: Final = 4096
"""Characters up to which handing a text to tokenizers' thread pool costs more than it gains."""
_REMEMBERED_CHARS: Final = 16_384
"""A template may come with a request: longer pieces of one are not remembered, or callers could fill the memory."""
_ASSUMED_CHARS: Final = 512

T = TypeVar("T")


class Codec:
    """Two private copies of a tokenizer that only ever encode, which is safe from many threads: `plain` as it is, and
    `guarded`, which reads control strings as plain text and stand-ins as the control tokens that they stand for."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str) -> None:
        """`written` is what the chat template writes: added tokens in it are control tokens, special or not."""
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(state))
        with_special = self._plain.encode("a")
        # What stands before a text that is encoded the ordinary way: the BOS of Llama and Mistral.
        self._prefix = with_special.ids[: (*with_special.special_tokens_mask, 0).index(0)]
        # From here on post-processing would only trim spaces off the offsets.
        self._plain.post_processor = state["post_processor"] = None
        added = {
            id_: token
            for id_, token in self._plain.get_added_tokens_decoder().items()
            if token.content.strip() and (token.special or token.content in written)
        }
        self._unknown = _unknown_token(state["model"])
        self._control = frozenset(id_ for id_, token in added.items() if token.content != self._unknown)
        self._limits = _token_limits(state)
        self._guarded = Tokenizer.from_str(json.dumps(state))
        self._guarded.add_special_tokens(list(added.values()))
        self._guarded.encode_special_tokens = True
        self._stand_ins, self._real = self._add_stand_ins(added)
        strings = sorted(map(re.escape, self._stand_ins), key=len, reverse=True)
        self._control_string = re.compile("|".join(strings) or r"(?!)")
        self.guard = _remembering(self._guard)
        self.control_in = _remembering(self._control_in)

    def _add_stand_ins(self, added: dict[int, AddedToken]) -> tuple[dict[str, str], dict[int, int]]:
        secret = secrets.token_hex(16)
        stand_ins = {token.content: f"\ue000{secret}.{id_}\ue001" for id_, token in added.items()}
        self._guarded.add_tokens(
            [
                AddedToken(
                    stand_ins[t.content], lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized, special=False
                )
                for t in added.values()
            ]
        )
        vocab = self._guarded.get_vocab()
        real = {vocab[stand_ins[token.content]]: id_ for id_, token in added.items()}
        return stand_ins, real

    def encode_all(self, texts: Sequence[str]) -> list[Encoding]:
        """The tokens of each text, nothing put before or after it, control strings read as control tokens.

        Other threads go on meanwhile, and several texts use all cores, unless there is little to do.
        """
        unique = list(dict.fromkeys(texts))
        if len(unique) == 1 and len(unique[0]) <= _SHORT:
            found = [self._plain.encode(unique[0], add_special_tokens=False)]
        else:
            found = self._plain.encode_batch(unique, add_special_tokens=False)
        by_text = dict(zip(unique, found, strict=True))
        return [by_text[text] for text in texts]

    def encode_guarded(self, text: str) -> Encoding:
        """The tokens of the text with control strings split and stand-ins kept; see `ids_of`."""
        return self._guarded.encode(text, add_special_tokens=False)

    def ids_of(self, encoding: Encoding, guarded: bool) -> list[int]:
        """The encoding's ids as the model's own."""
        return [self._real.get(id_, id_) for id_ in encoding.ids] if guarded else encoding.ids

    def ids(self, text: str, guarded: bool) -> list[int]:
        """The ids of the text alone."""
        return self.ids_of(self.encode_guarded(text) if guarded else self.encode_all([text])[0], guarded)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids; special tokens are left out."""
        return self._plain.decode(list(ids), skip_special_tokens=True)

    def holds_only(self, control: tuple[int, ...], ids: list[int], text: str, guarded: bool) -> bool:
        """Whether the control tokens among `ids` are these. The unknown token also stands for other text than its own
        name, so there the text is asked."""
        if tuple(filter(self._control.__contains__, ids)) != control:
            return False
        return guarded or self._unknown is None or self._unknown not in text

    def ahead_of(self, ids: list[int]) -> list[int]:
        """What to put before a raw text: what the tokenizer would, unless the layout writes it itself."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix

    def _guard(self, text: str) -> str:
        return self._control_string.sub(lambda found: self._stand_ins[found[0]], text)

    def _control_in(self, text: str) -> tuple[int, ...]:
        return tuple(id_ for id_ in self.ids(text, False) if id_ in self._control)

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A number of tokens that the texts have at least: their size over that of the longest token.

        Where a tokenizer may drop text, that is not known, and one for each `_ASSUMED_CHARS` characters is taken: what
        is longer is nearly all white space or of no known letter, and is not worth the minutes that it may take.
        """
        if self._limits is None:
            return sum(map(len, texts)) // _ASSUMED_CHARS
        raw = [text.encode() for text in texts]
        least = list(map(_least_composed if self._limits.composes else _size_and_words, raw))
        size = 0 if self._limits.drops else sum(size for size, _ in least)
        words = sum(words for _, words in least)
        return max(-(-size // self._limits.size), -(-words // self._limits.alnum))


def _remembering(function: Callable[[str], T]) -> Callable[[str], T]:
    """The function with a memory for short texts."""
    remembered = lru_cache(maxsize=256)(function)
    return lambda text: (remembered if len(text) <= _REMEMBERED_CHARS else function)(text)


@dataclass(frozen=True, slots=True)
class _TokenLimits:
    """The most bytes, and the most ASCII letters and digits, that one token can stand for.

    `composes`: after composition to NFC. `drops`: some characters other than those may be in no token at all.
    """

    size: int
    alnum: int
    composes: bool
    drops: bool


_ALNUM: Final = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_COMPOSED_SHRINK: Final = 4
"""Composition to NFC leaves at least this part of a text's bytes in UTF-8; the worst case is 7 that become 2."""
# The first bytes of characters that NFC changes only where another kind of character follows: of 1, 2 and 3 bytes.
_SETTLED: Final = (bytes(range(0x80)), bytes([*range(0xC2, 0xCC), 0xD0, 0xD1]), bytes([*range(0xE4, 0xEA), 0xEB, 0xEC]))
_OTHER_FIRST: Final = bytes(set(range(0xC2, 0xF5)) - set(b"".join(_SETTLED)))


def _count(text: bytes, wanted: bytes) -> int:
    """How many of the text's bytes are among the wanted ones."""
    return len(text) - len(text.translate(None, wanted))


def _size_and_words(text: bytes) -> tuple[int, int]:
    """A text's bytes, and its ASCII letters and digits."""
    return len(text), _count(text, _ALNUM)


def _least_composed(text: bytes) -> tuple[int, int]:
    """A lower bound of both after composition to NFC.

    Python's own normalize is quadratic in runs of combining marks, and holds up every other thread. So nothing is
    composed: each character outside `_SETTLED` counts as one that swallows the character before it.
    """
    others = _count(text, _OTHER_FIRST)
    settled = sum(length * _count(text, first) for length, first in enumerate(_SETTLED, start=1))
    size = max(len(text) // _COMPOSED_SHRINK, settled - len(_SETTLED) * others)
    return size, max(0, _count(text, _ALNUM) - others)


def _token_limits(state: dict[str, Any]) -> _TokenLimits | None:
    """None unless every ASCII letter and digit of a text surely ends up in some token: BPE that knows them all, and no
    step before it that drops text (composition to NFC is allowed for)."""
    model, vocab = state["model"], state["model"].get("vocab", {})
    steps = [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    if model["type"] != "BPE" or any(map(_drops_text, steps)) or not all(chr(letter) in vocab for letter in _ALNUM):
        return None
    over_bytes = "ByteLevel" in kinds
    units = pre_tokenizers.ByteLevel.alphabet() if over_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    complete = all(unit in vocab for unit in units) and (over_bytes or bool(model.get("byte_fallback")))
    added = [token["content"] for token in state["added_tokens"]]
    return _TokenLimits(
        size=max(*(len(token) if over_bytes else _size(token) for token in vocab), *map(_size, added), 1),
        alnum=max(_count(token.encode(), _ALNUM) for token in [*vocab, *added]),
        composes="NFC" in kinds,
        drops=not complete or any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]),
    )


def _size(text: str) -> int:
    return len(text.encode())


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    inner = step.get("normalizers", step.get("pretokenizers"))
    return [step] if inner is None else [s for part in inner for s in _steps(part)]


def _drops_text(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        return bool(step["pattern"] != {"String": " "} or not step["content"])
    if step["type"] in {"Split", "Punctuation"}:
        return bool(step["behavior"] == "Removed")
    return step["type"] not in {"NFC", "Prepend", "ByteLevel", "Metaspace", "Digits"}


def _unknown_token(model: dict[str, Any]) -> str | None:
    """The token that the model writes for text that it has no token for."""
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")
