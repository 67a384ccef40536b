"""--replay: pairs that nobody labelled, on which the judge is held to what it said before training.

Labels teach more than they say: among answers whose form they say nothing about, a judge of few labels begins to prefer
one form, whichever the labels happened to have. A squared error holds such pairs' difference of log-odds where the base
had it; pairs held out say how far it has moved nevertheless.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from client import stats
from trainer.errors import InputError
from trainer.tuning.judge.evidence import ReplayNumbers, share_of
from trainer.tuning.judge.labels import Label, LabelSplit, split_labels
from trainer.tuning.judge.prompts import Example
from trainer.tuning.judge.readings import Reading
from trainer.tuning.judge.unlabelled import read_undecided
from trainer.tuning.preferences import held_out_indices


def read_replay(source: str, category: str) -> tuple[list[Label], Counter[str]]:
    """The pairs in a file or hub data set, undecided, and counts of those left out. Raises DataError."""
    labels, left_out = read_undecided(source, category)
    pairs = [label for label in labels if label.is_pair]
    left_out["single answers"] += len(labels) - len(pairs)
    return pairs, +left_out


def split_replay(pairs: Sequence[Label], labels: Iterable[Label], share: float, seed: int) -> LabelSplit:
    """Hold out pairs by prompt, and those with a prompt of `labels`, which are held out.

    Raises InputError if nothing is left to train or to measure on.
    """
    apart = {label.prompt_key for label in labels}
    prompts = [pair.prompt_key for pair in pairs]
    held_out = held_out_indices(prompts, share, seed)
    held_out.update(index for index, prompt in enumerate(prompts) if prompt in apart)
    split = split_labels(pairs, held_out)
    if not split.train or not split.held_out:
        raise InputError(
            f"--replay: of {len(pairs)} pairs {len(split.train)} are to train on and {len(split.held_out)} held out. "
            "Give more pairs, or another --held-out"
        )
    return split


def held(examples: Iterable[Example], before: Iterable[Reading]) -> list[Example]:
    """The examples with what the base said of them."""
    margins = {reading.id: reading.margin for reading in before}
    return [replace(example, held_at=margins[example.label.id]) for example in examples]


def replay_numbers(before: Sequence[Reading], after: Sequence[Reading], trained: int) -> ReplayNumbers:
    """How far the judge moved on the pairs `after` is about; `before` may have more of them."""
    margins = {reading.id: reading.margin or 0.0 for reading in before}
    moves = [(margins[reading.id], reading.margin or 0.0) for reading in after]
    return ReplayNumbers(
        trained=trained,
        kept=share_of(sum(_side(one) == _side(two) for one, two in moves), len(moves)),
        moved=stats.mean([abs(two - one) for one, two in moves]),
        before=stats.mean([abs(one) for one, _ in moves]),
    )


def _side(margin: float) -> int:
    return (margin > 0) - (margin < 0)
