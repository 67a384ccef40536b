"""The benchmarks by name. A new benchmark is an entry here and its arithmetic in scoring/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from client.benchmarks.paper import PaperGroup
from client.benchmarks.scoring.benchmark import Benchmark
from client.benchmarks.scoring.best_of import Pairs
from client.benchmarks.scoring.rewardbench import RewardBench
from client.benchmarks.scoring.rmbench import RmBench
from client.data.samples import Sample
from client.data.sources import load_pairs, load_rewardbench, load_rmbench


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A benchmark and what its command needs: how files are read, its data set on the hub, its prompts in the paper."""

    benchmark: Benchmark
    description: str
    load: Callable[[Path], list[Sample]]
    hub_name: str | None = None
    paper_group: PaperGroup | None = None


BENCHMARKS: Final[dict[str, CatalogEntry]] = {
    "rewardbench": CatalogEntry(
        RewardBench(),
        "Evaluate a judge on RewardBench: the official sections and mean, and the paper's columns.",
        load_rewardbench,
        "allenai/reward-bench",
        "rewardbench",
    ),
    "rmbench": CatalogEntry(
        RmBench(),
        "Evaluate a judge on RM-Bench: easy, normal and hard in each domain.",
        load_rmbench,
        "THU-KEG/RM-Bench",
        "rmbench",
    ),
    "pairs": CatalogEntry(
        Pairs(),
        "Evaluate a judge on any file of {prompt, chosen, rejected, subset?}: JSONL, JSON, CSV or Parquet. Lists of "
        "rejected answers make it best-of-N, as in RewardBench 2 (--data hub:allenai/reward-bench-2).",
        load_pairs,
    ),
}
