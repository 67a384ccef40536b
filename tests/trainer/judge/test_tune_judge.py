"""The program: from a file of labels to a served judge and the evidence; interrupted anywhere, the same in the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from client import calibration
from service.engine.torch.engine import TorchEngine
from service.models.resolve import fingerprint
from service.process.child import ChildError, in_child
from tests.support.html import assert_self_contained
from tests.support.live import live_service
from tests.support.tiny import tiny_tokenizer
from tests.support.training import files_no_longer_than
from tests.trainer.judge.makers import flags, read, refused, same_adapter, toy_labels
from trainer import judge_stages
from trainer.tune_judge import main
from trainer.tuning.judge.prompts import JudgePrompts


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a learning curve."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    assert main(flags(tiny_model, pairs, output, "--curve", "4", "--epochs", "6")) == 0
    return output


def test_the_evidence_says_what_training_changed(tuned: Path) -> None:
    """Before, the judge is mostly wrong; after, it is right on prompts that it has not seen, and the test says so."""
    evidence = read(tuned / "evidence.json")
    before, after, change = evidence["before"], evidence["after"], evidence["change"]

    assert after["accuracy"]["value"] > 0.9 > 0.5 > before["accuracy"]["value"]
    assert after["accuracy"]["count"] == after["pairs"]["count"] == 60
    assert after["answers"]["count"] == 120
    assert change["value"] == pytest.approx(after["accuracy"]["value"] - before["accuracy"]["value"])
    assert change["p"] < 0.001
    assert change["better"] > change["worse"]
    assert set(after["by_category"]) == {"math"}
    assert after["mass"] > before["mass"]
    assert after["calibrated"]["pairs"]["count"] == after["calibrated"]["by_category"]["math"]["count"] == 60
    assert set(read(tuned / "curve.json")) == {"4"}


def test_the_served_judge_gives_the_trainers_numbers(tuned: Path) -> None:
    """A service with the merged model says of the labels what after.jsonl says, by each route; and it is calibrated."""
    merged = tuned / "merged"
    rows = [json.loads(line) for line in (tuned / "after.jsonl").read_text().splitlines()]
    labels = {row["id"]: row for row in map(json.loads, (tuned / "held_out.jsonl").read_text().splitlines())}
    engine = TorchEngine.load(merged, dtype="float32", device="cpu")
    with live_service(engine, model=str(merged), calibration_file=[tuned / "calibration.json"]) as live:
        asked = [(labels[row["id"]], row) for row in rows[:3]]
        bodies = [{"prompt": a["prompt"], "response": a["answers"][0], "category": "math"} for a, _ in asked]
        served = [live.http.post("/score", json=body).json() for body in bodies]
        both = {"prompt": asked[0][0]["prompt"], "responses": asked[0][0]["answers"], "category": "math"}
        compared = live.http.post("/compare", json=both).json()
        question = {"type": "predicate", "instructions": "Is it about foxes?"}
        decided = live.http.post("/v1/decisions", json={"input": "fox 1 dog", "questions": [question]}).json()
        predicate = {"prompt": "fox 1 dog", "response": "Is it about foxes?", "template": "predicate"}
        scored = live.http.post("/score", json=predicate).json()

    assert [one["log_odds"] for one in served] == pytest.approx([row["log_odds"][0] for _, row in asked], abs=1e-4)
    assert [one["log_odds"] for one in compared["scores"]] == pytest.approx(asked[0][1]["log_odds"], abs=1e-4)
    assert decided["answers"][0]["x_log_odds"] == scored["log_odds"]
    assert all(one["calibrated"] is not None for one in served)
    assert calibration.load(tuned / "calibration.json").fingerprint == fingerprint(merged)


def test_full_training_ends_in_a_merged_model_too(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """--method full leaves model/ in place of adapter/, and merged/ is the same to serve."""
    output = tmp_path / "run"

    assert main(flags(tiny_model, pairs, output, "--method", "full", "--lr", "1e-3", "--epochs", "6")) == 0

    evidence = read(output / "evidence.json")
    assert evidence["after"]["accuracy"]["value"] > 0.9
    assert (output / "model" / "model.safetensors").exists()
    assert not (output / "adapter").exists()
    assert read(output / "merge.json")["changed"]


def test_a_base_without_a_chat_template_stays_without_one(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """Its judge is asked in the raw format before training and after, and so is the merged model when it is served."""
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model, base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)

    assert main(flags(base, pairs, output)) == 0

    prompts = [JudgePrompts(folder, "pointwise", None, [], 2048) for folder in (base, output / "merged")]
    (before, _), (after, _) = (builder.examples(toy_labels(2)) for builder in prompts)
    assert after == before
    assert before[0].template.format == "raw"


def test_the_report_and_the_card_show_it(tuned: Path) -> None:
    """report.html has the numbers and figures; the model card names the base and the run."""
    page = (tuned / "report.html").read_text()
    card = (tuned / "merged" / "README.md").read_text()

    assert_self_contained(page)
    assert "Judged right, %" in page
    assert "pairs, calibrated" in page
    assert page.count("<svg") == 3
    assert "held-out labels" in card
    assert "- judge" in card
    assert "trl" not in card


def test_a_rerun_does_nothing_and_says_so(
    tiny_model: Path, pairs: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command on a finished run leaves every file as it is."""
    before = {path: path.stat().st_mtime_ns for path in tuned.rglob("*") if path.is_file() and path.name != ".lock"}

    assert main(flags(tiny_model, pairs, tuned, "--curve", "4", "--epochs", "6")) == 0

    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed <= {"curve.json", "evidence.json", "calibration.json", "README.md"}
    assert "accuracy on 60 labels held out" in capsys.readouterr().err


