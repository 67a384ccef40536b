"""The benchmarks as a user starts them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.support.process import free_port
from client.__main__ import COMMANDS
from client.__main__ import main as client_main
from client.benchmarks import pairs, rewardbench, rmbench
from client.benchmarks.command import REPORT_FILE
from client.benchmarks.results.summary import SUMMARY_FILE
from client.benchmarks.rows import ITEMS_FILE
from client.runs.folders import CONFIG_FILE
from tests.benchmarks.makers import pairs_file
from tests.support.live import live_service, wait_for


def summary_of(folder: Path) -> dict[str, Any]:
    """What a run wrote."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    return summary


def test_a_run_leaves_items_numbers_and_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command gives every judgement, the official sections, and a table."""
    out = tmp_path / "run"
    with live_service() as live:
        code = rewardbench.main(["--judge-url", live.url, "--data", str(pairs_file(tmp_path)), "--out", str(out)])

    assert code == 0
    assert sorted(file.name for file in out.iterdir()) == sorted([CONFIG_FILE, ITEMS_FILE, REPORT_FILE, SUMMARY_FILE])
    assert list(summary_of(out)["sections"]) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert "Chat Hard" in capsys.readouterr().out


def test_a_rerun_finds_its_folder_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out, the same command goes on in the same folder, and other options get another one."""
    monkeypatch.chdir(tmp_path)
    with live_service() as live:
        command = ["--judge-url", live.url, "--data", str(pairs_file(tmp_path))]
        codes = [rewardbench.main([*command, *more]) for more in ([], [], ["--mode", "pairwise"])]

    assert codes == [0, 0, 0]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_two_ways_of_grading_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grades read off probabilities are not taken for written ones by a rerun of the same command."""
    monkeypatch.chdir(tmp_path)
    file = str(pairs_file(tmp_path))
    for way in ("expectation", "parsed"):
        with live_service(judge="self-reward", self_reward_mode=way) as live:
            assert rewardbench.main(["--judge-url", live.url, "--data", file]) == 0

    written = [summary_of(folder)["cost"]["completion_tokens"] > 0 for folder in (tmp_path / "runs").iterdir()]
    assert sorted(written) == [False, True]


def test_rm_bench_gives_its_matrix(tmp_path: Path) -> None:
    """Three answers a side become a 3 x 3 table for each domain."""
    file = tmp_path / "rm.json"
    answers = {side: [f"{side} {n}" for n in range(3)] for side in ("chosen", "rejected")}
    file.write_text(json.dumps([{"id": 1, "prompt": "Why?", "domain": "chat", **answers}]))
    with live_service() as live:
        code = rmbench.main(["--judge-url", live.url, "--data", str(file), "--out", str(tmp_path / "run")])

    assert code == 0
    assert [len(row) for row in summary_of(tmp_path / "run")["matrices"]["chat"]] == [3, 3, 3]


def test_best_of_n_files_are_pairs_with_more_answers(tmp_path: Path) -> None:
    """A file with several rejected answers needs no other command."""
    file = tmp_path / "best.jsonl"
    file.write_text(
        json.dumps({"prompt": "Why?", "chosen": ["a"], "rejected": ["b", "c", "d"], "subset": "Math"}) + "\n"
    )
    with live_service() as live:
        code = pairs.main(["--judge-url", live.url, "--data", str(file), "--out", str(tmp_path / "run")])

    assert code == 0
    assert summary_of(tmp_path / "run")["counts"]["judged"] == 1


def test_an_unreachable_judge_is_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, with the URL and the reason."""
    url = f"http://127.0.0.1:{free_port()}"

    code = rewardbench.main(["--judge-url", url, "--data", str(pairs_file(tmp_path)), "--out", str(tmp_path / "run")])

    assert code == 1
    assert f"no answer from {url}" in capsys.readouterr().err


def test_bad_data_is_named_before_anything_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, with file and line, without contacting a judge."""
    file = pairs_file(tmp_path)
    file.write_text(file.read_text() + '{"prompt": \n')

    code = rewardbench.main(["--judge-url", "http://127.0.0.1:1", "--data", str(file)])

    assert code == 2
    assert "line 21" in capsys.readouterr().err


def test_too_many_failures_are_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One empty response in 20 is over 2%, on a rerun too; with a higher limit it is counted and the run succeeds."""
    file = pairs_file(tmp_path, rejected="")
    with live_service() as live:
        command = ["--judge-url", live.url, "--data", str(file), "--out", str(tmp_path / "run")]
        strict, again = rewardbench.main(command), rewardbench.main(command)
        lax = rewardbench.main([*command, "--max-failures", "0.1"])

    assert (strict, again, lax) == (1, 1, 0)
    assert "empty_response" in capsys.readouterr().err
    assert summary_of(tmp_path / "run")["counts"]["failures"] == {"empty_response": 1}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--subsets", "nope"], "nope"),
        (["--concurrency", "0"], "--concurrency"),
        (["--paper", "absent.json"], "absent.json"),
        (["--map", "absent.json"], "absent.json"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_usage_that_cannot_work_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str
) -> None:
    """The message names the flag or the file."""
    with live_service() as live:
        code = rewardbench.main(["--judge-url", live.url, "--data", str(pairs_file(tmp_path)), *flags])

    assert code == 2
    assert problem in capsys.readouterr().err


