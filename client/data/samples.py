"""A sample of preference data, and what is done to a list of samples: selecting, splitting, taking a digest."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256

from client.data.tables import DataError
from client.schema import Message


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with one or more answers known to be good (`chosen`) and one or more known to be worse (`rejected`).

    A prompt or answer may be empty: whoever judges the sample then counts it as a failure. Where nothing is known about
    the answers, all of them are in `chosen`.
    """

    id: str
    subset: str
    prompt: str | tuple[Message, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


def choose(
    samples: Sequence[Sample], subsets: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Sample]:
    """The samples of these subsets (names, or patterns with * and ?), at most `limit` of them, in their order.

    The limit is divided in proportion to the subsets' sizes (largest remainder), with at least one sample each where
    possible. Within a subset the choice depends on `seed` and the ids alone. Raises DataError.
    """
    kept = list(samples) if subsets is None else _of_subsets(samples, subsets)
    if limit is None or limit >= len(kept):
        return kept
    if limit < 1:
        raise DataError(f"a limit of {limit} leaves nothing to judge")
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in kept:
        groups[sample.subset].append(sample)
    seats = _share_out(limit, {subset: len(group) for subset, group in groups.items()})
    taken: set[str] = set()
    for subset, group in groups.items():
        group.sort(key=lambda sample: _hash(seed, sample.id))
        taken.update(sample.id for sample in group[: seats[subset]])
    return [sample for sample in kept if sample.id in taken]


def halves(samples: Sequence[Sample], seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Two halves that share no prompt, e.g. to fit on one and measure on the other; both in the order of `samples`.

    Samples that share a prompt stay together. The largest groups are assigned first, ties broken by SHA-256 of seed
    and prompt, each to the half with fewer samples of its subsets. So every subset is split as evenly as shared
    prompts allow, whatever the order of the samples.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[_hash(seed, _prompt_key(sample))].append(sample)
    surplus: Counter[str] = Counter()
    first: set[str] = set()
    for key, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        counts = Counter(sample.subset for sample in group)
        lead = sum(count * surplus[subset] for subset, count in counts.items())
        # The hash decides between even halves; otherwise one half would get the odd sample of every subset.
        if lead < 0 or (lead == 0 and int(key[-1], 16) % 2 == 0):
            first.add(key)
            surplus.update(counts)
        else:
            surplus.subtract(counts)
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        sides[_hash(seed, _prompt_key(sample)) not in first].append(sample)
    return sides


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256, in hex, of everything that is judged; the order of the samples does not matter."""
    contents = sorted(
        json.dumps([sample.id, sample.subset, _prompt_key(sample), sample.chosen, sample.rejected])
        for sample in samples
    )
    return sha256("\n".join(contents).encode()).hexdigest()


def _of_subsets(samples: Sequence[Sample], wanted: Sequence[str]) -> list[Sample]:
    known = list(dict.fromkeys(sample.subset for sample in samples))
    kept: set[str] = set()
    for name in wanted:
        matching = [subset for subset in known if subset == name or fnmatchcase(subset, name)]
        if not matching:
            raise DataError(f"no subset {name}; there are {', '.join(known)}")
        kept.update(matching)
    return [sample for sample in samples if sample.subset in kept]


def _share_out(limit: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide `limit`, which is less than the sum of `sizes`, in proportion to them."""
    total = sum(sizes.values())
    least = int(limit >= len(sizes))
    seats = {name: max(least, limit * size // total) for name, size in sizes.items()}

    def owed(name: str) -> int:
        """How far below its exact share a subset is, in units of `1 / total`."""
        return limit * sizes[name] - seats[name] * total

    while (spare := limit - sum(seats.values())) > 0:
        seats[max((name for name in sizes if seats[name] < sizes[name]), key=owed)] += 1
    for _ in range(-spare):
        seats[min((name for name in sizes if seats[name] > least), key=owed)] -= 1
    return seats


def _prompt_key(sample: Sample) -> str:
    """The prompt as one string, equal only for equal prompts."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    return json.dumps([[message.role, message.content] for message in sample.prompt])


def _hash(seed: int, text: str) -> str:
    return sha256(json.dumps([seed, text]).encode()).hexdigest()
