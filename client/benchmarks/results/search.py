"""What search.json holds: the candidate questions of each group, the one chosen, and how it does on held-out data."""

from __future__ import annotations

from typing import Final

from client.benchmarks.rows import FrozenModel

SEARCH_FILE: Final = "search.json"


class Accuracy(FrozenModel):
    """Share of judged pairs that are right, with its 95% Wilson interval; `failed` pairs are in no share."""

    accuracy: float | None
    low: float
    high: float
    judged: int
    failed: int


class CandidateResult(FrozenModel):
    """One question and how it did on the training half."""

    name: str
    question: dict[str, object]
    train: Accuracy


class GroupResult(FrozenModel):
    """What the search found for one group. `p` is McNemar's exact, chosen against baseline, on the held-out half."""

    group: str
    candidates: list[CandidateResult]
    chosen: str
    held_out: Accuracy
    baseline: CandidateResult
    baseline_held_out: Accuracy
    p: float


class SearchResult(FrozenModel):
    """search.json. `official` are the benchmark's own numbers on the held-out half, for chosen and baseline."""

    benchmark: str
    judge: str
    seed: int
    groups: list[GroupResult]
    official: dict[str, dict[str, float]]
