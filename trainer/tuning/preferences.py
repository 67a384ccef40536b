"""Preference data for DPO: our own pairs.jsonl, or anybody's pairs, from a file or the hub."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from client.data import layouts
from client.data.samples import Sample
from client.data.sources import hub_source, source_rows
from client.schema import Message
from client.texts import is_blank
from trainer.run.records import Record


class Preference(Record):
    """A prompt with a better and a worse answer, in TRL's conversational format; a line of pairs.jsonl is one.

    An answer that was cut off is trained on without the end of its turn, which was never sampled.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    chosen_cut_off: bool = False
    rejected_cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Preferences to train on and others to evaluate on; no prompt is on both sides."""

    train: list[Preference]
    held_out: list[Preference]


def load_preferences(source: str) -> tuple[list[Preference], int]:
    """The preferences in a file (.jsonl, .json, .csv, .parquet) or `hub:NAME[@SPLIT]`, and how many were unusable.

    Columns are `chosen`, `rejected` and optionally `prompt`: texts, or conversations that end with the answer; and
    `chosen_cut_off` and `rejected_cut_off`, true for an answer that was cut off. If a record has several answers on a
    side, the first one counts. A record is unusable if its prompt or an answer is empty, or both answers are equal.
    Raises DataError for a record that cannot be read.
    """
    rows = source_rows(source)
    samples = layouts.collect(rows, layouts.pairs if hub_source(source) is None else layouts.of_hub(rows[0]))
    read = [_preference(sample, row.fields) for sample, row in zip(samples, rows, strict=True)]
    usable = [preference for preference in read if preference is not None]
    return usable, len(samples) - len(usable)


def _preference(sample: Sample, fields: Mapping[str, Any]) -> Preference | None:
    chosen, rejected = sample.chosen[0], sample.rejected[0]
    question = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1].content
    if any(map(is_blank, (question, chosen, rejected))) or chosen == rejected:
        return None
    prompt = [Message(role="user", content=question)] if isinstance(sample.prompt, str) else [*sample.prompt]
    return Preference(
        prompt=prompt,
        chosen=[_answer(chosen)],
        rejected=[_answer(rejected)],
        chosen_cut_off=_is_true(fields.get("chosen_cut_off")),
        rejected_cut_off=_is_true(fields.get("rejected_cut_off")),
    )


def _is_true(value: Any) -> bool:
    """Words count as well: CSV has nothing else."""
    return str(value).strip().lower() in ("true", "1", "1.0")


def _answer(text: str) -> Message:
    return Message(role="assistant", content=text)


def split_preferences(preferences: Sequence[Preference], share: float, seed: int) -> Split:
    """Hold out `share` of the preferences (see `held_out_indices`). Both sides keep the order of the input."""
    prompts = [json.dumps([message.model_dump() for message in preference.prompt]) for preference in preferences]
    held_out = held_out_indices(prompts, share, seed)
    return Split(
        train=[preference for index, preference in enumerate(preferences) if index not in held_out],
        held_out=[preference for index, preference in enumerate(preferences) if index in held_out],
    )


def held_out_indices(prompts: Sequence[str], share: float, seed: int) -> set[int]:
    """`share` of the indices, all of a prompt's together, chosen by a hash of the seed and the prompt."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[prompt].append(index)
    wanted, held_out = share * len(prompts), set[int]()
    for prompt in sorted(groups, key=lambda prompt: sha256(f"{seed}\0{prompt}".encode()).digest()):
        # A whole prompt would overshoot by more than stopping here falls short.
        if len(held_out) + len(groups[prompt]) / 2 > wanted:
            break
        held_out.update(groups[prompt])
    return held_out
