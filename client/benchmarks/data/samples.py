"""What is judged: reading samples from files, and taking a part of them.

Files are .jsonl, .json (a list of objects, or an object of columns), .csv or .parquet, in UTF-8; .gz after that is
fine. An empty prompt or answer is kept: the run counts it as a sample that could not be judged. Whatever else is wrong
raises SampleError, which names the file and the line or row.

    _tables.py    a file -> records        _layouts.py    a record -> a Sample        hub.py    a data set -> samples
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path

from client.benchmarks.data import layouts as _layouts
from client.benchmarks.data.hub import load_hub
from client.benchmarks.data.tables import SampleError, read_table
from client.benchmarks.results.records import Sample

__all__ = [
    "SampleError",
    "load_rewardbench",
    "load_rmbench",
    "load_pairs",
    "load_hub",
    "choose",
    "halves",
    "digest",
]


def load_rewardbench(path: Path) -> list[Sample]:
    """RewardBench pairs: columns `prompt`, `chosen`, `rejected`, `subset` and `id`. Raises SampleError."""
    return _layouts.collect(read_table(path), _layouts.rewardbench)


def load_rmbench(path: Path) -> list[Sample]:
    """RM-Bench samples: columns `prompt`, `chosen` (3), `rejected` (3), `domain` and `id`. Raises SampleError.

    The official files of one domain have no such column: theirs is in the name, `<domain>_filtered.json`.
    """
    records = read_table(path)
    domain, marked, _ = path.name.partition("_filtered.")
    if marked:
        records = [replace(record, fields={"domain": domain, **record.fields}) for record in records]
    return _layouts.collect(records, _layouts.rmbench)


def load_pairs(path: Path) -> list[Sample]:
    """Preference data: `chosen` and `rejected`, and where there, `prompt`, `subset` ("all") and `id` (the line).

    Both may be texts, lists of texts (best of N, RewardBench 2), or conversations that end with the answer, as in
    preference data for training. Raises SampleError.
    """
    return _layouts.collect(read_table(path), _layouts.pairs)


def choose(
    samples: Sequence[Sample], subsets: Sequence[str] | None = None, limit: int | None = None, seed: int = 0
) -> list[Sample]:
    """The samples of these subsets (names, or patterns with * and ?), at most `limit`, in the order of `samples`.

    The limit is shared out in proportion to the subsets' sizes by largest remainder, each having at least one where
    that is possible; who is taken within a subset depends on `seed` and the ids alone. Raises SampleError.
    """
    kept = list(samples) if subsets is None else _of_subsets(samples, subsets)
    if limit is None or limit >= len(kept):
        return kept
    if limit < 1:
        raise SampleError(f"a limit of {limit} leaves nothing to judge")
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
    """Two parts that share no prompt, e.g. to fit on one and measure on the other; both in the order of `samples`.

    Samples of one prompt go together, the large groups first, then by SHA-256 of seed and prompt, each to the part
    that has fewer of its subsets. So every subset is split in half as nearly as its shared prompts allow, and the
    order of the samples does not matter.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[_hash(seed, _prompt_key(sample))].append(sample)
    surplus: Counter[str] = Counter()
    first: set[str] = set()
    for key, group in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        counts = Counter(sample.subset for sample in group)
        lead = sum(count * surplus[subset] for subset, count in counts.items())
        # Where both parts are even, the hash decides, or a part would get all the odd ones out.
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
    """SHA-256, in hex, of everything that is judged, whatever its order."""
    contents = sorted(
        json.dumps([sample.id, sample.subset, _prompt_key(sample), sample.chosen, sample.rejected])
        for sample in samples
    )
    return sha256("\n".join(contents).encode()).hexdigest()


def _of_subsets(samples: Sequence[Sample], wanted: Sequence[str]) -> list[Sample]:
    there = list(dict.fromkeys(sample.subset for sample in samples))
    kept: set[str] = set()
    for name in wanted:
        found = [subset for subset in there if subset == name or fnmatchcase(subset, name)]
        if not found:
            raise SampleError(f"no subset {name}; there are {', '.join(there)}")
        kept.update(found)
    return [sample for sample in samples if sample.subset in kept]


def _share_out(limit: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """`limit` seats, fewer than the sum of `sizes`, in proportion to them."""
    total = sum(sizes.values())
    least = int(limit >= len(sizes))
    seats = {name: max(least, limit * size // total) for name, size in sizes.items()}

    def owed(name: str) -> int:
        """By how many `1 / total` of a seat it has less than its share."""
        return limit * sizes[name] - seats[name] * total

    while (spare := limit - sum(seats.values())) > 0:
        seats[max((name for name in sizes if seats[name] < sizes[name]), key=owed)] += 1
    for _ in range(-spare):
        seats[min((name for name in sizes if seats[name] > least), key=owed)] -= 1
    return seats


def _prompt_key(sample: Sample) -> str:
    """The prompt as one text, the same for the same prompt only."""
    if isinstance(sample.prompt, str):
        return sample.prompt
    return json.dumps([[message.role, message.content] for message in sample.prompt])


def _hash(seed: int, text: str) -> str:
    return sha256(json.dumps([seed, text]).encode()).hexdigest()