def test_the_short_names_lead_to_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m client` lists its commands, and each explains itself."""
    assert client_main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help ends with code 0 and names flags."""
    with pytest.raises(SystemExit) as ended:
        client_main([name, "--help"])

    assert ended.value.code == 0
    assert "--" in capsys.readouterr().out


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """With exit code 2; a line names the command that was probably meant."""
    assert client_main(["rewardbnch"]) == 2
    assert "there is no command rewardbnch; did you mean rewardbench?" in capsys.readouterr().err


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m …`, killed at the end if it still runs."""
    running = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def lines(folder: Path) -> int:
    """Rows that a run has written so far."""
    file = folder / ITEMS_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def has_written(folder: Path, count: int) -> Callable[[], bool]:
    """A check whether the run has written `count` rows."""
    return lambda: lines(folder) >= count


def test_kills_on_both_sides_change_nothing(tmp_path: Path) -> None:
    """The service killed and started again, then the client: the numbers are those of an undisturbed run."""
    port = free_port()
    data, out = pairs_file(tmp_path, 300), tmp_path / "disturbed"
    slow = ("--engine", "fake", "--fake-delay", "0.1", "--batch-jobs", "8", "--cache-entries", "0")
    service = ("service", "--port", f"{port}", *slow)
    judge = ["--judge-url", f"http://127.0.0.1:{port}", "--data", str(data), "--batch-items", "8"]
    client = ("client.benchmarks.rewardbench", *judge, "--out", str(out))

    with process(*service) as first:
        assert wait_for(lambda: serves(port), 60)
        with process(*client) as interrupted:
            assert wait_for(has_written(out, 40), 60)
            first.kill()
            first.wait()
            with process(*service):
                assert wait_for(has_written(out, 120), 60)
                interrupted.send_signal(signal.SIGKILL)
                interrupted.wait()
                stopped_at = lines(out)
                assert subprocess.run([sys.executable, "-m", *client], check=False).returncode == 0
                assert rewardbench.main([*judge, "--out", str(tmp_path / "undisturbed")]) == 0

    assert stopped_at < 300
    assert lines(out) == 300
    assert {**summary_of(out), "cost": None} == {**summary_of(tmp_path / "undisturbed"), "cost": None}


def serves(port: int) -> bool:
    """Whether a service on that port can judge."""
    from client import Judge, JudgeError

    with Judge(f"http://127.0.0.1:{port}") as judge:
        try:
            judge.ready()
        except JudgeError:
            return False
    return True


@pytest.mark.parametrize(
    ("judge", "mode", "template"),
    [
        ("self-reward", "pointwise", "self-reward@1"),
        ("reward-model", "pointwise", "reward-model@1"),
        ("pairwise", "pairwise", "pairwise-chat@1"),
    ],
)
def test_every_judge_can_be_benchmarked_without_a_flag(tmp_path: Path, judge: str, mode: str, template: str) -> None:
    """The same command asks each kind of judge in that judge's own way."""
    out = tmp_path / "run"
    with live_service(judge=judge) as live:
        code = rewardbench.main(["--judge-url", live.url, "--data", str(pairs_file(tmp_path)), "--out", str(out)])

    rows = [json.loads(line) for line in (out / ITEMS_FILE).read_text().splitlines()]
    assert code == 0
    assert summary_of(out)["config"]["mode"] == mode
    assert template in {row["template"] for row in rows}
    assert summary_of(out)["counts"]["judged"] == 20


@pytest.mark.parametrize(
    ("judge", "flags", "said"),
    [
        ("reward-model", ["--category", "math"], "takes no question: leave --category out"),
        ("reward-model", ["--mode", "pairwise"], "judges pointwise: leave --mode out"),
        ("pairwise", ["--mode", "pointwise"], "judges pairwise: leave --mode out"),
    ],
)
def test_flags_a_judge_cannot_follow_are_refused_before_it_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, flags: list[str], said: str
) -> None:
    """Exit code 2, and no item is judged."""
    with live_service(judge=judge) as live:
        command = ["--judge-url", live.url, "--data", str(pairs_file(tmp_path)), *flags]
        code = rewardbench.main(command)
        asked = live.value("judge_judgements_total")

    assert (code, asked) == (2, 0)
    assert said in capsys.readouterr().err
