"""The loop as a user runs it, on a tiny model and a service without one: whole, killed, resumed, extended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench.support.process import running_service
from client import Judge
from client.labels.records import Pair
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from tests.killed_loop import POINTS
from tests.support.live import Live, live_service
from trainer.run.files import read_records
from trainer.run.records import Instruction
from trainer.self_improve import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(loop_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one round; tests that write work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["--output", str(folder), *loop_flags]) == 0
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to continue."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def json_of(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_bytes())


def lines(path: Path) -> list[bytes]:
    """The lines of a file."""
    return path.read_bytes().splitlines()


def test_one_command_gives_a_model_and_the_evidence(whole: Path) -> None:
    """Instructions, samples, labels, pairs, an adapter, a merged model, metrics and a report."""
    part = whole / "round-1"
    metrics = json_of(part / "metrics.json")

    assert len(read_records(whole / "instructions.jsonl", Instruction)) == 12
    assert len(read_records(part / "pairs.jsonl", Pair)) == json_of(part / "pairs_stats.json")["pairs"] > 0
    assert (part / "adapter" / "adapter_model.safetensors").exists()
    assert metrics["instructions"] == 6
    assert metrics["pairwise"]["count"] == metrics["compared"]
    assert "Round 1" in (whole / "report.html").read_text()
    assert "metrics" in (part / "merged" / "README.md").read_text()


def test_tasks_can_be_added_to_a_finished_run(copied: Path, loop_flags: list[str], tmp_path: Path) -> None:
    """Only the tasks are done: base and new model answer them, and metrics and report have the numbers."""
    rows = [{"input": f"Is {n} even?", "target": "yes"} for n in range(3)]
    (tmp_path / "bbh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (copied / "round-1" / "pairwise" / "items.jsonl").stat().st_mtime_ns
    tasks = ["--tasks", "bbh", "--bbh", str(tmp_path / "bbh.jsonl"), "--task-max-new-tokens", "4"]

    code = main(["--output", str(copied), *loop_flags, *tasks])

    found = json_of(copied / "round-1" / "metrics.json")["tasks"]
    assert code == 0
    assert [found["scores"]["bbh"][arm]["answered"] for arm in ("base", "new")] == [3, 3]
    assert (copied / "tasks/bbh/base.answers.jsonl").exists()
    assert (copied / "round-1/tasks/bbh/new.items.jsonl").exists()
    assert "Tasks that a program checks" in (copied / "report.html").read_text("utf-8")
    assert (copied / "round-1" / "pairwise" / "items.jsonl").stat().st_mtime_ns == before


def test_held_out_instructions_are_not_trained_on(whole: Path) -> None:
    """No instruction is on both sides."""
    sides = [
        {one.id for one in read_records(whole / name, Instruction)} for name in ("instructions.jsonl", "held_out.jsonl")
    ]

    assert len(sides[1]) == 6
    assert not sides[0] & sides[1]


def test_a_finished_run_is_left_alone(copied: Path, loop_flags: list[str]) -> None:
    """Repeating the command changes no file."""
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}

    assert main(["--output", str(copied), *loop_flags]) == 0
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


def test_a_run_killed_at_every_stage_ends_like_an_undisturbed_one(
    whole: Path, loop_flags: list[str], tmp_path: Path
) -> None:
    """Killed at each boundary and in mid-stage, it resumes; no finished stage is done again."""
    program = [sys.executable, "-m", "tests.killed_loop", str(tmp_path / "run"), *loop_flags]
    done = subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    result = json.loads(done.stdout)
    ends = dict.fromkeys(POINTS, -9) | {"Ctrl-C while sampling": 130, "never": 0}
    assert result == {"ends": ends, "rewritten": []}
    for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl"):
        assert (tmp_path / "run" / "round-1" / name).read_bytes() == (whole / "round-1" / name).read_bytes()


class Mortal(FakeEngine):
    """Takes its service down with its third call, before it answers."""

    services: ClassVar[list[Live]] = []
    calls: ClassVar[list[int]] = []

    def run(self, items: Sequence[ScoreItem]) -> list[LabelLogprobs]:
        """See FakeEngine."""
        self.calls.append(len(items))
        for live in self.services[: len(self.calls) // 3]:
            live.server.should_exit = live.server.force_exit = True
            time.sleep(1)
        return super().run(items)


def test_a_judge_that_dies_stops_the_run_resumably(
    whole: Path, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was labelled stays; with the judge back, the same command resumes and ends as if nothing had happened."""
    command = ["--output", str(tmp_path / "run"), *loop_flags, "--samples-from", str(whole)]
    with live_service(Mortal(delay=0.05), max_batch_items=2) as live:
        Mortal.services.append(live)
        code = main([*command, "--judge-url", live.url])
    message, kept = capsys.readouterr().err, lines(tmp_path / "run" / "round-1" / "scores.jsonl")
    with live_service() as live:
        again = main([*command, "--judge-url", live.url])

    assert (code, again) == (1, 0)
    assert "gives no more answers" in message
    assert "the same command goes on from there" in message
    assert 0 < len(kept) < 36
    assert lines(tmp_path / "run" / "round-1" / "scores.jsonl") == lines(whole / "round-1" / "scores.jsonl")


