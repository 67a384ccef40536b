"""Finished runs as the files of RewardBench's leaderboards; its own code reads them in tests/integrations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks import export, pairs, rewardbench
from client.benchmarks.results.summary import SUMMARY_FILE
from client.benchmarks.rows import ITEMS_FILE, Row, read_rows
from client.data.samples import digest
from client.data.sources import load_pairs, load_rewardbench
from tests.benchmarks.makers import BEST_OF_FOUR, TIES, best_of_four_file, pairs_file
from tests.support.live import Live, live_service
from tests.support.rows import answer, failed, pair, write_run

NAME = "some-org/some-judge"
OTHERS = ("alpacaeval-easy/0", "llmbar-natural/1", "donotanswer/2", "hep-go/3")


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One service for all runs."""
    with live_service() as service:
        yield service


def exported(folder: Path, *flags: str, form: str = "rewardbench") -> tuple[dict[str, Any], dict[str, Any]]:
    """The files under eval-set and eval-set-scores."""
    assert export.main([str(folder), "--format", form, "--name", NAME, *flags]) == 0
    results, scores = (
        json.loads((folder / form / kind / f"{NAME}.json").read_text()) for kind in ("eval-set", "eval-set-scores")
    )
    return results, scores


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str, form: str = "rewardbench") -> str:
    """The message with which the run is refused; nothing is written."""
    before = sorted(folder.rglob("*"))
    name = [] if "--name" in flags else ["--name", NAME]

    assert export.main([str(folder), "--format", form, *name, *flags]) == 2

    assert sorted(folder.rglob("*")) == before
    return capsys.readouterr().err


def made_run(tmp_path: Path, rows: Sequence[Row]) -> Path:
    """A run of rewardbench over the first five samples of the miniature, with these rows."""
    file = pairs_file(tmp_path, 5)
    folder = write_run(tmp_path / "run", rows, "rewardbench", digest(load_rewardbench(file)))
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    summary["config"]["data"] = str(file)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary))
    return folder


def tied_run(tmp_path: Path, ties: str) -> Path:
    """Four right pairs and a tied one, under this policy."""
    folder = made_run(tmp_path, [*(pair(name, 2, 1) for name in OTHERS), pair("math-prm/4", 1, 1)])
    file = folder / SUMMARY_FILE
    file.write_text(file.read_text().replace('"ties": "strict"', f'"ties": "{ties}"'))
    return folder


