"""Benchmark rows made by hand, and run folders as a benchmark leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.benchmarks.compare import benchmark_named
from client.benchmarks.results.summarise import summarise
from client.benchmarks.results.summary import SUMMARY_FILE, Summary
from client.benchmarks.rows import ITEMS_FILE, JudgedAnswer, Row, TiePolicy
from client.runs.resumable import RecordedError
from client.stats import sigmoid


def answer(log_odds: float, **fields: Any) -> JudgedAnswer:
    """An answer of 10 characters with a label mass of 0.9, unless `fields` say otherwise."""
    return JudgedAnswer(**{"log_odds": log_odds, "score": sigmoid(log_odds), "label_mass": 0.9, "length": 10, **fields})


def pair(name: str, chosen: float | JudgedAnswer, rejected: float | JudgedAnswer, **fields: Any) -> Row:
    """A judged pair with the id `name`, from its answers or their log-odds."""
    good = chosen if isinstance(chosen, JudgedAnswer) else answer(chosen)
    bad = rejected if isinstance(rejected, JudgedAnswer) else answer(rejected)
    judging = {"template": "general@1", "model": "m", "fingerprint": "f"}
    margins = [[good.log_odds - bad.log_odds]]
    return Row(
        **{"id": name, "subset": subset(name), "chosen": good, "rejected": bad, "margins": margins, **judging, **fields}
    )


def failed(name: str, code: str = "context_length_exceeded") -> Row:
    """A sample that failed with this error code."""
    return Row(id=name, subset=subset(name), error=RecordedError(code=code, message="too long"))


def subset(name: str) -> str:
    """The subset of an id: the part before the slash."""
    return name.split("/")[0]


def pairs(name: str, right: int, wrong: int) -> list[Row]:
    """`right` rightly and `wrong` wrongly judged pairs of one subset."""
    return [pair(f"{name}/{i}", *((1, 0) if i < right else (0, 1))) for i in range(right + wrong)]


def summary_of(benchmark: str, rows: Sequence[Row], ties: TiePolicy = "strict", **config: object) -> Summary:
    """The summary of these rows by this benchmark."""
    return summarise(benchmark_named(benchmark), rows, config=config, ties=ties)


def write_run(folder: Path, rows: Sequence[Row], benchmark: str = "pairs", digest: str = "d1") -> Path:
    """Write the folder of a finished run."""
    folder.mkdir()
    (folder / ITEMS_FILE).write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    summary = summary_of(benchmark, rows, data_digest=digest)
    (folder / SUMMARY_FILE).write_text(summary.model_dump_json(), encoding="utf-8")
    return folder