STAGES = ["write_records", "read_held_out", "train_judge", "merge_and_measure", "compare_readings", "write_calibration"]
# In the order in which a run calls them first.
WRITING = [
    "write_records",
    "write_json",
    "read_held_out",
    "train_judge",
    "merge_and_measure",
    "write_record",
    "write_calibration",
    "write_whole",
]
RESULTS = ("after.jsonl", "evidence.json", "labels.json", "calibration.json")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(flags(tiny_model, pairs, output)) == 0
    return output


def assert_same_results(run: Path, other: Path) -> None:
    """The adapters are equal to the last bit, and so are the numbers."""
    assert same_adapter(run, other)
    for file in RESULTS:
        assert (run / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize("name", STAGES)
def test_interrupted_at_any_stage_the_result_is_the_same(
    tiny_model: Path, pairs: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Ctrl-C after a stage's work, before it is marked as done: exit code 130, and the next run ends like another."""
    work: Callable[..., Any] = getattr(judge_stages, name)

    def interrupted(*args: Any, **options: Any) -> Any:
        work(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(judge_stages, name, interrupted)
        assert main(flags(tiny_model, pairs, tmp_path / "run")) == 130

    assert main(flags(tiny_model, pairs, tmp_path / "run")) == 0

    assert_same_results(tmp_path / "run", whole)


def run_killed_at(name: str, command: Sequence[str]) -> bytes:
    """Run the program in this process, and kill it after the stage's work, before it is marked as done."""
    work: Callable[..., Any] = getattr(judge_stages, name)

    def killed(*args: Any, **options: Any) -> None:
        work(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)  # the parent's threads do not survive the fork
    setattr(judge_stages, name, killed)
    return bytes([main(command)])


def test_killed_at_every_stage_the_result_is_the_same(
    tiny_model: Path, pairs: Path, whole: Path, tmp_path: Path
) -> None:
    """One run is killed at each of its stages, one after the other, and in the end it is like an undisturbed one."""
    command = flags(tiny_model, pairs, tmp_path / "run")
    for name in STAGES:
        with pytest.raises(ChildError, match="SIGKILL"):
            in_child(partial(run_killed_at, name, command), 100)

    assert main(command) == 0

    assert_same_results(tmp_path / "run", whole)


def test_a_full_disk_at_any_stage_is_said(
    tiny_model: Path,
    pairs: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever cannot be written: exit code 1 and what to do; with room again the run ends like an undisturbed one."""
    command = flags(tiny_model, pairs, tmp_path / "run")
    for name in WRITING:
        with monkeypatch.context() as patch:
            patch.setattr(judge_stages, name, partial(without_room, getattr(judge_stages, name)))
            code = main(command)
        told = capsys.readouterr().err
        assert (code, "Make room" in told) == (1, True), (name, told)

    assert main(command) == 0

    assert_same_results(tmp_path / "run", whole)


def without_room(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Do it while no file can grow."""
    with files_no_longer_than(30):
        return work(*args, **options)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("--held-out", "0"), "--held-out must be above 0"),
        (("--limit", "1"), "--limit must be 2 or more"),
        (("--curve", "ten"), "--curve ten"),
        (("--mass-weight", "-1"), "loss weights are 0 or more"),
        (("--lr", "nan"), "settings must be finite"),
        (("--template", "unheard-of"), "no such template"),
        (("--not-in", "missing.jsonl"), r"missing\.jsonl: there is no such file"),
        (("--asking", "pairwise", "--template", "general@1"), "general@1 is pointwise"),
    ],
)
def test_flags_that_cannot_work(
    tiny_model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], problem: str
) -> None:
    """Each is refused with its reason before a model is loaded."""
    assert re.search(problem, refused(capsys, flags(tiny_model, pairs, tmp_path / "run", *more)))


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": "A?", "chosen": "x", "rejected": "y"}], "too few labels: 0 labels to train on, 1 held out"),
        ([{"prompt": f"{n}?", "chosen": "x", "rejected": "y", "probability": 0.5} for n in range(9)], "ties 9"),
        ([{"prompt": f"{n}?", "chosen": "x", "rejected": "x"} for n in range(9)], "equal answers 9"),
        ([{"prompt": f"{n}? " * 3000, "chosen": "x", "rejected": "y"} for n in range(9)], "context length exceeded 9"),
        ([{"prompt": f"{n}?", "response": "x", "label": 1} for n in range(9)], "every label says the same"),
    ],
)
def test_labels_that_teach_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Sequence[dict[str, Any]], problem: str
) -> None:
    """One label, only ties, only equal answers, only long prompts, one verdict: refused, and counted by reason.

    The folder stays free for better labels.
    """
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert re.search(problem, refused(capsys, flags(tiny_model, file, tmp_path / "run")))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_model_that_is_no_causal_model(
    tiny_model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A classifier's folder is refused with what to do."""
    config = read(tiny_model / "config.json")
    for file in tiny_model.iterdir():
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    classifier = {**config, "architectures": ["LlamaForSequenceClassification"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(classifier))

    told = refused(capsys, flags(tmp_path / "model", pairs, tmp_path / "run"))

    assert "LlamaForSequenceClassification is not a causal language model" in told


@pytest.mark.parametrize(("leaks", "code", "train"), [("refuse", 2, None), ("drop", 0, 69), ("keep", 0, 70)])
def test_labels_that_an_evaluation_knows(
    tiny_model: Path,
    pairs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    leaks: str,
    code: int,
    train: int | None,
) -> None:
    """They are refused, or dropped or kept on request; --dry-run counts what is left without writing anything."""
    evaluation = tmp_path / "dev.jsonl"
    evaluation.write_text('{"prompt": "question 7"}\n')
    more = ("--not-in", str(evaluation), "--leaks", leaks, "--dry-run")

    assert main(flags(tiny_model, pairs, tmp_path / "run", *more)) == code

    out, err = capsys.readouterr()
    assert not (tmp_path / "run").exists()
    if train is None:
        assert "1 labels have a prompt" in err
    else:
        kept, held_out = map(int, re.findall(r"(\d+) (?:labels to train on|held out)", out))
        assert kept + held_out == train
        assert "memory: about" in out


def test_other_labels_in_the_same_folder_are_refused(
    tiny_model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder holds one run: another learning rate is refused, and --overwrite redoes what it affects."""
    output = tmp_path / "run"
    assert main(flags(tiny_model, pairs, output)) == 0

    assert main(flags(tiny_model, pairs, output, "--lr", "1e-3")) == 1
    assert "another configuration (other training: lr)" in capsys.readouterr().err
    assert main(flags(tiny_model, pairs, output, "--lr", "1e-3", "--overwrite")) == 0
