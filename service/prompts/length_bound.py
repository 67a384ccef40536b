"""How few tokens a text can have, without tokenizing it: hopelessly long ones are refused before that takes minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tokenizers import pre_tokenizers

_ASSUMED_CHARS: Final = 512
_ALNUM: Final = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_COMPOSED_SHRINK: Final = 4
"""Composition to NFC keeps at least this part of a text's bytes in UTF-8; the worst case is 7 bytes that become 2."""
# The first bytes of characters that NFC changes only where another kind of character follows: of 1, 2 and 3 bytes.
_SETTLED: Final = (bytes(range(0x80)), bytes([*range(0xC2, 0xCC), 0xD0, 0xD1]), bytes([*range(0xE4, 0xEA), 0xEB, 0xEC]))
_OTHER_FIRST: Final = bytes(set(range(0xC2, 0xF5)) - set(b"".join(_SETTLED)))


class LengthBound:
    """A lower bound of token counts for one tokenizer: a text's size over that of the longest token."""

    def __init__(self, state: dict[str, Any]) -> None:
        """`state` is the tokenizer's, as tokenizer.json has it."""
        self._limits = _token_limits(state)

    def fewest(self, texts: Sequence[str]) -> int:
        """At least so many tokens for the texts, read one after the other.

        Where the tokenizer may drop text, no bound is known, and one token for each `_ASSUMED_CHARS` characters is
        assumed: a longer text is nearly all white space or unknown letters, and not worth the minutes it may take.
        """
        if self._limits is None:
            return sum(map(len, texts)) // _ASSUMED_CHARS
        measure = least_composed if self._limits.composes else _size_and_words
        measured = [measure(text.encode()) for text in texts]
        size = 0 if self._limits.drops else sum(size for size, _ in measured)
        words = sum(words for _, words in measured)
        return max(-(-size // self._limits.size), -(-words // self._limits.alnum))


@dataclass(frozen=True, slots=True)
class _TokenLimits:
    """The most bytes, and the most ASCII letters and digits, that one token can stand for.

    `composes`: after composition to NFC. `drops`: some other characters may be in no token at all.
    """

    size: int
    alnum: int
    composes: bool
    drops: bool


def _count(text: bytes, wanted: bytes) -> int:
    """How many of the text's bytes are among the wanted ones."""
    return len(text) - len(text.translate(None, wanted))


def _size_and_words(text: bytes) -> tuple[int, int]:
    """A text's bytes, and its ASCII letters and digits."""
    return len(text), _count(text, _ALNUM)


def least_composed(text: bytes) -> tuple[int, int]:
    """A lower bound of a text's bytes, and of its ASCII letters and digits, after composition to NFC.

    Python's own normalize is quadratic in runs of combining marks, and blocks every other thread. So nothing is
    composed: each character outside `_SETTLED` counts as one that swallows the character before it.
    """
    others = _count(text, _OTHER_FIRST)
    settled = sum(length * _count(text, first) for length, first in enumerate(_SETTLED, start=1))
    size = max(len(text) // _COMPOSED_SHRINK, settled - len(_SETTLED) * others)
    return size, max(0, _count(text, _ALNUM) - others)


def _token_limits(state: dict[str, Any]) -> _TokenLimits | None:
    """None unless every ASCII letter and digit of a text surely ends up in some token: BPE with tokens for all of them,
    and no step before it that drops text (composition to NFC is allowed for)."""
    model, vocab = state["model"], state["model"].get("vocab", {})
    steps = [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]
    if model["type"] != "BPE" or any(map(_drops_text, steps)) or not all(chr(letter) in vocab for letter in _ALNUM):
        return None
    kinds = {step["type"] for step in steps}
    over_bytes = "ByteLevel" in kinds
    added = [token["content"].encode() for token in state["added_tokens"]]
    longest = max(len(token) if over_bytes else len(token.encode()) for token in vocab)
    return _TokenLimits(
        size=max(longest, *map(len, added), 1),
        alnum=max(_count(token, _ALNUM) for token in [*(token.encode() for token in vocab), *added]),
        composes="NFC" in kinds,
        drops=not _is_complete(model, over_bytes) or any(t["lstrip"] or t["rstrip"] for t in state["added_tokens"]),
    )


def _is_complete(model: dict[str, Any], over_bytes: bool) -> bool:
    """Whether every byte has a token, so that no character can be left out."""
    units = pre_tokenizers.ByteLevel.alphabet() if over_bytes else [f"<0x{byte:02X}>" for byte in range(256)]
    return all(unit in model["vocab"] for unit in units) and (over_bytes or bool(model.get("byte_fallback")))


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
