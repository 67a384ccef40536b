"""Models through the tasks, on tiny models and without a judge: whole, killed, with bad input, and beside a judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killed_tasks import POINTS
from tests.support.live import live_service
from tests.support.tiny import make_tiny_model
from tests.support.training import with_nan
from trainer.evaluate import main
from trainer.evaluation.tasks.divergence import GivenAnswer, answer_divergence
from trainer.evaluation.tasks.forward import PIECE, Reading
from trainer.evaluation.tasks.likelihood import option_log_likelihoods
from trainer.policy.tokenizers import load_tokenizer

ROOT = Path(__file__).parents[2]
NO_JUDGE = ["--judge-url", "http://127.0.0.1:9"]
SMALL = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--rows",
    "4",
    "--task-max-new-tokens",
    "6",
    "--divergence-answers",
    "6",
]
READING = Reading("float32", "cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two tiny models with other weights."""
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of two tasks: problems with options and without, and sums."""
    folder = tmp_path_factory.mktemp("data")
    problems = [{"id": f"w{n}", "task": "words", "input": f"Is {n} <even>?", "target": "yes"} for n in range(8)]
    problems += [{"id": f"n{n}", "task": "sums", "input": f"{n} + 1 =", "target": f"{n + 1}"} for n in range(2)]
    sums = [{"question": f"How much is {n} and {n}?", "answer": f"Add.\n#### {2 * n}"} for n in range(6)]
    for name, rows in (("bbh", problems), ("gsm8k", sums)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--tasks", "bbh,gsm8k", "--bbh", str(folder / "bbh.jsonl"), "--gsm8k", str(folder / "gsm8k.jsonl")]


@pytest.fixture(scope="module")
def flags(models: list[Path], data: list[str]) -> list[str]:
    """The two models on both tasks; the control is the base itself."""
    named = ["--base", str(models[0]), "--new", str(models[1]), "--arm", f"control={models[0]}"]
    return [*named, *data, *SMALL, *NO_JUDGE]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*flags, "--out", str(folder)]) == 0
    return folder


def lines(path: Path) -> list[Any]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def results(folder: Path) -> dict[str, bytes]:
    """The files of a run that hold results, by their places in it."""
    kept = [
        file for file in folder.rglob("*") if file.suffix in (".jsonl", ".html", ".md") or file.name == "metrics.json"
    ]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


def test_all_arms_answer_the_same_items(whole: Path) -> None:
    """Every arm has a line for each item; the numbers are the means of the lines."""
    metrics = json.loads((whole / "metrics.json").read_bytes())["tasks"]
    items = {arm: lines(whole / f"tasks/bbh/{arm}.items.jsonl") for arm in ("base", "new", "control")}

    for arm, rows in items.items():
        assert [one["id"] for one in rows] == [*(f"w{n}" for n in range(8)), "n0", "n1"]
        scores = metrics["scores"]["bbh"][arm]["scores"]
        assert (scores["exact"]["value"], scores["exact"]["count"]) == (sum(one["correct"] for one in rows) / 10, 10)
        assert scores["option_likelihood"]["count"] == 8


def test_a_model_does_not_differ_from_itself(whole: Path) -> None:
    """The same weights: no distance at all, no comparison lost or won, and a sentence that says so."""
    metrics = json.loads((whole / "metrics.json").read_bytes())["tasks"]
    control, new = (metrics["distances"][arm]["by_side"] for arm in ("control", "new"))

    assert (control["base"]["value"], control["own"]["value"]) == (0, 0)
    assert min(new["base"]["value"], new["own"]["value"]) > 0.01
    assert new["base"]["count"] == 6
    assert metrics["same_weights"] == ["control"]
    assert all(one["p"] == 1 for one in metrics["contrasts"] if one["arm"] == "control")
    assert {one["against"] for one in metrics["contrasts"] if one["arm"] == "new"} == {"base", "control"}


def test_the_report_shows_the_numbers_and_escapes_texts(whole: Path) -> None:
    """HTML with every arm and the sentences, Markdown with the tables."""
    page, text = ((whole / "tasks" / name).read_text("utf-8") for name in ("report.html", "report.md"))

    assert "new is no better than base" in page
    assert "<even>" not in page
    assert "| control | base | bbh | exact |" in text


@pytest.mark.timeout(600)
def test_a_killed_evaluation_ends_with_the_same_bytes(flags: list[str], whole: Path, tmp_path: Path) -> None:
    """Killed while it answers, reads options and distances, and between its stages."""
    program = [sys.executable, "-m", "tests.killed_tasks", *flags, "--out", str(tmp_path / "killed")]
    ended = subprocess.run(program, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=True).stdout

    assert json.loads(ended.splitlines()[-1]) == [9] * (len(POINTS) - 1) + [0]
    assert results(tmp_path / "killed") == results(whole)


def test_a_finished_evaluation_loads_no_model(whole: Path, flags: list[str], tmp_path: Path) -> None:
    """A rerun reads what is there, and writes the same."""
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    before = {file: file.stat().st_mtime_ns for file in again.rglob("*.answers.jsonl")}

    code = main([*flags, "--out", str(again)])

    assert code == 0
    assert {file: file.stat().st_mtime_ns for file in again.rglob("*.answers.jsonl")} == before
    assert results(again) == results(whole)


def test_items_that_do_not_fit_are_counted_not_scored(models: list[Path], tmp_path: Path) -> None:
    """A prompt longer than the model's context has no answer; the comparison is on what both answered."""
    short = make_tiny_model(tmp_path / "short", max_tokens=300)
    rows = [
        {"id": "long", "input": "word " * 150, "target": "yes"},
        {"id": "short", "input": "Is it?", "target": "yes"},
    ]
    (tmp_path / "bbh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = ["--tasks", "bbh", "--bbh", str(tmp_path / "bbh.jsonl")]

    code = main(["--base", str(models[0]), "--new", str(short), *tasks, *SMALL, "--out", str(tmp_path / "out")])

    metrics = json.loads((tmp_path / "out/metrics.json").read_bytes())["tasks"]
    assert code == 0
    assert [metrics["scores"]["bbh"][arm]["missing"] for arm in ("base", "new")] == [0, 1]
    assert [one["count"] for one in metrics["contrasts"]] == [1, 1]


def test_the_options_likelihood_is_that_of_their_tokens(models: list[Path]) -> None:
    """As the model says in one pass over prompt and option."""
    tokenizer, model = load_tokenizer(models[0]), READING.load(models[0])
    prompt = READING.prompt_ids(tokenizer, "Is it? " * 40)
    options = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Yes", "No way", "(A)")]

    found = option_log_likelihoods(model, prompt, options)

    assert len(prompt) > PIECE
    for value, ids in zip(found, options, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(dim=1)
        rows = logits[len(prompt) - 1 : -1]
        assert value == pytest.approx(float(rows.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-3)


@pytest.mark.parametrize("ended", [True, False])
def test_the_distance_is_the_mean_over_the_whole_vocabulary(models: list[Path], ended: bool) -> None:
    """KL of all positions in one pass, whatever the pieces; the end of an answer that ended is one of them."""
    tokenizer, (ours, base) = load_tokenizer(models[0]), [READING.load(folder) for folder in models]
    prompt, text = READING.prompt_ids(tokenizer, "Tell me."), "The capital of France " * 40
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    found = answer_divergence(ours, base, tokenizer, prompt, GivenAnswer("own", "a", "Tell me.", text, ended))

    with torch.inference_mode():
        p, q = (model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(dim=1) for model in (ours, base))
    terms = (p.exp() * (p - q)).sum(dim=1)[len(prompt) - 1 : None if ended else -1]
    assert len(ids) > PIECE
    assert found.tokens == len(terms) == len(ids) + ended
    assert found.divergence == pytest.approx(float(terms.sum()), rel=1e-4)


def test_a_judge_and_tasks_go_together(models: list[Path], data: list[str], tmp_path: Path) -> None:
    """metrics.json has the win rate and the tasks."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"id": f"{n}", "prompt": f"What is {n}?"}) + "\n" for n in range(4)))
    named = ["--base", str(models[0]), "--new", str(models[1]), "--instructions", str(held_out)]
    with live_service() as judge:
        flags = [*named, *data, *SMALL, "--max-new-tokens", "6", "--judge-url", judge.url]
        code = main([*flags, "--out", str(tmp_path / "out")])

    metrics = json.loads((tmp_path / "out/metrics.json").read_bytes())
    assert code == 0
    assert metrics["compared"] + metrics["empty"] == 4
    assert set(metrics["tasks"]["scores"]) == {"bbh", "gsm8k"}
    assert metrics["responses"]["new"]["loops"] is not None


def test_another_vocabulary_has_no_distance(models: list[Path], data: list[str], tmp_path: Path) -> None:
    """The answers are compared all the same, and the report says why there is no distance."""
    other = Path(shutil.copytree(models[1], tmp_path / "other"))
    config = json.loads((other / "tokenizer.json").read_text("utf-8"))
    first, second = list(config["model"]["vocab"])[300:302]
    vocab = config["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(config), "utf-8")

    code = main(["--base", str(models[0]), "--new", str(other), *data, *SMALL, "--out", str(tmp_path / "out")])

    distances = json.loads((tmp_path / "out/metrics.json").read_bytes())["tasks"]["distances"]
    assert code == 0
    assert "other tokens" in distances["new"]["problem"]


def test_a_model_with_nan_weights_gets_no_numbers(models: list[Path], data: list[str], tmp_path: Path) -> None:
    """The evaluation stops: exit code 1, and no metrics."""
    broken = with_nan(models[1], tmp_path / "nan", "model.norm.weight")

    code = main(["--base", str(models[0]), "--new", str(broken), *data, *SMALL, "--out", str(tmp_path / "out")])

    assert code == 1
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "bbh,mmlu"], "unknown task 'mmlu'; there are ifeval, bbh, gsm8k"),
        (["--tasks", "bbh,bbh"], "--tasks names bbh twice"),
        (["--tasks", "ifeval,bbh,gsm8k"], "give its data by --ifeval FILE"),
        (["--tasks", "bbh"], "--gsm8k is given, but --tasks does not name gsm8k"),
        (["--tasks", ""], "--bbh is given, but --tasks does not name bbh"),
        (["--bbh", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--task-items", "0"], "--task-items and --task-max-new-tokens are 1 or more"),
        (["--arm", "one=x", "--arm", "one=y"], "another model is called 'one' already"),
        (["--arm", "base=x"], "another model is called 'base' already"),
        (["--arm", "x"], "give NAME=MODEL"),
        (["--arm", "../x=y"], "give NAME=MODEL"),
        (["--arm", "x=nowhere"], "neither a folder here nor a hub id"),
        (["--instructions", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    more: list[str], message: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and no folder."""
    code = main([*flags, *more, "--out", str(tmp_path / "out")])

    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_evaluate_is_said(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither instructions nor tasks."""
    code = main(["--base", str(models[0]), "--new", str(models[1]), "--out", str(tmp_path / "out")])

    assert code == 2
    assert "nothing to evaluate" in capsys.readouterr().err
