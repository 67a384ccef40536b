"""Rows of a run made by hand, and runs written as a benchmark leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.benchmarks.compare import benchmark_named
from client.benchmarks.results.numbers import Summary
from client.benchmarks.results.records import ITEMS_FILE, SUMMARY_FILE, JudgedAnswer, Row, RowError, TiePolicy
from client.benchmarks.results.summary import summarise
from client.stats import sigmoid


def answer(log_odds: float, **told: Any) -> JudgedAnswer:
    """An answer of 10 characters with a label mass of 0.9, unless told otherwise."""
    return JudgedAnswer(**{"log_odds": log_odds, "score": sigmoid(log_odds), "label_mass": 0.9, "length": 10, **told})


def pair(name: str, chosen: float | JudgedAnswer, rejected: float | JudgedAnswer, **told: Any) -> Row:
    """A judged pair, from its answers or their log-odds; the subset is what stands before the slash of its id."""
    good = chosen if isinstance(chosen, JudgedAnswer) else answer(chosen)
    bad = rejected if isinstance(rejected, JudgedAnswer) else answer(rejected)
    judging = {"template": "general@1", "model": "m", "fingerprint": "f"}
    margins = [[good.log_odds - bad.log_odds]]
    return Row(
        **{"id": name, "subset": subset(name), "chosen": good, "rejected": bad, "margins": margins, **judging, **told}
    )


def failed(name: str, code: str = "context_length_exceeded") -> Row:
    """A sample without a verdict."""
    return Row(id=name, subset=subset(name), error=RowError(code=code, message="too long"))


def subset(name: str) -> str:
    """The part of an id before the slash."""
    return name.split("/")[0]


def pairs(name: str, right: int, wrong: int) -> list[Row]:
    """So many right and wrong pairs of one subset."""
    return [pair(f"{name}/{i}", *((1, 0) if i < right else (0, 1))) for i in range(right + wrong)]


def summary_of(benchmark: str, rows: Sequence[Row], ties: TiePolicy = "strict", **config: object) -> Summary:
    """The summary of these rows."""
    return summarise(benchmark_named(benchmark), rows, config=config, ties=ties)


def write_run(folder: Path, rows: Sequence[Row], benchmark: str = "pairs", digest: str = "d1") -> Path:
    """A finished run's folder."""
    folder.mkdir()
    (folder / ITEMS_FILE).write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    summary = summary_of(benchmark, rows, data_digest=digest)
    (folder / SUMMARY_FILE).write_text(summary.model_dump_json(), encoding="utf-8")
    return folder
