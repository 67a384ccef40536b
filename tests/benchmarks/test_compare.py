"""Runs compared on the samples that both judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks import compare
from client.benchmarks.results.summary import SUMMARY_FILE
from client.benchmarks.rows import ITEMS_FILE, Row
from client.benchmarks.scoring.benchmark import OfficialScores
from tests.support.rows import answer, failed, pair, write_run

RIGHT, WRONG = (1.0, 0.0), (0.0, 1.0)


def verdicts(subset: str, pattern: str) -> list[Row]:
    """A row for each letter: r right, w wrong, t tied, x failed."""
    kinds = {"r": RIGHT, "w": WRONG, "t": (1.0, 1.0)}
    named = [(f"{subset}/{i}", letter) for i, letter in enumerate(pattern)]
    return [failed(name) if letter == "x" else pair(name, *kinds[letter]) for name, letter in named]


def compared(tmp_path: Path, *runs: list[Row], benchmark: str = "pairs") -> dict[str, Any]:
    """compare.json of these runs, the first of which is the baseline."""
    folders = [str(write_run(tmp_path / f"run{i}", rows, benchmark)) for i, rows in enumerate(runs)]

    assert compare.main([*folders, "--out", str(tmp_path / "out"), "--resamples", "200"]) == 0

    found: dict[str, Any] = json.loads((tmp_path / "out" / compare.JSON_FILE).read_text(encoding="utf-8"))
    return found


def test_the_difference_is_paired(tmp_path: Path) -> None:
    """10 samples: better on 3, worse on 1, so +0.2, and McNemar's exact p is 2·(1+4)/2⁴ = 0.625."""
    found = compared(tmp_path, verdicts("a", "rwwwrrrrrr"), verdicts("a", "wrrrrrrrrr"))["against_baseline"][0]

    assert (found["samples"], found["better"], found["worse"], found["mcnemar_p"]) == (10, 3, 1, 0.625)
    assert found["accuracy"]["value"] == pytest.approx(0.2)
    assert found["accuracy"]["low"] < 0.2 < found["accuracy"]["high"]


def test_samples_that_one_run_failed_are_left_out_and_counted(tmp_path: Path) -> None:
    """Failed in either run, or missing from one: the rest is compared."""
    base, run = verdicts("a", "rwxrr"), verdicts("a", "rrrx")

    found = compared(tmp_path, base, run)["against_baseline"][0]

    assert (found["samples"], found["left_out"]) == (2, 3)
    assert (found["left_out_run"], found["left_out_baseline"]) == (2, 1)
    assert found["accuracy"]["value"] == pytest.approx(0.5)


def test_the_official_mean_weighs_as_the_benchmark_does(tmp_path: Path) -> None:
    """In RewardBench a gain of 1 in math-prm alone is 984/1968 of Reasoning, an eighth of the mean, here certain."""
    others = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", *(f"hep-{x}" for x in ("cpp", "go", "java"))]
    others += [f"hep-{x}" for x in ("js", "python", "rust")]
    same = [row for name in others for row in verdicts(name, "rw")]

    report = compared(
        tmp_path, same + verdicts("math-prm", "ww"), same + verdicts("math-prm", "rr"), benchmark="rewardbench"
    )

    official = report["against_baseline"][0]["official_mean"]
    assert (official["value"], official["low"], official["high"]) == (pytest.approx(0.125),) * 3
    assert report["runs"]["run1"]["mean"] - report["runs"]["run0"]["mean"] == pytest.approx(0.125)


def test_rmbench_is_compared_by_shares_of_its_verdicts(tmp_path: Path) -> None:
    """Each sample's nine verdicts are one credit; two domains weigh alike whatever their sizes."""
    sides = {"chosen": [answer(0.0)] * 3, "rejected": [answer(0.0)] * 3}

    def row(name: str, first: float) -> Row:
        return Row(id=name, subset=name.split("/")[0], margins=[[first, 1, 1], [1, 1, 1], [1, 1, 1]], **sides)

    names = ["chat/1", "code/1", "code/2", "code/3"]
    found = compared(
        tmp_path, [row(name, -1) for name in names], [row("chat/1", 1), *(row(n, -1) for n in names[1:])],
        benchmark="rmbench",
    )["against_baseline"][0]  # fmt: skip

    assert found["official_mean"]["value"] == pytest.approx(1 / 18)
    assert found["accuracy"]["value"] == pytest.approx(1 / 36)
    assert (found["better"], found["worse"]) == (1, 0)


def test_a_mean_that_is_not_one_of_samples_has_no_interval(tmp_path: Path) -> None:
    """RewardBench 2's Ties has one score for all its samples: the difference is given, and a note instead of more."""
    rows = [
        Row(
            id=name,
            subset="Ties",
            chosen=[answer(3.0), answer(2.5)][:goods],
            rejected=answer(1.0),
            margins=[[2.0], [1.5]][:goods],
        )
        for name, goods in (("ref:1", 1), ("tied:1", 2))
    ]
    worse = [rows[0], rows[1].model_copy(update={"margins": [[2.0], [-1.5]]})]

    found = compared(tmp_path, worse, rows)["against_baseline"][0]

    assert found["official_mean"]["value"] > 0
    assert found["official_mean"]["low"] is None
    assert "no interval" in found["notes"][0]


