"""The loop as a user starts it, on a tiny model and with a service that has no model: whole, killed, continued."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

from bench.support.process import running_service
from client import Judge
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import FakeEngine
from tests.killed_loop import POINTS
from tests.support.live import Live, live_service
from trainer.__main__ import main as trainer_main
from trainer.run.files import read_records
from trainer.run.records import Instruction, Pair
from trainer.self_improve import main

ROOT = Path(__file__).parents[2]
SMALL = (
    "--count 12 --held-out 6 --samples 3 --max-new-tokens 8 --cut-off keep --device cpu --dtype float32 --patience 1"
)
TRAINING = "--batch 4 --lr 1e-3 --rank 4 --alpha 8"


@pytest.fixture(scope="module")
def judge() -> Iterator[Live]:
    """A service with the fake engine."""
    with live_service() as live:
        yield live


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty instructions of two categories."""
    file = tmp_path_factory.mktemp("source") / "instructions.jsonl"
    rows = [{"id": f"{n}", "prompt": f"What is {n}?", "category": ("chat", "math")[n % 2]} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def flags(tiny_model: Path, source: Path, judge: Live) -> list[str]:
    """A small run, but for its folder."""
    where = ["--model", str(tiny_model), "--instructions", str(source), "--judge-url", judge.url]
    return [*where, *SMALL.split(), *TRAINING.split()]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one round; tests copy it where they write."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["--output", str(folder), *flags]) == 0
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to go on with."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def json_of(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_bytes())


def on_the_bf16_grid(model: Path, folder: Path) -> Path:
    """A copy whose weights bfloat16 can hold, as those of published models."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def lines(path: Path) -> list[bytes]:
    """The lines of a file."""
    return path.read_bytes().splitlines()


def without(flags: list[str], name: str) -> list[str]:
    """The flags without this one and its value."""
    place = flags.index(name)
    return [*flags[:place], *flags[place + 2 :]]


def test_one_command_gives_a_model_and_the_evidence(whole: Path) -> None:
    """Instructions, samples, labels, pairs, an adapter, a merged model, numbers and a page are there."""
    part = whole / "round-1"
    metrics = json_of(part / "metrics.json")

    assert len(read_records(whole / "instructions.jsonl", Instruction)) == 12
    assert len(read_records(part / "pairs.jsonl", Pair)) == json_of(part / "pairs_stats.json")["pairs"] > 0
    assert (part / "adapter" / "adapter_model.safetensors").exists()
    assert metrics["instructions"] == 6
    assert metrics["pairwise"]["count"] == metrics["compared"]
    assert "Round 1" in (whole / "report.html").read_text()
    assert "metrics" in (part / "merged" / "README.md").read_text()


def test_held_out_instructions_are_not_trained_on(whole: Path) -> None:
    """No instruction is on both sides."""
    sides = [
        {one.id for one in read_records(whole / name, Instruction)} for name in ("instructions.jsonl", "held_out.jsonl")
    ]

    assert len(sides[1]) == 6
    assert not sides[0] & sides[1]


def test_what_rounding_takes_from_the_training_is_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In fp32 nothing is lost; of tiny steps bfloat16 loses most, and the run says so."""
    model = on_the_bf16_grid(Path(flags[flags.index("--model") + 1]), tmp_path / "model")
    command = [*flags, "--model", str(model), "--held-out", "0", "--lr", "1e-5"]
    for name, dtype in (("exact", "float32"), ("lossy", "bfloat16")):
        main(["--output", str(tmp_path / name), *command, "--merge-dtype", dtype])
    kept = [json_of(tmp_path / name / "round-1" / "merge.json")["kept_update"] for name in ("exact", "lossy")]

    assert kept[0] == pytest.approx(1, abs=1e-3)
    assert kept[1] < 0.5
    assert "raise --lr" in capsys.readouterr().err


def test_a_finished_run_is_left_alone(copied: Path, flags: list[str]) -> None:
    """Repeating the command writes nothing but what it would write the same."""
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}

    assert main(["--output", str(copied), *flags]) == 0
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


def test_a_run_killed_at_every_stage_ends_like_an_undisturbed_one(
    whole: Path, flags: list[str], tmp_path: Path
) -> None:
    """Killed at each boundary and in mid-stage, it goes on where it was; no finished stage is done again."""
    program = [sys.executable, "-m", "tests.killed_loop", str(tmp_path / "run"), *flags]
    done = subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )

    result = json.loads(done.stdout)
    ends = dict.fromkeys(POINTS, -9) | {"Ctrl-C while sampling": 130, "never": 0}
    assert result == {"ends": ends, "rewritten": []}
    for name in ("samples.jsonl", "scores.jsonl", "pairs.jsonl"):
        assert (tmp_path / "run" / "round-1" / name).read_bytes() == (whole / "round-1" / name).read_bytes()


