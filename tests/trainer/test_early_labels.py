"""Labels asked while sampling: the same file in the end, nothing asked twice, and no failure that stops sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from client.bulk import BulkOptions
from client.labels.records import Score
from tests.support.live import Live
from trainer.labels.early import EarlyLabels, early_file, take_early
from trainer.labels.labelers import JudgeOptions, LabelOptions
from trainer.labels.labeling import run_labelling
from trainer.policy.sampling import Sampled
from trainer.run.files import appending, read_records
from trainer.run.records import Instruction
from trainer.self_improve import main

INSTRUCTIONS = [Instruction(id=f"{n}", prompt=f"What is {n}?", category="chat") for n in range(4)]
SAMPLES = [
    Sampled(id=one.id, sample=k, response=f"answer {k} to {one.id}", tokens=3, finish="stop")
    for one in INSTRUCTIONS
    for k in range(2)
]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.labels.early._POLL_SECONDS", 0.01)


def options(url: str) -> LabelOptions:
    """The service at `url`."""
    return LabelOptions(judge=JudgeOptions(url, bulk=BulkOptions(patience=0.1), start_timeout=5))


def sampled(folder: Path, count: int) -> None:
    """Append samples to the file until it has so many."""
    file = folder / "samples.jsonl"
    known = len(read_records(file, Sampled)) if file.exists() else 0
    with appending(file) as append:
        for sample in SAMPLES[known:count]:
            append(sample)


def labels(early: Path) -> list[Score]:
    """What is labelled so far."""
    return read_records(early, Score) if early.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait at most a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_early_labels_end_in_the_same_file(loop_judge: Live, tmp_path: Path) -> None:
    """Of an instruction that lacks a sample nothing is labelled; the label stage asks for the rest alone."""
    early = early_file(tmp_path, {"samples": "these"})
    with EarlyLabels(options(loop_judge.url), INSTRUCTIONS, tmp_path, 2, early):
        for count, whole in ((3, 2), (6, 6)):
            sampled(tmp_path, count)
            wait_for(lambda whole=whole: len(labels(early)) == whole)  # type: ignore[misc]  # a default binds it now
    known = {score.key for score in labels(early)}
    sampled(tmp_path, 8)

    take_early(early, tmp_path / "scores.jsonl")
    run_labelling(options(loop_judge.url), INSTRUCTIONS, SAMPLES, tmp_path / "scores.jsonl")
    run_labelling(options(loop_judge.url), INSTRUCTIONS, SAMPLES, tmp_path / "plain.jsonl")

    assert known == {sample.key for sample in SAMPLES[:6]}
    assert not early.exists()
    assert (tmp_path / "scores.jsonl").read_bytes() == (tmp_path / "plain.jsonl").read_bytes()


def test_an_interruption_keeps_early_labels(loop_judge: Live, tmp_path: Path) -> None:
    """The next process labels only what is new."""
    early = early_file(tmp_path, {})
    sampled(tmp_path, 4)

    def interrupted() -> None:
        with EarlyLabels(options(loop_judge.url), INSTRUCTIONS, tmp_path, 2, early):
            wait_for(lambda: len(labels(early)) == 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    sampled(tmp_path, 8)
    with EarlyLabels(options(loop_judge.url), INSTRUCTIONS, tmp_path, 2, early):
        wait_for(lambda: len(labels(early)) == 8)

    assert [score.key for score in labels(early)] == [sample.key for sample in SAMPLES]


def test_labels_of_other_inputs_are_not_taken(tmp_path: Path) -> None:
    """They are removed."""
    other, own = (early_file(tmp_path, {"judge": judge}) for judge in ("a", "b"))
    other.write_text("")

    take_early(own, tmp_path / "scores.jsonl")

    assert list(tmp_path.iterdir()) == []


def test_labels_of_samples_that_are_gone_are_dropped(loop_judge: Live, tmp_path: Path) -> None:
    """What is sampled in their place may be another text."""
    early = early_file(tmp_path, {})
    early.write_text("")

    with EarlyLabels(options(loop_judge.url), INSTRUCTIONS, tmp_path, 2, early):
        gone = not early.exists()

    assert gone


def test_a_judge_that_is_away_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said, and left to the label stage."""
    sampled(tmp_path, 2)
    early = early_file(tmp_path, {})
    with EarlyLabels(options("http://127.0.0.1:1"), INSTRUCTIONS, tmp_path, 2, early) as running:
        running._thread.join()

    assert "no more labels while sampling" in capsys.readouterr().err
    assert not early.exists()


def test_the_loop_with_overlap_makes_the_same_files(loop_flags: list[str], tmp_path: Path) -> None:
    """Samples, scores and pairs are the same, byte for byte."""
    flags = [*loop_flags, "--held-out", "0", "--max-new-tokens", "4"]

    codes = [
        main(["--output", str(tmp_path / name), *flags, *more]) for name, more in (("a", []), ("b", ["--overlap"]))
    ]

    assert codes == [0, 0]
    for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl"):
        first, second = (tmp_path / run / "round-1" / name for run in "ab")
        assert first.read_bytes() == second.read_bytes()
