"""The prompts and responses to be labelled, from a file or the hub: each row a ResponseSet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from client.data import layouts
from client.data.sources import iter_source
from client.data.tables import DataError, TableRow
from client.labels.labelling import Text
from client.labels.records import GENERAL, FinishReason, SampleKey
from client.schema import Message

CATEGORY_COLUMN: Final = "category"
# Columns of the data that the pairs have in another form.
_CONSUMED: Final = frozenset({"id", "prompt", "responses", "chosen", "rejected"})
# Names in a line of pairs, here or in the trainer, and those by which TRL would take it for data of another kind.
_TAKEN: Final = frozenset(
    {
        *("category", "margin", "score_chosen", "score_rejected", "chosen_cut_off", "rejected_cut_off"),
        *("messages", "completion", "completions", "label"),
    }
)


@dataclass(frozen=True, slots=True)
class LabelSource:
    """Which rows are labelled, and where their categories come from.

    `source` is a file or `hub:NAME[@SPLIT]`. Without a `category` for all, each row's is in `category_column`.
    """

    source: str
    limit: int | None = None
    skip_bad: bool = False
    category: str | None = None
    category_column: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise DataError(f"a limit of {self.limit} leaves nothing to label")


@dataclass(frozen=True, slots=True)
class Response:
    """One of a prompt's responses, as client.labels.candidates.Answer."""

    id: str
    sample: int
    response: str
    finish: FinishReason = "stop"

    @property
    def key(self) -> SampleKey:
        """See SampleKey."""
        return self.id, self.sample


@dataclass(frozen=True, slots=True)
class ResponseSet:
    """A prompt with its responses. The first `better` of them are said to be better than the others; 0: nothing is.

    `columns` are the row's others, as the pairs carry them.
    """

    id: str
    category: str
    prompt: str | tuple[Message, ...]
    responses: tuple[str, ...]
    better: int
    columns: Mapping[str, Any]

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation."""
        return [Message(role="user", content=self.prompt)] if isinstance(self.prompt, str) else [*self.prompt]

    @property
    def prompt_text(self) -> str:
        """The prompt for people to read."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n\n".join(f"[{message.role}]\n{message.content}" for message in self.prompt)


@dataclass(frozen=True, slots=True)
class LabelData:
    """What is to be labelled, and how many rows were left out because they could not be read."""

    sets: list[ResponseSet]
    bad_rows: int

    def answers(self) -> list[Response]:
        """All responses, in order."""
        return [Response(one.id, number, text) for one in self.sets for number, text in enumerate(one.responses)]

    def texts(self) -> dict[SampleKey, Text]:
        """What the judge is asked, by response."""
        return {
            (one.id, number): Text(one.category, one.prompt, text)
            for one in self.sets
            for number, text in enumerate(one.responses)
        }

    def digest(self) -> str:
        """SHA-256, in hex, of everything that is judged, in its order."""
        digest = sha256()
        for one in self.sets:
            prompt = one.prompt if isinstance(one.prompt, str) else [[m.role, m.content] for m in one.prompt]
            digest.update(json.dumps([one.id, one.category, prompt, one.responses]).encode() + b"\n")
        return digest.hexdigest()


def read_label_data(source: LabelSource) -> LabelData:
    """Read the rows. Raises DataError for the first that cannot be read, or counts it with `skip_bad`."""
    sets: dict[str, ResponseSet] = {}
    bad = 0
    for row in iter_source(source.source):
        if len(sets) == source.limit:
            break
        try:
            one = _response_set(row, source)
            if one.id in sets:
                raise DataError(f"{source.source}: two rows have the id {one.id}")
        except DataError:
            if not source.skip_bad:
                raise
            bad += 1
        else:
            sets[one.id] = one
    if not sets:
        raise DataError(f"{source.source}: holds no prompts with responses ({bad} rows cannot be read)")
    return LabelData(list(sets.values()), bad)


def _response_set(row: TableRow | DataError, source: LabelSource) -> ResponseSet:
    if isinstance(row, DataError):
        raise row
    sample = layouts.responses(row)
    return ResponseSet(
        id=sample.id,
        category=source.category or _category(row, source.category_column),
        prompt=sample.prompt,
        responses=(*sample.chosen, *sample.rejected),
        better=len(sample.chosen) if sample.rejected else 0,
        columns=dict(_carried(row.fields, source)),
    )


def _category(row: TableRow, column: str | None) -> str:
    if column is not None and column not in row.fields:
        raise row.problem(f"no column {column} (there: {', '.join(map(str, row.fields))})")
    category = row.fields.get(column or CATEGORY_COLUMN)
    if category is None or category == "":
        return GENERAL
    if not isinstance(category, str):
        raise row.problem(f"{column or CATEGORY_COLUMN} is {category!r}, not a category's name")
    return category


def _carried(fields: Mapping[str, Any], source: LabelSource) -> Iterator[tuple[str, Any]]:
    """The columns that the pairs carry; `given_` stands before a name that would have another meaning there."""
    for name, value in fields.items():
        is_category = name == CATEGORY_COLUMN and source.category is None and source.category_column is None
        if name not in _CONSUMED and not is_category:
            yield (f"given_{name}" if name in _TAKEN else name), value
