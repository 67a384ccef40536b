"""bench.checkable_instructions: labels by a program, and what a judge's are worth beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.checkable_instructions import main
from bench.support.jsonl import read_rows, write_rows

LOWERCASE = {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.checkable_instructions", *map(str, arguments)])
    assert main() == 0


def test_labels_of_a_program_and_what_a_judge_agrees_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge is right about the first prompt, wrong about the second; ties and failures decide nothing."""
    asked, labels = tmp_path / "asked.jsonl", tmp_path / "labels.jsonl"
    write_rows(asked, ({"id": str(n), "prompt": "Greet me.", "category": "general", **LOWERCASE} for n in range(3)))
    texts = ["good morning to you", "GOOD MORNING TO YOU", "good evening to you"]
    samples = [{"id": str(n), "sample": k, "response": text} for n in range(3) for k, text in enumerate(texts)]
    write_rows(tmp_path / "samples.jsonl", samples)
    log_odds = [2.0, 1.0, 1.5, 1.0, 2.0, None, 1.0, 1.0, None]
    write_rows(
        tmp_path / "scores.jsonl",
        (
            {"id": one["id"], "sample": one["sample"], "log_odds": value}
            for one, value in zip(samples, log_odds, strict=True)
        ),
    )

    run(monkeypatch, "label", "--asked", asked, "--samples", tmp_path / "samples.jsonl", "--out", labels)
    run(monkeypatch, "agree", "--asked", asked, "--scored", tmp_path)

    assert [row["scores"] for row in read_rows(labels)] == [[1.0, 0.0, 1.0]] * 3
    told = capsys.readouterr().out
    assert "of 3 comparisons that the program decides, the judge agrees in 66.7%" in told
    assert "followed by the program's best: 100.0%" in told
