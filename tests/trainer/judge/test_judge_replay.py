"""Pairs that nobody labelled hold a judge where it was: read, trained on, measured; interrupted, redone, refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.judge.makers import flags, read, refused, same_adapter
from trainer import judge_stages
from trainer.tune_judge import main
from trainer.tuning.judge.replay import read_replay


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that nobody labelled, some that cannot be used, and one with a label that does not count."""
    rows = [{"prompt": f"Where is {n}?", "responses": [f"Rome is {n}", f"dog {n}", f"Rome is {n}"]} for n in range(30)]
    rows += [{"prompt": "Alone?", "responses": ["x"]}, {"prompt": "Empty?", "responses": ["x", " "]}]
    rows += [{"prompt": "Labelled?", "chosen": "fox", "rejected": "Paris"}]
    path = tmp_path_factory.mktemp("replay") / "replay.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def replayed(model: Path, pairs: Path, replay: Path, output: Path, *more: str) -> list[str]:
    """The command line of a run that is held to the base."""
    return flags(model, pairs, output, "--replay", str(replay), "--held-out", "0.5", *more)


def test_pairs_that_nobody_labelled_hold_the_judge_where_it_was(
    tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held, their differences move less than when that is only measured; it still learns the labels."""
    moved = {}
    for weight in ("0", "5"):
        output = tmp_path / weight
        assert main(replayed(tiny_model, pairs, replay, output, "--replay-weight", weight, "--curve", "8")) == 0
        evidence = read(output / "evidence.json")
        moved[weight] = evidence["replay"]["moved"]
        assert evidence["after"]["accuracy"]["value"] > evidence["before"]["accuracy"]["value"]
        assert evidence["replay"]["trained"] + evidence["replay"]["kept"]["count"] == (16 if weight == "0" else 31)
        assert read(output / "training.json")["labels"] == read(output / "labels.json")["train"]
        assert read(output / "curve.json")["8"]["replay"]["trained"] == evidence["replay"]["trained"]

    counts = read(tmp_path / "5" / "replay.json")
    told = capsys.readouterr().err
    assert moved["5"] < 0.5 * moved["0"]
    assert counts["left_out"] == {"single answers": 1, "empty texts": 1, "duplicates": 30}
    assert "pairs to replay to train on" in told
    assert "pairs held out keep their winner" in told
    assert "that nobody labelled" in (tmp_path / "5" / "report.html").read_text()


def test_a_replay_without_weight_changes_nothing(tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path) -> None:
    """It is measured alone: the adapter is that of a run without these pairs, and the page says what was done."""
    assert main(replayed(tiny_model, pairs, replay, tmp_path / "measured", "--replay-weight", "0")) == 0
    assert main(flags(tiny_model, pairs, tmp_path / "without", "--held-out", "0.5")) == 0

    assert same_adapter(tmp_path / "measured", tmp_path / "without")
    assert read(tmp_path / "measured" / "evidence.json")["replay"]["trained"] == 0
    assert "Held to what it said" not in (tmp_path / "measured" / "report.html").read_text()


def test_an_evaluation_file_named_later_redoes_the_replay(
    tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path
) -> None:
    """With --overwrite none of its prompts stays among the pairs."""
    output, evaluation = tmp_path / "run", tmp_path / "dev.jsonl"
    evaluation.write_text("".join(f'{{"prompt": "Where is {n}?"}}\n' for n in range(15)))
    later = ("--not-in", str(evaluation), "--leaks", "drop", "--overwrite")
    assert main(replayed(tiny_model, pairs, replay, output)) == 0

    assert main(replayed(tiny_model, pairs, replay, output, *later)) == 0

    assert read(output / "replay.json")["left_out"]["in an evaluation file"] == 15


@pytest.mark.parametrize("held", [True, False], ids=["other pairs", "none any more"])
def test_a_curve_belongs_to_its_replay(tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path, held: bool) -> None:
    """With --overwrite and other pairs, or none any more, it is that of a fresh run."""
    output, fresh, other = tmp_path / "run", tmp_path / "fresh", tmp_path / "other.jsonl"
    rows = [{"prompt": f"Who is {n}?", "responses": [f"Paris is {n}", f"fox {n}"]} for n in range(30)]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--held-out", "0.5", "--curve", "5", *(("--replay", str(other)) if held else ()))
    assert main(replayed(tiny_model, pairs, replay, output, "--curve", "5")) == 0

    assert main(flags(tiny_model, pairs, output, *more, "--overwrite")) == 0
    assert main(flags(tiny_model, pairs, fresh, *more)) == 0

    assert read(output / "curve.json") == read(fresh / "curve.json")


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ({"chosen": "x", "rejected": "y", "probability": 0.5}, 1),
        ({"chosen": "x", "rejected": "y", "probability": 7, "margin": -1}, 1),
        ({"chosen": ["x", "y"], "rejected": ["z", "x"]}, 3),
        ({"responses": ["x", "y"], "label": None, "chosen": None, "rejected": None}, 1),
        ({"responses": '["x", "y", "z"]', "chosen": "", "rejected": ""}, 2),
        ({"response": "x", "label": "maybe"}, 0),
    ],
)
def test_labels_of_pairs_to_replay_do_not_matter(tmp_path: Path, row: dict[str, Any], count: int) -> None:
    """Ties, disputed pairs and labels that make no sense are pairs like others."""
    file = tmp_path / "replay.jsonl"
    file.write_text(json.dumps({"prompt": "A?", **row}) + "\n" + json.dumps({"prompt": "B?", "responses": ["x", "y"]}))

    found, _ = read_replay(str(file), "category")

    assert len(found) == count + 1
    assert not any(pair.is_decided for pair in found)


def test_a_pair_that_was_decided_both_ways_is_replayed_once(tmp_path: Path) -> None:
    """What people disagree on is a pair to hold in place."""
    file = tmp_path / "replay.jsonl"
    rows = [{"prompt": "A?", "chosen": "x", "rejected": "y"}, {"prompt": "A?", "chosen": "y", "rejected": "x"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found, left_out = read_replay(str(file), "category")

    assert len(found) == 1
    assert left_out == {"duplicates": 1}


def test_a_replay_that_was_interrupted_ends_like_another(
    tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after each of its stages' work."""
    assert main(replayed(tiny_model, pairs, replay, tmp_path / "whole")) == 0
    command = replayed(tiny_model, pairs, replay, tmp_path / "run")
    read_held_out, train_judge = judge_stages.read_held_out, judge_stages.train_judge
    calls = 0

    def interrupted(work: Callable[..., Any], at: Sequence[int], *args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = work(*args, **options)
        if calls in at:
            raise KeyboardInterrupt
        return result

    # Each call's number counts those that were interrupted: before, replay_before, again, training, again, …
    with monkeypatch.context() as patch:
        patch.setattr(judge_stages, "read_held_out", partial(interrupted, read_held_out, (2, 7)))
        patch.setattr(judge_stages, "train_judge", partial(interrupted, train_judge, (4,)))
        codes = [main(command) for _ in range(4)]

    assert codes == [130, 130, 130, 0]
    assert same_adapter(tmp_path / "run", tmp_path / "whole")
    for file in ("evidence.json", "replay_before.jsonl", "replay_after.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_replay_that_cannot_work(
    tiny_model: Path, pairs: Path, replay: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too few pairs, pairs of an evaluation file, a weight without pairs: refused with the reason."""
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "A?", "responses": ["x", "y"]}\n')
    output = tmp_path / "run"

    assert "there is no such file" in refused(capsys, replayed(tiny_model, pairs, tmp_path / "none", output))
    assert "there is no such file" in refused(capsys, replayed(tiny_model, pairs, tmp_path, output))
    assert not output.exists()
    assert "of 1 pairs" in refused(capsys, replayed(tiny_model, pairs, few, output))
    known = replayed(tiny_model, pairs, replay, tmp_path / "known", "--not-in", str(few))
    few.write_text('{"prompt": "where is 7"}\n')
    assert "1 labels have a prompt" not in refused(capsys, flags(tiny_model, pairs, output, "--replay-weight", "1"))
    assert "have a prompt" in refused(capsys, known)
    assert main([*known, "--leaks", "drop", "--dry-run"]) == 0
    assert "in an evaluation file 1" in capsys.readouterr().out
