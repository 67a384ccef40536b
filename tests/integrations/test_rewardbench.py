"""RewardBench's own arithmetic over the files that `python -m client export` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.__main__ import main as client_main
from client.benchmarks.results.summary import Summary
from client.benchmarks.scoring.rewardbench import WEIGHTS
from tests.benchmarks.makers import best_of_four_file
from tests.support.live import live_service

NAME = "some-org/some-judge"


def all_subsets_file(folder: Path) -> Path:
    """A pair in three for each subset of RewardBench."""
    rows = [
        {"id": n, "subset": subset, "prompt": f"Question {n}?", "chosen": f"Good {n} {subset}", "rejected": f"Bad {n}"}
        for subset in WEIGHTS
        for n in range(3)
    ]
    file = folder / "all_subsets.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def exported(folder: Path, benchmark: str, data: Path, form: str, *flags: str) -> Summary:
    """The summary of a run in this folder, whose export is in its folder of the form's name."""
    with live_service() as live:
        run = ["--judge-url", live.url, "--data", str(data), "--out", str(folder), *flags]
        assert client_main([benchmark, *run]) == 0
    assert client_main(["export", str(folder), "--format", form, "--name", NAME]) == 0
    return Summary.load(folder / "summary.json")


@pytest.mark.integrations("rewardbench")
@pytest.mark.parametrize("mode", ["pointwise", "pairwise"])
def test_rewardbench_computes_our_sections(tmp_path: Path, run: Callable[..., Any], mode: str) -> None:
    """From the accuracies as its leaderboard reads them, which its rule gives again from the scores."""
    summary = exported(tmp_path / "run", "rewardbench", all_subsets_file(tmp_path), "rewardbench", "--mode", mode)

    computed = run("rewardbench_files.py", str(tmp_path / "run" / "rewardbench"), "1")

    accuracies = {name: subset.accuracy for name, subset in summary.subsets.items()}
    assert computed["leaderboard"] == pytest.approx(accuracies, abs=1e-9)
    assert computed["again"] == pytest.approx(accuracies, abs=1e-9)
    assert computed["sections"] == pytest.approx(summary.sections, abs=1e-9)
    assert 0 < sum(summary.sections.values()) < 4


@pytest.mark.integrations("rewardbench")
def test_rewardbench_2_computes_our_sections(tmp_path: Path, run: Callable[..., Any]) -> None:
    """From the scores of all texts, Ties by its own rule."""
    summary = exported(tmp_path / "run", "pairs", best_of_four_file(tmp_path), "rewardbench-2")

    computed = run("rewardbench_files.py", str(tmp_path / "run" / "rewardbench-2"), "2")

    assert computed["leaderboard"] == pytest.approx(summary.sections, abs=1e-9)
    assert computed["again"] == pytest.approx(summary.sections, abs=1e-9)
    assert 0 < sum(summary.sections.values()) < 6