class Mortal(FakeEngine):
    """Takes its service down with the third call, which it does not answer in time."""

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
    whole: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was labelled stays; with the judge back, the same command goes on and ends as if nothing had been."""
    command = ["--output", str(tmp_path / "run"), "--samples-from", str(whole), *without(flags, "--judge-url")]
    with live_service(Mortal(delay=0.05), max_batch_items=2) as live:
        Mortal.services.append(live)
        code = main(["--judge-url", live.url, *command])
    told, kept = capsys.readouterr().err, lines(tmp_path / "run" / "round-1" / "scores.jsonl")
    with live_service() as live:
        again = main(["--judge-url", live.url, *command])

    assert (code, again) == (1, 0)
    assert "gives no more answers" in told
    assert "the same command goes on from there" in told
    assert 0 < len(kept) < 36
    assert lines(tmp_path / "run" / "round-1" / "scores.jsonl") == lines(whole / "round-1" / "scores.jsonl")


def test_without_a_judge_nothing_is_begun(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The address and the reason are told before anything is sampled."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code = main(["--output", str(tmp_path / "run"), *without(flags, "--judge-url"), "--judge-url", url])

    assert code == 1
    assert f"the judge at {url} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_configuration_is_refused(copied: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What differs is named, and nothing is touched."""
    before = (copied / "config.json").read_bytes()
    code = main(["--output", str(copied), *flags, "--beta", "0.5"])

    assert code == 1
    assert "another configuration (other dpo.beta)" in capsys.readouterr().err
    assert (copied / "config.json").read_bytes() == before


def test_overwrite_makes_anew_what_the_change_touches(copied: Path, flags: list[str]) -> None:
    """Another beta trains again, on the pairs that are there."""
    pairs, model = copied / "round-1" / "pairs.jsonl", copied / "round-1" / "adapter" / "adapter_model.safetensors"
    before = pairs.stat().st_mtime_ns, model.read_bytes()
    code = main(["--output", str(copied), *flags, "--beta", "0.9", "--overwrite"])

    assert code == 0
    assert pairs.stat().st_mtime_ns == before[0]
    assert model.read_bytes() != before[1]


def test_a_second_round_begins_with_the_first_ones_model(copied: Path, flags: list[str]) -> None:
    """A finished run is given another round: it samples anew, and is compared with the first model of all."""
    first = (copied / "round-1" / "metrics.json").read_bytes()
    code = main(["--output", str(copied), *flags, "--rounds", "2"])

    sampled = [json_of(copied / part / "samples.done")["model"] for part in ("round-1", "round-2")]
    assert code == 0
    assert (copied / "round-1" / "metrics.json").read_bytes() == first
    assert sampled[0] != sampled[1]
    assert lines(copied / "round-1" / "samples.jsonl") != lines(copied / "round-2" / "samples.jsonl")
    assert json_of(copied / "round-2" / "dpo.json")["base"] == str(copied / "round-1" / "merged")
    assert json_of(copied / "round-2" / "metrics.json")["base"] == json_of(copied / "round-1" / "metrics.json")["base"]


