"""The labels' token ids in context: what each label is after this very prompt, one token or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from client.errors import ErrorCode
from service.errors import ServiceError
from service.prompts.tokenizer import Codec
from service.questions import Option

_CONTEXT_CHARS: Final = 48
_CONTEXT_TOKENS: Final = 4
_LONGEST: Final = 256
"""Characters of a label at most: no vocabulary has a longer token, and lookups are remembered with their labels."""


@dataclass(frozen=True, slots=True)
class _LabelIds:
    """The labels' distinct ids after a text, by option, and the last tokens of that text."""

    by_option: tuple[tuple[int, ...], ...]
    context: tuple[int, ...]


class LabelFinder:
    """Finds the labels' ids behind a prompt. Safe for any number of threads."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._remembered = lru_cache(maxsize=4096)(self._find)

    def find(
        self, options: tuple[Option, ...], text: str, ids: Sequence[int], guarded: bool
    ) -> tuple[tuple[int, ...], ...]:
        """The ids of each option's spellings behind `text`, whose tokens are `ids`; raises ServiceError(BAD_LABEL).

        The prompt's last characters decide them, which is cheap to look up. The whole prompt is tokenized with each
        label only where its last tokens are not those of its last characters taken alone.
        """
        check_lengths(options)
        try:
            found = self._remembered(text[-_CONTEXT_CHARS:], guarded, options)
            if tuple(ids[-len(found.context) :]) == found.context:
                return found.by_option
        except ServiceError:
            pass
        return self._find(text, guarded, options).by_option

    def single_tokens(self, labels: Iterable[str], text: str, guarded: bool) -> Iterator[str]:
        """Those of the labels that are one token each behind the text's last characters, all distinct, in order.

        A hint: `find` has the last word, as it knows the whole prompt.
        """
        context = text[-_CONTEXT_CHARS:]
        before = self._codec.ids(context, guarded)
        seen: set[int] = set()
        for label in labels:
            tokens = self._codec.ids(context + label, guarded)
            if tokens[:-1] == before and tokens[-1] not in seen:
                seen.add(tokens[-1])
                yield label

    def _find(self, text: str, guarded: bool, options: tuple[Option, ...]) -> _LabelIds:
        before = self._codec.ids(text, guarded)
        by_option = [self._ids_of(option, text, before, guarded) for option in options]
        owners: dict[int, Option] = {}
        for option, ids in zip(options, by_option, strict=True):
            for id_ in ids:
                if (other := owners.setdefault(id_, option)) is not option:
                    raise bad_label(f"a {other.name} label and a {option.name} label are the same token")
        return _LabelIds(tuple(by_option), tuple(before[-_CONTEXT_TOKENS:]))

    def _ids_of(self, option: Option, text: str, before: list[int], guarded: bool) -> tuple[int, ...]:
        last_ids = []
        for index, label in enumerate(option.spellings):
            tokens = self._codec.ids(text + label, guarded)
            if tokens[:-1] != before:
                raise bad_label(f"{option.name} label {index} {_why_not_one_token(before, tokens)}")
            last_ids.append(tokens[-1])
        return tuple(dict.fromkeys(last_ids))


def check_lengths(options: Sequence[Option]) -> None:
    """Raise ServiceError(BAD_LABEL) for a label that is too long to be one token anywhere."""
    for option in options:
        if max(map(len, option.spellings)) > _LONGEST:
            raise bad_label(f"a {option.name} label is over {_LONGEST} characters long, and must be one token")


def bad_label(problem: str) -> ServiceError:
    """The error for a label that cannot be asked for."""
    return ServiceError(ErrorCode.BAD_LABEL, problem, param="template.labels")


def _why_not_one_token(before: list[int], after: list[int]) -> str:
    if after[: len(before)] != before:
        return "joins with the prompt's last token; begin it, or end the layout, in another way"
    return f"is {len(after) - len(before)} tokens after this prompt, and must be one"
