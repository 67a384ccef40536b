"""bench.checkable_instructions: labels by a program, and what a judge's are worth beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.checkable_instructions import main
from bench.support.jsonl import read_rows, write_rows
from trainer.tuning.judge.labels import read_labels

LOWERCASE = {"instruction_id_list": ["change_case:english_lowercase"], "kwargs": [{}]}
TEXTS = ["good morning to you", "GOOD MORNING TO YOU", "good evening to you"]
FINISH = ["stop", "stop", "length"]
LOG_ODDS = [2.0, 1.0, 1.5, 1.0, 2.0, None, 1.0, 1.0, None]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.checkable_instructions", *map(str, arguments)])
    assert main() == 0


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Three prompts, with three responses each and a judge's log-odds of them beside the file: it is right about the
    first prompt, wrong about the second, and says nothing about the third.
    """
    path = tmp_path / "asked.jsonl"
    write_rows(path, ({"id": str(n), "prompt": "Greet me.", "category": "general", **LOWERCASE} for n in range(3)))
    samples = [
        {"id": str(n), "sample": k, "response": text, "tokens": 4, "finish": finish}
        for n in range(3)
        for k, (text, finish) in enumerate(zip(TEXTS, FINISH, strict=True))
    ]
    write_rows(tmp_path / "samples.jsonl", samples)
    write_rows(tmp_path / "scores.jsonl", (_score(*one) for one in zip(samples, LOG_ODDS, strict=True)))
    return path


def _score(sample: dict[str, Any], log_odds: float | None) -> dict[str, Any]:
    key = {"id": sample["id"], "sample": sample["sample"]}
    if log_odds is None:
        return {**key, "error": {"code": "too_long", "message": "too long"}}
    return {**key, "log_odds": log_odds, "score": 0.5}


def test_labels_of_a_program_and_what_a_judge_agrees_with(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ties and failures decide nothing."""
    labels = tmp_path / "labels.jsonl"

    run(monkeypatch, "label", "--asked", asked, "--samples", tmp_path / "samples.jsonl", "--out", labels)
    run(monkeypatch, "agree", "--asked", asked, "--scored", tmp_path)

    assert [row["scores"] for row in read_rows(labels)] == [[1.0, 0.0, 1.0]] * 3
    told = capsys.readouterr().out
    assert "of 3 comparisons that the program decides, the judge agrees in 66.7%" in told
    assert "followed by the program's best: 100.0%" in told


def test_a_judge_is_tuned_on_some_prompts_and_used_on_the_others(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program's labels are of the first prompts, the judge's of the later ones; the others are all ties."""
    given, labels = tmp_path / "given.jsonl", tmp_path / "labels.jsonl"
    data = ["--asked", asked, "--samples", tmp_path / "samples.jsonl"]

    run(monkeypatch, "label", *data, "--first", 1, "--out", given)
    run(monkeypatch, "label", *data, "--after", 1, "--scores", tmp_path / "scores.jsonl", "--out", labels)
    run(monkeypatch, "agree", "--asked", asked, "--scored", tmp_path, "--after", 1)

    found, left_out = read_labels(str(given))
    assert [label.answers for label in found] == [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[1])]
    assert left_out == {"ties": 7}
    assert [row["scores"] for row in read_rows(labels)] == [[0.0, 0.0, 0.0], LOG_ODDS[3:6], LOG_ODDS[6:]]
    assert "of 1 comparisons that the program decides, the judge agrees in 0.0%" in capsys.readouterr().out


def test_what_the_pairs_of_each_option_are_worth(
    asked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One pair is right and one wrong; cut-off responses are chosen only if they are kept."""
    run(monkeypatch, "pairs", "--asked", asked, "--scored", tmp_path)

    told = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["by default"].startswith("2 pairs; of 2 that the program decides 50.0% are right (9.5 to 90.5)")
    assert told["by default"].endswith("chosen against rejected: +0.0 points of constraints, +0 characters")
    assert told["--cut-off drop"].startswith("2 pairs; of 2 ")
    assert told["client label --bottom 3"].startswith("3 pairs; of 2 ")
    assert told["--min-margin 1.00, the median"].startswith("2 pairs")
    assert told["--samples 2"] == told["by default"]