def test_the_random_arm_differs_in_its_labels_alone(whole: Path, flags: list[str], tmp_path: Path) -> None:
    """The other run's instructions, samples and base answers are taken as they are."""
    run = tmp_path / "random"
    code = main(["--output", str(run), *flags, "--labeler", "random", "--samples-from", str(whole)])

    assert code == 0
    for name in ("instructions.jsonl", "held_out.jsonl", "base.jsonl", "round-1/samples.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert lines(run / "round-1" / "pairs.jsonl") != lines(whole / "round-1" / "pairs.jsonl")
    assert json_of(run / "round-1" / "metrics.json")["judge_is_labeler"] is False


def test_samples_of_other_settings_are_not_taken_over(
    whole: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Arms that would differ in more than their labels are refused."""
    more = ["--temperature", "0.9", "--samples-from", str(whole)]
    code = main(["--output", str(tmp_path / "run"), *flags, *more])

    assert code == 1
    assert "samples in" in (told := capsys.readouterr().err)
    assert "(other temperature)" in told


def test_without_pairs_the_run_stops_and_says_why(
    whole: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A margin that nothing reaches leaves nothing to train on."""
    more = ["--min-margin", "1000", "--samples-from", str(whole)]
    code = main(["--output", str(tmp_path / "run"), *flags, *more])

    assert code == 1
    assert "12 are below the minimum margin of 1000 log-odds" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_tells_and_does_nothing(
    flags: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes are upper bounds; times only where an earlier run has measured rates."""
    command = ["--output", str(tmp_path / "run"), *flags, "--rounds", "2", "--dry-run"]
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
    """The service loads the folder with its torch engine, and scores the pairs."""
    pairs = read_records(whole / "round-1" / "pairs.jsonl", Pair)[:2]
    with running_service("--model", str(whole / "round-1" / "merged")) as service, Judge(service.url) as judge:
        engine = judge.models().data[0].engine
        scores = [judge.score(pair.prompt[0].content, pair.chosen[0].content) for pair in pairs]

    assert engine == "torch"
    assert all(0 < score.score < 1 and score.label_mass > 0 for score in scores)


def test_the_judge_can_follow_the_policy(flags: list[str], tmp_path: Path) -> None:
    """Each round's labels come from a service of its own, started with the model that the round begins with."""
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom service.__main__ import main\n"
        f"with Path({str(tmp_path / 'served')!r}).open('a') as file: file.write(sys.argv[1] + chr(10))\n"
        "sys.exit(main(['--engine', 'fake', '--port', sys.argv[2]]))\n"
    )
    command = [*without(without(flags, "--judge-url"), "--held-out"), "--held-out", "0", "--rounds", "2"]
    run = tmp_path / "run"
    started = f"{sys.executable} {script} {{model}} {{port}}"
    code = main(["--output", str(run), *command, "--judge-follows-policy", "--judge-command", started])

    tiny = flags[flags.index("--model") + 1]
    assert code == 0
    # The first start is the rehearsal.
    assert (tmp_path / "served").read_text().splitlines() == [tiny, tiny, str(run / "round-1" / "merged")]


def test_a_judge_command_that_ends_is_told(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is sampled, with where to look."""
    started = f"{sys.executable} -c 'raise SystemExit(3)' {{model}} {{port}}"
    code = main(["--output", str(tmp_path / "run"), *flags, "--judge-follows-policy", "--judge-command", started])

    assert code == 1
    assert "ended with exit code 3" in capsys.readouterr().err
    assert not (tmp_path / "run" / "round-1" / "samples.jsonl").exists()


def test_sft_comes_before_the_first_round(flags: list[str], tmp_path: Path) -> None:
    """The policy is then what SFT made of the model."""
    data, run = tmp_path / "sft.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": f"Say {n}.", "response": f"{n}"}) + "\n" for n in range(4)))
    command = [*without(flags, "--held-out"), "--held-out", "0", "--sft", str(data), "--sft-epochs", "1"]
    code = main(["--output", str(run), *command])

    assert code == 0
    assert json_of(run / "sft" / "sft.json")["examples"] == 4
    assert json_of(run / "round-1" / "dpo.json")["base"] == str(run / "sft" / "merged")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--samples", "1"], "--samples is 2 or more"),
        (["--rounds", "0"], "--rounds is 1 or more"),
        (["--judge-command", "x"], "goes with --judge-follows-policy"),
        (["--judge-follows-policy", "--judge-command", "serve"], "must hold {model} and {port}"),
        (["--model", "nowhere"], "is no folder here and no hub id"),
        (["--batch", "6"], "change --batch or --micro-batch"),
        (["--lm-eval", "mmlu"], "pip install 'lm_eval"),
        (["--count", "1000"], "20 usable instructions, and 1006 are wanted"),
    ],
)
def test_what_makes_no_sense_is_usage(
    more: list[str], told: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and what to change."""
    code = main(["--output", str(tmp_path / "run"), *flags, *more])

    assert code == 2
    assert told in capsys.readouterr().err


def test_a_broken_instruction_line_is_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File and line, and the way to leave it out."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "Why?", "category": "chat"}\n{"prompt": " "}\n')
    code = main(["--output", str(tmp_path / "run"), *flags, "--instructions", str(broken)])

    assert code == 2
    assert "line 2: the prompt is empty (--skip-bad leaves such records out)" in capsys.readouterr().err


def test_short_names_lead_to_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m trainer self-improve --help` is the loop's help; an unknown name is usage."""
    with pytest.raises(SystemExit, match="0"):
        trainer_main(["self-improve", "--help"])

    assert "--judge-follows-policy" in capsys.readouterr().out
    assert trainer_main(["improve"]) == 2