def test_a_run_becomes_the_leaderboards_two_files(
    tmp_path: Path, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accuracies are the summary's, the columns are in the order of the data, ids are RewardBench's own."""
    folder, data = tmp_path / "run", pairs_file(tmp_path)
    assert rewardbench.main(["--judge-url", live.url, "--data", str(data), "--out", str(folder)]) == 0
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    logged = {row.id: row for row in read_rows(folder / ITEMS_FILE)}
    capsys.readouterr()

    results, scores = exported(folder)

    names = {"model": NAME, "model_type": "Generative", "chat_template": ", ".join(summary["judge"]["templates"])}
    assert results == {**names, **{name: subset["accuracy"] for name, subset in summary["subsets"].items()}}
    assert {key: scores.pop(key) for key in names} == names
    assert [len(column) for column in scores.values()] == [20] * 8
    assert scores["id"] == list(range(20))
    row = logged["llmbar-natural/1"]
    assert [scores["scores_chosen"][1], scores["scores_rejected"][1]] == [answer.log_odds for answer in row.answers]
    assert scores["results"] == [
        int(good > bad) for good, bad in zip(scores["scores_chosen"], scores["scores_rejected"], strict=True)
    ]
    assert scores["prompt"][7] == "Question 7?"
    assert scores["text_rejected"][7] == [
        {"role": "user", "content": "Question 7?"},
        {"role": "assistant", "content": "Bad 7"},
    ]
    said = capsys.readouterr().out
    assert "20 samples, 5 of 23 subsets" in said
    assert "no score for alpacaeval-hard" in said
    assert f"written: {folder / 'rewardbench' / 'eval-set' / NAME}.json" in said


def test_a_run_that_compared_has_the_log_odds_of_comparisons(tmp_path: Path, live: Live) -> None:
    """The chosen answer's and, reversed, the rejected one's."""
    folder, data = tmp_path / "run", pairs_file(tmp_path)
    command = ["--judge-url", live.url, "--data", str(data), "--out", str(folder), "--mode", "pairwise"]
    assert rewardbench.main(command) == 0
    margins = {row.id: row.flat_margins[0] for row in read_rows(folder / ITEMS_FILE)}

    _, scores = exported(folder)

    assert scores["scores_chosen"][6] == margins["llmbar-natural/6"]
    assert scores["scores_rejected"][6] == -margins["llmbar-natural/6"]
    assert scores["results"][6] == int(margins["llmbar-natural/6"] > 0)


def test_rewardbench_2_has_all_scores_of_a_sample(tmp_path: Path, live: Live) -> None:
    """The good answers' first; ids have lost the subset; Ties is one number and no results."""
    folder, data = tmp_path / "run", best_of_four_file(tmp_path)
    assert pairs.main(["--judge-url", live.url, "--data", str(data), "--out", str(folder)]) == 0
    sections = json.loads((folder / SUMMARY_FILE).read_text())["sections"]
    logged = {row.id: row for row in read_rows(folder / ITEMS_FILE)}

    results, scores = exported(folder, form="rewardbench-2")

    assert {name: results[name] for name in sections} == sections
    assert len(sections) == 6
    assert scores["id"] == [name for _, name, _ in (*BEST_OF_FOUR, *TIES)]
    assert scores["num_correct"] == [1] * 15 + [1, 3] * 3
    assert scores["scores"][16] == [answer.log_odds for answer in logged["tied:0"].answers]
    assert [len(texts) for texts in scores["text"]] == [4] * 15 + [4, 6] * 3
    assert scores["text"][16][2][1] == {"role": "assistant", "content": "Good 2 of tied:0"}
    assert scores["results"][15:] == [None] * 6
    assert set(scores["results"][:15]) <= {0, 1}


@pytest.mark.parametrize(("ties", "result"), [("strict", 0), ("half", 0.5)])
def test_a_tie_counts_as_in_the_run(tmp_path: Path, ties: str, result: float) -> None:
    """Nothing as for RewardBench's classifiers, or half as for its generative judges."""
    results, scores = exported(tied_run(tmp_path, ties))

    assert (results["math-prm"], scores["results"][4]) == (result, result)
    assert scores["results"][:4] == [1, 1, 1, 1]


def test_a_reward_model_is_called_a_classifier(tmp_path: Path) -> None:
    """Unless the user calls it something else."""
    rows = [pair(name, 2, 1, template="reward-model@1") for name in (*OTHERS, "math-prm/4")]
    folder = made_run(tmp_path, rows)

    assert exported(folder)[0]["model_type"] == "Seq. Classifier"
    assert exported(folder, "--overwrite", "--model-type", "DPO")[0]["model_type"] == "DPO"


def test_failed_samples_are_refused_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither file can say that a sample has no verdict, so the program does."""
    folder = made_run(tmp_path, [*(pair(name, 2, 1) for name in OTHERS), failed("math-prm/4")])

    assert "1 of 5 samples (context_length_exceeded: 1) could not be judged" in refusal(capsys, folder)
    results, scores = exported(folder, "--allow-incomplete")

    assert "math-prm" not in results
    assert scores["subset"] == ["alpacaeval-easy", "llmbar-natural", "donotanswer", "hep-go"]
    assert "1 of 5 samples (context_length_exceeded: 1) could not be judged and are left out" in capsys.readouterr().out


def test_a_run_in_which_everything_failed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to write."""
    folder = made_run(tmp_path, [failed(name) for name in (*OTHERS, "math-prm/4")])

    assert "nothing was judged" in refusal(capsys, folder, "--allow-incomplete")


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier export stays, whichever of its two files is there."""
    folder = tied_run(tmp_path, "strict")
    exported(folder)
    (folder / "rewardbench" / "eval-set" / f"{NAME}.json").write_text("mine")
    (folder / "rewardbench" / "eval-set-scores" / f"{NAME}.json").unlink()

    assert "give --overwrite" in refusal(capsys, folder)
    assert exported(folder, "--overwrite")[0]["math-prm"] == 0


@pytest.mark.parametrize("name", ["judge", "../judge", "a/b/c", "a/..", "/a/b", "", "a/b c"])
def test_a_name_that_is_no_name_of_the_hub_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It becomes a path."""
    assert "give --name ORG/NAME" in refusal(capsys, tied_run(tmp_path, "strict"), "--name", name)


def test_a_models_own_name_must_have_an_organisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows are by a model called m."""
    folder = tied_run(tmp_path, "strict")

    assert export.main([str(folder), "--format", "rewardbench"]) == 2
    assert "'m' has not: give --name ORG/NAME" in capsys.readouterr().err


def test_other_data_than_the_judged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of another file would stand beside the scores."""
    folder = tied_run(tmp_path, "strict")
    pairs_file(tmp_path, 5, chosen="Better 4")

    assert "data_digest differs" in refusal(capsys, folder)


def test_data_that_have_moved_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And taken from where the user says, selected as the run selected them."""
    folder = tied_run(tmp_path, "strict")
    moved = (tmp_path / "pairs.jsonl").rename(tmp_path / "moved.jsonl")

    assert "if it has moved, give --data" in refusal(capsys, folder)
    assert exported(folder, "--data", str(moved))[1]["id"] == [0, 1, 2, 3, 4]


def test_a_part_of_the_benchmark_says_so(tmp_path: Path, live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's selection is repeated."""
    folder = tmp_path / "run"
    command = ["--judge-url", live.url, "--data", str(pairs_file(tmp_path)), "--out", str(folder)]
    assert rewardbench.main([*command, "--subsets", "hep-*", "math-prm", "--limit", "5", "--seed", "3"]) == 0

    _, scores = exported(folder)

    assert sorted(set(scores["subset"])) == ["hep-go", "math-prm"]
    assert len(scores["id"]) == 5
    assert "limited to 5 samples" in capsys.readouterr().out


def test_a_run_of_another_benchmark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each format has its own arithmetic."""
    folder = tied_run(tmp_path, "strict")

    assert "is a run of rewardbench; rewardbench-2 takes runs of pairs" in refusal(capsys, folder, form="rewardbench-2")


def test_samples_that_the_benchmark_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Subsets of one's own, and an id of Ties that RewardBench's code could not read."""
    row = {"id": "7", "subset": "Ties", "prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}
    for subset in ("mine", "Ties"):
        home = tmp_path / subset
        home.mkdir()
        file = home / "data.jsonl"
        file.write_text(json.dumps({**row, "subset": subset}) + "\n")
        sides = {"chosen": [answer(1), answer(2)], "rejected": answer(0), "margins": [[1.0], [2.0]]}
        judged = Row(id=f"{subset}/7", subset=subset, **sides)
        folder = write_run(home / "run", [judged], "pairs", digest(load_pairs(file)))

        assert f"the first is {subset}/7" in refusal(capsys, folder, "--data", str(file), form="rewardbench-2")


def test_rewardbench_2_wants_a_score_for_each_answer(
    tmp_path: Path, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    """Comparisons of good with bad answers do not order the good ones."""
    folder, data = tmp_path / "run", best_of_four_file(tmp_path)
    command = ["--judge-url", live.url, "--data", str(data), "--out", str(folder), "--mode", "pairwise"]
    assert pairs.main(command) == 0
    capsys.readouterr()

    assert "run it with --mode pointwise" in refusal(capsys, folder, form="rewardbench-2")


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a summary, without a row, with a row that cannot be read."""
    folder = tied_run(tmp_path, "strict")
    items = folder / ITEMS_FILE

    items.write_text("".join(items.read_text().splitlines(keepends=True)[:-1]))
    assert "no row for 1 of 5 samples (the first: math-prm/4)" in refusal(capsys, folder)
    items.write_text("{}\n")
    assert "items.jsonl, line 1" in refusal(capsys, folder)
    (folder / SUMMARY_FILE).unlink()
    assert "has not finished" in refusal(capsys, folder)


def test_files_that_cannot_be_written_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file stands where the folder should be."""
    folder = tied_run(tmp_path, "strict")
    (tmp_path / "out").write_text("")

    assert export.main([str(folder), "--format", "rewardbench", "--name", NAME, "--out", str(tmp_path / "out")]) == 1
    assert "error:" in capsys.readouterr().err
