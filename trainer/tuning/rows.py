"""Conversations as rows for TRL; those that cannot be trained on are left out and counted, never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from client.chat import NO_THINKING
from client.schema import Message
from trainer.policy.tokenizers import chat_ids, renders_as_sampled, training_suffix, unfinished_ids
from trainer.run.progress import echo
from trainer.run.records import Record
from trainer.tuning.settings import is_main


class RowBuilder:
    """Turns records into rows. `too_long` and `unlike` count those left out: over `max_length` tokens, or rendered by
    the chat template differently from what the policy writes.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._suffix = training_suffix(tokenizer)
        self.too_long = self.unlike = 0

    @property
    def left_out(self) -> str:
        """How many were left out, and why."""
        return (
            f"{self.too_long} are longer than {self._max_length} tokens (--max-length), {self.unlike} are rendered by "
            "the chat template differently from what the policy writes (it adds or removes thoughts, or merges the "
            "beginning of the answer with the end of the prompt)"
        )

    def rows(self, what: str, records: Sequence[Record], sides: Sequence[str]) -> list[dict[str, Any]]:
        """The records whose `sides`, each a single answer to the record's `prompt`, can all be trained on."""
        rows, before = [], self.unlike
        for record in records:
            turns: dict[str, list[Message]] = {name: getattr(record, name) for name in ("prompt", *sides)}
            if any(self._is_too_long([*turns["prompt"], *turns[side]]) for side in sides):
                self.too_long += 1
            elif not all(renders_as_sampled(self._tokenizer, turns["prompt"], turns[side][-1]) for side in sides):
                self.unlike += 1
            else:
                rows.append(self._row(record, sides))
        if self.unlike > before and rows and is_main():
            echo(f"{self.unlike - before} of {len(records)} {what} are left out: {self.left_out}")
        return rows

    def _is_too_long(self, conversation: Sequence[Message]) -> bool:
        return len(chat_ids(self._tokenizer, conversation, add_generation_prompt=False)) > self._max_length

    def _row(self, record: Record, sides: Sequence[str]) -> dict[str, Any]:
        row = record.model_dump()
        for side in sides:
            row[side][-1]["content"] += "" if row.get(_cut_off(side)) else self._suffix
        return {**row, "chat_template_kwargs": dict(NO_THINKING)}

    def as_sampled(self, dataset: Any, sides: Sequence[str]) -> Any:
        """TRL's tokenized `dataset`, in which every side has what the template writes after an answer, without it for
        those that were cut off.
        """
        for side in sides:
            ids, cut_off = f"{side}_ids", _cut_off(side)
            if cut_off in dataset.column_names and any(dataset[cut_off]):
                sampled = [self._sampled_ids(row, side) if row[cut_off] else row[ids] for row in dataset]
                dataset = dataset.remove_columns(ids).add_column(ids, sampled)
        return dataset

    def _sampled_ids(self, row: dict[str, Any], side: str) -> list[int]:
        *prompt, answer = (Message.model_validate(turn) for turn in (*row["prompt"], *row[side]))
        return unfinished_ids(self._tokenizer, prompt, answer)[len(row["prompt_ids"]) :]


def _cut_off(side: str) -> str:
    """The column that says whether a side was cut off."""
    return f"{side}_cut_off"
