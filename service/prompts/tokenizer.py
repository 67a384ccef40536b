"""Text to token ids and nothing else, from any number of threads, with users' control strings kept as plain text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tokenizers import AddedToken, Encoding, Tokenizer

from service.prompts.length_bound import LengthBound

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHORT: Final = 4096
"""Characters up to which handing a text to tokenizers' thread pool costs more than it gains."""
_REMEMBERED_CHARS: Final = 16_384
"""Longer pieces of a template are not remembered: one may come with a request, and callers could fill the memory."""

T = TypeVar("T")


class Codec:
    """Two private copies of a tokenizer, which only ever encode, as that is safe from many threads.

    The plain one is the tokenizer as it is. The guarded one reads control strings as plain text, and secret stand-ins
    as the control tokens that they stand for.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, written: str) -> None:
        """`written` is what the chat template writes: added tokens in it are control tokens, special or not."""
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        state.update(truncation=None, padding=None)
        self._plain = Tokenizer.from_str(json.dumps(state))
        with_special = self._plain.encode("a")
        # What the tokenizer puts before a text that is encoded the ordinary way: the BOS of Llama and Mistral.
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
        self._bound = LengthBound(state)
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
        """The tokens of each text, with nothing added before or after it and control strings read as control tokens.

        Other threads run meanwhile, and several texts use all cores, unless there is little to do.
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
        """Whether the control tokens among `ids` are exactly `control`.

        The unknown token also stands for text without a token, so whether somebody wrote its name shows in the text
        alone.
        """
        if tuple(filter(self._control.__contains__, ids)) != control:
            return False
        return guarded or self._unknown is None or self._unknown not in text

    def ahead_of(self, ids: list[int]) -> list[int]:
        """What to put before a raw text: the tokenizer's own prefix, unless the layout writes it itself."""
        return [] if ids[: len(self._prefix)] == self._prefix else self._prefix

    def _guard(self, text: str) -> str:
        return self._control_string.sub(lambda found: self._stand_ins[found[0]], text)

    def _control_in(self, text: str) -> tuple[int, ...]:
        return tuple(id_ for id_ in self.ids(text, False) if id_ in self._control)

    def fewest_tokens(self, texts: Sequence[str]) -> int:
        """A lower bound of the texts' number of tokens, at the cost of reading them once; see length_bound.py."""
        return self._bound.fewest(texts)


def _remembering(function: Callable[[str], T]) -> Callable[[str], T]:
    """The function, with a cache for short texts."""
    remembered = lru_cache(maxsize=256)(function)
    return lambda text: (remembered if len(text) <= _REMEMBERED_CHARS else function)(text)


def _unknown_token(model: dict[str, Any]) -> str | None:
    """The token that the model uses for text without a token of its own."""
    if model["type"] == "Unigram":
        return None if model["unk_id"] is None else str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token")