def test_runs_without_a_common_sample_are_compared_as_such(tmp_path: Path) -> None:
    """There is no difference to report, and none is made up."""
    found = compared(tmp_path, verdicts("a", "rx"), verdicts("a", "xr"))["against_baseline"][0]

    assert (found["samples"], found["accuracy"], found["official_mean"], found["mcnemar_p"]) == (0, None, None, 1.0)


def test_the_first_runs_policy_of_ties_holds_for_all(tmp_path: Path) -> None:
    """A second run that counted ties as half is counted anew."""
    first = write_run(tmp_path / "first", verdicts("a", "rw"))
    second = write_run(tmp_path / "second", verdicts("a", "rt"))
    text = (second / SUMMARY_FILE).read_text(encoding="utf-8").replace('"ties":"strict"', '"ties":"half"')
    (second / SUMMARY_FILE).write_text(text, encoding="utf-8")

    runs = compare.read_runs([first, second])

    assert [run.summary.mean for run in runs] == [0.5, 0.5]


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    """And no run is compared with itself."""
    base, run = verdicts("a", "rwwwrrrrrr"), verdicts("a", "wrrrrrrrrr")
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()

    assert compared(tmp_path / "x", base, run) == compared(tmp_path / "y", base, run)


def test_the_terminal_says_it_in_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table side by side, then what was compared and what was left out."""
    compared(tmp_path, verdicts("a", "rwwwx"), verdicts("a", "rrwwr"))

    out = capsys.readouterr().out
    assert "run1 against run0, on the 4 samples that both judged (1 left out" in out
    assert "accuracy       +25.0, 95% interval" in out
    assert "label mass, mean" in out
    assert "No difference between run1 and run0 can be told on 4 samples: +25.0 points" in " ".join(out.split())


def test_a_difference_that_the_interval_tells_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the page above the tables, on the terminal last."""
    folders = [
        write_run(tmp_path / "base", verdicts("a", "w" * 40)),
        write_run(tmp_path / "run", verdicts("a", "r" * 40)),
    ]

    compare.main([*map(str, folders), "--out", str(tmp_path), "--resamples", "20"])

    said = "run is better than base on 40 samples: +100.0 points of official mean, 95% interval +100.0 to +100.0."
    text = (tmp_path / compare.HTML_FILE).read_text(encoding="utf-8")
    assert 0 < text.index(said) < text.index("<table>")
    assert " ".join(capsys.readouterr().out.split()).endswith(said)


def test_the_page_stands_alone(tmp_path: Path) -> None:
    """Names are escaped, nothing is loaded."""
    folders = [write_run(tmp_path / "base", verdicts("a", "rw")), write_run(tmp_path / "<b>run", verdicts("a", "rr"))]

    assert compare.main([*map(str, folders), "--out", str(tmp_path), "--resamples", "20"]) == 0

    text = (tmp_path / compare.HTML_FILE).read_text(encoding="utf-8")
    assert "&lt;b&gt;run" in text
    assert "<b>" not in text
    assert "http" not in text.replace("http-equiv", "")


def refused(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which these runs are refused."""
    assert compare.main([str(folder) for folder in folders]) == 2
    return capsys.readouterr().err


def test_other_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The digests differ, so a pairing by id would mean nothing."""
    rows = verdicts("a", "rw")
    folders = [write_run(tmp_path / name, rows, digest=name) for name in ("one", "two")]

    assert "judged different data" in refused(folders, capsys)


def test_other_benchmarks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their numbers have nothing in common."""
    rows = verdicts("hep-go", "rw")
    folders = [write_run(tmp_path / name, rows, name) for name in ("pairs", "rewardbench")]

    assert "is a run of rewardbench" in refused(folders, capsys)


def test_folders_that_hold_no_finished_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No summary, a broken one, and broken rows: each is named."""
    good = write_run(tmp_path / "good", verdicts("a", "rw"))
    bad = write_run(tmp_path / "bad", verdicts("a", "rw"))

    (bad / ITEMS_FILE).write_text("{}\n{}\n", encoding="utf-8")
    assert "items.jsonl, line 1" in refused([good, bad], capsys)
    (bad / SUMMARY_FILE).write_text("{}", encoding="utf-8")
    assert "cannot be read as a summary" in refused([good, bad], capsys)
    (bad / SUMMARY_FILE).unlink()
    assert "has not finished" in refused([good, bad], capsys)


def test_one_run_twice_or_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to compare."""
    run = write_run(tmp_path / "run", verdicts("a", "rw"))

    assert "two run folders" in refused([run], capsys)
    assert "given twice" in refused([run, tmp_path / "." / "run"], capsys)


def test_a_benchmark_that_is_not_known_is_refused() -> None:
    """With the names of those that are."""
    with pytest.raises(compare.CompareError, match="rewardbench, rmbench, pairs"):
        compare.benchmark_named("other")


@pytest.mark.parametrize("name", ["rewardbench", "rmbench", "pairs"])
def test_benchmarks_are_found_by_the_name_in_their_summaries(name: str) -> None:
    """Each is called what it is looked up by, and stands without rows."""
    benchmark = compare.benchmark_named(name)

    assert benchmark.name == name
    assert benchmark.scores([], "strict") == OfficialScores({}, None)