def test_another_configuration_is_refused(
    copied: Path, loop_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names what differs, and nothing is touched."""
    before = (copied / "config.json").read_bytes()
    code = main(["--output", str(copied), *loop_flags, "--beta", "0.5"])

    assert code == 1
    assert "another configuration (other dpo.beta)" in capsys.readouterr().err
    assert (copied / "config.json").read_bytes() == before


def test_overwrite_redoes_what_the_change_touches(copied: Path, loop_flags: list[str]) -> None:
    """Another beta trains again, on the same pairs."""
    pairs, model = copied / "round-1" / "pairs.jsonl", copied / "round-1" / "adapter" / "adapter_model.safetensors"
    before = pairs.stat().st_mtime_ns, model.read_bytes()
    code = main(["--output", str(copied), *loop_flags, "--beta", "0.9", "--overwrite"])

    assert code == 0
    assert pairs.stat().st_mtime_ns == before[0]
    assert model.read_bytes() != before[1]


def test_a_second_round_begins_with_the_model_of_the_first(copied: Path, loop_flags: list[str]) -> None:
    """A finished run gets another round: it samples anew, and is compared with the very first model."""
    first = (copied / "round-1" / "metrics.json").read_bytes()
    code = main(["--output", str(copied), *loop_flags, "--rounds", "2"])

    sampled = [json_of(copied / part / "samples.done")["model"] for part in ("round-1", "round-2")]
    assert code == 0
    assert (copied / "round-1" / "metrics.json").read_bytes() == first
    assert sampled[0] != sampled[1]
    assert lines(copied / "round-1" / "samples.jsonl") != lines(copied / "round-2" / "samples.jsonl")
    assert json_of(copied / "round-2" / "dpo.json")["base"] == str(copied / "round-1" / "merged")
    assert json_of(copied / "round-2" / "metrics.json")["base"] == json_of(copied / "round-1" / "metrics.json")["base"]


def test_the_random_arm_differs_only_in_its_labels(whole: Path, loop_flags: list[str], tmp_path: Path) -> None:
    """The other run's instructions, samples and base answers are taken over unchanged."""
    run = tmp_path / "random"
    code = main(["--output", str(run), *loop_flags, "--labeler", "random", "--samples-from", str(whole)])

    assert code == 0
    for name in ("instructions.jsonl", "held_out.jsonl", "base.jsonl", "round-1/samples.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert lines(run / "round-1" / "pairs.jsonl") != lines(whole / "round-1" / "pairs.jsonl")
    assert json_of(run / "round-1" / "metrics.json")["judge_is_labeler"] is False


def test_samples_of_other_settings_are_not_taken_over(
    whole: Path, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arms that would differ in more than their labels are refused."""
    more = ["--temperature", "0.9", "--samples-from", str(whole)]
    code = main(["--output", str(tmp_path / "run"), *loop_flags, *more])

    assert code == 1
    message = capsys.readouterr().err
    assert "samples in" in message
    assert "(other temperature)" in message


def test_without_pairs_the_run_stops_and_says_why(
    whole: Path, loop_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A margin that no pair reaches leaves nothing to train on."""
    more = ["--min-margin", "1000", "--samples-from", str(whole)]
    code = main(["--output", str(tmp_path / "run"), *loop_flags, *more])

    assert code == 1
    assert "12 are below the minimum margin of 1000 log-odds" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_only_prints_the_plan(
    loop_flags: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are upper bounds; times are given only if an earlier run has measured rates."""
    command = ["--output", str(tmp_path / "run"), *loop_flags, "--rounds", "2", "--dry-run"]
    codes = [main(command), main([*command, "--rates-from", str(whole)])]

    unknown, known = capsys.readouterr().out.split("policy ")[1:]
    assert codes == [0, 0]
    assert "12 to train on, 6 held out" in unknown
    assert "at most 3 steps a round" in unknown
    assert f"{2 * 12 * 3 * 8} tokens" in " ".join(unknown.split())
    assert "no earlier run here has measured rates" in unknown
    assert "together" in known
    assert not (tmp_path / "run").exists()


def test_the_merged_model_can_be_served_and_judges(whole: Path) -> None:
    """The service loads the folder with its torch engine and scores pairs."""
    pairs = read_records(whole / "round-1" / "pairs.jsonl", Pair)[:2]
    with running_service("--model", str(whole / "round-1" / "merged")) as service, Judge(service.url) as judge:
        engine = judge.models().data[0].engine
        scores = [judge.score(pair.prompt[0].content, pair.chosen[0].content) for pair in pairs]

    assert engine == "torch"
    assert all(0 < score.score < 1 and score.label_mass > 0 for score in scores)
