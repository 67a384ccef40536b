"""What DPO is trained on: pairs of this trainer, or anybody's preference data, from a file or the hub."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from client.benchmarks.data.samples import load_hub, load_pairs
from client.schema import Message
from client.texts import is_blank
from trainer.instructions.reading import HUB
from trainer.run.records import Record


class Preference(Record):
    """A prompt with a better and a worse answer, in TRL's conversational format; a line of pairs.jsonl is one."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]

    def turns(self, side: str) -> list[Message]:
        """The whole conversation with one of its answers: `chosen` or `rejected`."""
        answer: list[Message] = getattr(self, side)
        return [*self.prompt, *answer]


@dataclass(frozen=True, slots=True)
class Split:
    """Preferences to train on and others to evaluate on; no prompt is on both sides."""

    train: list[Preference]
    held_out: list[Preference]


def load_preferences(source: str) -> tuple[list[Preference], int]:
    """The preferences of a file (.jsonl, .json, .csv, .parquet) or of `hub:NAME[@SPLIT]`, and how many were unusable.

    Columns `chosen` and `rejected`, and where there `prompt`: texts, or conversations that end with the answer. Where
    a record has several answers of a side the first counts. Unusable are those with an empty prompt or answer, and
    those with two equal answers. Raises SampleError for a record that cannot be read.
    """
    if source.startswith(HUB):
        name, _, split = source.removeprefix(HUB).partition("@")
        samples = load_hub(name, split or None)
    else:
        samples = load_pairs(Path(source))
    found = []
    for sample in samples:
        chosen, rejected = sample.chosen[0], sample.rejected[0]
        asked = sample.prompt if isinstance(sample.prompt, str) else sample.prompt[-1].content
        if any(map(is_blank, (asked, chosen, rejected))) or chosen == rejected:
            continue
        prompt = [Message(role="user", content=sample.prompt)] if isinstance(sample.prompt, str) else [*sample.prompt]
        found.append(Preference(prompt=prompt, chosen=[_answer(chosen)], rejected=[_answer(rejected)]))
    return found, len(samples) - len(found)


def _answer(text: str) -> Message:
    return Message(role="assistant", content=text)


def split_preferences(preferences: Sequence[Preference], share: float, seed: int) -> Split:
    """`share` of the preferences held out, whole prompts at a time, chosen by a hash of the seed and the prompt.

    The order of what is left is that of the input.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, preference in enumerate(preferences):
        groups[json.dumps([message.model_dump() for message in preference.prompt])].append(index)
    wanted, held = share * len(preferences), set[int]()
    for prompt in sorted(groups, key=lambda prompt: sha256(f"{seed}\0{prompt}".encode()).digest()):
        if len(held) + len(groups[prompt]) / 2 > wanted:
            break
        held.update(groups[prompt])
    return Split(
        train=[preference for index, preference in enumerate(preferences) if index not in held],
        held_out=[preference for index, preference in enumerate(preferences) if index in held],
    )
