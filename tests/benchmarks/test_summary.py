"""Rows to numbers: accuracies without failures, calibration, position, length; the table; rows read back."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from client.benchmarks.report.formats import caveats, model_name, verdict
from client.benchmarks.report.terminal import print_summary
from client.benchmarks.results.summary import Cost, Summary
from client.benchmarks.rows import Row, read_rows
from client.schema import Usage
from tests.support.rows import answer, failed, pair, pairs, summary_of


def printed(summary: Summary, width: int = 100) -> str:
    """What the terminal shows."""
    console = Console(file=io.StringIO(), width=width)
    print_summary(summary, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rmbench_row(name: str, margins: list[list[float]]) -> Row:
    """A sample of three answers on each side."""
    sides = {"chosen": [answer(0.0)] * 3, "rejected": [answer(0.0)] * 3}
    return Row(id=name, subset=name.split("/")[0], margins=margins, **sides)


def test_accuracy_comes_with_its_wilson_interval() -> None:
    """8 of 10 is 0.8, from 0.4902 to 0.9433."""
    score = summary_of("pairs", pairs("a", 8, 2)).subsets["a"]

    assert (score.samples, score.judged, score.accuracy) == (10, 10, 0.8)
    assert (score.low, score.high) == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_failures_are_counted_and_in_no_accuracy() -> None:
    """One right, one failed: accuracy 1, not one half."""
    summary = summary_of("pairs", [pair("a/0", 1, 0), failed("a/1"), failed("a/2", "timeout")])

    score = summary.subsets["a"]
    assert (score.samples, score.judged, score.failed, score.accuracy) == (3, 1, 2, 1.0)
    assert summary.counts.failures == {"context_length_exceeded": 1, "timeout": 1}
    assert summary.mean == 1.0


def test_a_run_says_what_it_cost() -> None:
    """Tokens and seconds of all rows, and a note that the tokens of failed samples are known only in part."""
    usage = Usage(prompt_tokens=1000, cached_tokens=30, completion_tokens=7)
    rows = [
        pair("a/0", 1, 0, usage=usage, seconds=2.5),
        failed("a/1").model_copy(update={"usage": usage, "seconds": 4}),
    ]
    summary = summary_of("pairs", [*rows, failed("a/2")])

    expected = {"prompt_tokens": 2000, "cached_tokens": 60, "completion_tokens": 14, "without_tokens": 2}
    assert summary.cost == Cost(**expected, seconds=6.5)
    told = "cost: 2,000 prompt tokens (60 cached), 14 written, not all of those of 2 failed samples, in 6 s"
    assert told in printed(summary).replace("\n", " ")


def test_rows_of_before_costs_were_kept_have_none() -> None:
    """Not zero."""
    assert summary_of("pairs", [pair("a/0", 1, 0)]).cost is None


def test_a_subset_that_failed_as_a_whole_has_no_accuracy() -> None:
    """None, and its section is left out of the mean."""
    summary = summary_of("pairs", [pair("a/0", 1, 0), failed("b/0")])

    score = summary.subsets["b"]
    assert (score.accuracy, score.low, score.high, score.label_mass) == (None, None, None, None)
    assert summary.sections == {"a": 1.0}


def test_a_run_without_verdicts_still_has_a_summary() -> None:
    """No mean, no calibration, no label mass; the failures are there, and the judge from the configuration."""
    summary = summary_of("rewardbench", [failed("hep-go/0")], judge={"model": "m", "fingerprint": "f"})

    assert (summary.mean, summary.label_mass, summary.length, summary.position) == (None, None, None, None)
    assert (summary.calibration.pairs, summary.calibration.answers) == (None, None)
    assert summary.counts.failed == 1
    assert (summary.judge.model, summary.judge.fingerprint) == ("m", "f")


@pytest.mark.parametrize(("ties", "accuracy"), [("strict", 0.5), ("half", 0.75)])
def test_ties_count_by_the_policy(ties: str, accuracy: float) -> None:
    """A margin of 0 is a tie: nothing, or half."""
    rows = [pair("a/0", 1, 0), pair("a/1", 1, 1)]

    summary = summary_of("pairs", rows, ties="half" if ties == "half" else "strict")

    assert (summary.subsets["a"].ties, summary.counts.ties) == (1, 1)
    assert summary.subsets["a"].accuracy == accuracy


def test_subsets_know_their_sections_and_stand_in_the_official_order() -> None:
    """The section of hep-go is Reasoning, which comes last; a subset that RewardBench does not have has none."""
    rows = [pair(f"{name}/0", 1, 0) for name in ("hep-go", "unknown", "alpacaeval-hard", "donotanswer")]

    subsets = summary_of("rewardbench", rows).subsets

    found = [(name, score.section) for name, score in subsets.items()]
    assert found == [
        ("alpacaeval-hard", "Chat"),
        ("donotanswer", "Safety"),
        ("hep-go", "Reasoning"),
        ("unknown", None),
    ]


def test_the_order_of_the_rows_makes_no_difference() -> None:
    """Concurrency finishes samples in any order; the file is the same to the last digit."""
    rows = [pair(f"hep-go/{i}", 0.1 * i, 0.37, first_log_odds=0.1 * i, flips=i % 2) for i in range(20)]

    forwards, backwards = summary_of("rewardbench", rows), summary_of("rewardbench", rows[::-1])

    assert forwards.model_dump_json() == backwards.model_dump_json()


def test_pair_calibration_by_hand() -> None:
    """Sure at 0.9 and right, sure at 0.9 and wrong: confidence 0.9 is right half the time, ECE 0.4, Brier 0.41."""
    log_9 = 2.1972245773362196

    pairs_ = summary_of("pairs", [pair("a/0", log_9, 0), pair("a/1", 0, log_9)]).calibration.pairs

    assert pairs_ is not None
    assert (pairs_.ece, pairs_.brier, pairs_.n) == (pytest.approx(0.4), pytest.approx(0.41), 2)


def test_a_judge_that_always_ties_is_calibrated() -> None:
    """Confidence one half is right by half, though its Brier score is that of a coin."""
    found = summary_of("pairs", [pair("a/0", 1, 1)]).calibration.pairs

    assert found is not None
    assert (found.ece, found.brier) == (0.0, 0.25)


def test_answers_are_held_against_the_truth_by_their_raw_scores() -> None:
    """Scores 0.9 for a chosen and 0.4 for a rejected answer: ECE (0.1 + 0.4) / 2, Brier (0.01 + 0.16) / 2."""
    row = pair("a/0", answer(2, score=0.9), answer(1, score=0.4))

    found = summary_of("pairs", [row]).calibration.answers

    assert found is not None
    assert (found.ece, found.brier) == (pytest.approx(0.25), pytest.approx(0.085))
    assert (found.n, found.calibrated) == (2, False)


@pytest.mark.parametrize(("rejected", "calibrated", "ece"), [(0.0, True, 0.0), (None, False, 0.45)])
def test_calibrated_probabilities_are_used_where_every_answer_has_one(
    rejected: float | None, calibrated: bool, ece: float
) -> None:
    """One answer without makes it raw scores for all (0.5 and 0.4 here): the two kinds are not mixed."""
    row = pair("a/0", answer(2, score=0.5, calibrated=1.0), answer(1, score=0.4, calibrated=rejected))

    found = summary_of("pairs", [row]).calibration.answers

    assert found is not None
    assert (found.calibrated, found.ece) == (calibrated, pytest.approx(ece))


def test_pairwise_runs_have_position_bias_and_no_calibration_of_answers() -> None:
    """One flip in two comparisons; the mean log-odds of the answer shown first."""
    rows = [pair("a/0", 1, 0, flips=1, first_log_odds=0.5), pair("a/1", 1, 0, flips=0, first_log_odds=-0.1)]

    summary = summary_of("pairs", rows)

    assert summary.position is not None
    assert (summary.position.comparisons, summary.position.flips, summary.position.flip_rate) == (2, 1, 0.5)
    assert summary.position.first_log_odds == pytest.approx(0.2)
    assert summary.calibration.answers is None


def test_label_mass_and_truncation() -> None:
    """Masses 0.2, 0.4, 0.6, 0.8: mean 0.5, 5th percentile 0.23, half below one half; one sample has a cut text."""
    rows = [
        pair("a/0", answer(1, label_mass=0.2, truncated=True), answer(0, label_mass=0.4, truncated=True)),
        pair("a/1", answer(1, label_mass=0.6), answer(0, label_mass=0.8)),
    ]

    summary = summary_of("pairs", rows)

    assert summary.label_mass is not None
    mass = summary.label_mass
    assert (mass.mean, mass.p05, mass.share_below_half) == (pytest.approx(0.5), pytest.approx(0.23), 0.5)
    assert summary.counts.truncated == 1


def test_accuracy_by_length() -> None:
    """Right where the chosen answer is longer, wrong where it is shorter, equal lengths left out."""
    rows = [
        pair("a/0", answer(1, length=20), 0),
        pair("a/1", answer(0, length=20), -1),
        pair("a/2", answer(0, length=5), 1),
        pair("a/3", answer(0, length=10), 1),
    ]

    length = summary_of("pairs", rows).length

    assert length is not None
    assert length.chosen_longer == pytest.approx(2 / 3)
    assert (length.accuracy_when_chosen_longer, length.accuracy_when_chosen_shorter) == (1.0, 0.0)


def test_a_side_without_pairs_is_left_out() -> None:
    """If every chosen answer is the longer one, no accuracy is given for shorter ones."""
    told = printed(summary_of("pairs", [pair("a/0", answer(1, length=20), 0)]), width=200)

    assert "length: accuracy 100.0% where the chosen answer is longer\n" in told
    assert "shorter" not in told


def test_rmbench_counts_samples_and_cells() -> None:
    """Nine verdicts a sample: all count in calibration, the sample once; its subdomain belongs to safety."""
    summary = summary_of("rmbench", [rmbench_row("safety-refuse/1", [[1, -1, -1], [1, 1, -1], [1, 1, 1]])])

    score = summary.subsets["safety-refuse"]
    assert (score.judged, score.accuracy, score.section) == (1, pytest.approx(6 / 9), "safety")
    assert summary.calibration.pairs is not None
    assert summary.calibration.pairs.n == 9
    assert summary.matrices == {"safety": [[1, 0, 0], [1, 1, 0], [1, 1, 1]]}


def test_judges_and_templates_are_named_once() -> None:
    """Templates sorted; one model, whatever the number of rows."""
    summary = summary_of("pairs", [pair("a/0", 1, 0, template="math@1"), pair("a/1", 1, 0), pair("a/2", 1, 0)])

    assert (summary.judge.model, summary.judge.fingerprint) == ("m", "f")
    assert summary.judge.templates == ["general@1", "math@1"]


def test_a_summary_reads_back_as_written(tmp_path: Path) -> None:
    """summary.json holds all of it, the configuration included."""
    summary = summary_of("rewardbench", [*pairs("hep-go", 2, 1), failed("hep-js/0")], seed=1, nested={"a": [1, None]})
    (tmp_path / "summary.json").write_text(summary.model_dump_json(indent=2), encoding="utf-8")

    assert Summary.load(tmp_path / "summary.json") == summary


def test_the_table_fits_100_columns_and_ends_with_the_verdict() -> None:
    """Sections, subsets with intervals, the paper's columns, failures; the last line is the verdict, said once."""
    names = ("alpacaeval-hard", "llmbar-adver-neighbor", "xstest-should-respond", "hep-go")
    rows = [row for name in names for row in pairs(name, 8, 2)]

    lines = printed(summary_of("rewardbench", [*rows, failed("hep-go/x")]), width=300).splitlines()

    text = "\n".join(lines)
    assert max(map(len, lines)) <= 100
    assert "49.0 to 94.3" in text
    assert "context_length_exceeded 1" in text
    assert "rewardbench  Chat 80.0   Chat Hard 80.0   Safety 80.0   Reasoning 80.0" in lines
    assert lines[-1].startswith("Mean 80.0 (95% interval ")
    assert lines[-1].endswith("; chance is 50.0): on 40 samples this is better than chance.")
    assert text.count("Mean") == 1


def test_the_table_shows_rmbench_styles_and_levels() -> None:
    """The matrix with its styles, and its easy, normal and hard means."""
    text = printed(summary_of("rmbench", [rmbench_row("chat/1", [[1, -1, -1], [1, 1, -1], [1, 1, 1]])]))

    assert "markdown" in text
    assert "easy 100.0, normal 100.0, hard 0.0" in text


def test_markup_in_names_is_not_interpreted() -> None:
    """A subset called [red] is shown as it is."""
    assert "[red]x[/]" in printed(summary_of("pairs", [pair("[red]x[/]", 1, 0, subset="[red]x[/]")]))


def test_a_table_without_verdicts() -> None:
    """It says so, and has no verdict."""
    last = printed(summary_of("pairs", [failed("a/0")])).splitlines()[-1]

    assert last == "No sample was judged: there are no accuracies."


def test_the_verdict_holds_the_mean_to_chance() -> None:
    """By the interval: 22 of 40 pairs show nothing, 35 do, and 5 show a judge that prefers the worse answer."""
    said = [verdict(summary_of("pairs", pairs("a", right, 40 - right))) for right in (22, 35, 5)]

    assert said == [
        "Mean 55.0 (95% interval 39.8 to 69.3; chance is 50.0): on 40 samples this is no better than chance.",
        "Mean 87.5 (95% interval 73.9 to 94.5; chance is 50.0): on 40 samples this is better than chance.",
        "Mean 12.5 (95% interval 5.5 to 26.1; chance is 50.0): on 40 samples this is worse than chance: the judge "
        "prefers the rejected answers.",
    ]


def test_the_interval_of_a_mean_has_a_width_though_all_verdicts_agree() -> None:
    """It is made of the subsets' Wilson intervals, which never collapse."""
    level = summary_of("pairs", [*pairs("a", 4, 0), *pairs("b", 4, 0)]).official

    assert level is not None
    assert (level.value, level.high) == (1.0, 1.0)
    # Two subsets of 4: the lower end of each is 0.5101, so the mean's is 1 - sqrt(2 * (0.4899 / 2)^2).
    assert level.low == pytest.approx(1 - 0.4899 / 2**0.5, abs=1e-4)


def test_chance_is_lower_where_more_answers_are_wrong() -> None:
    """One good answer among four is on top by chance in a quarter of the cases."""
    row = pair("a/0", 1, 0).model_copy(update={"rejected": [answer(0.0)] * 3, "margins": [[1.0, 1.0, 1.0]]})
    level = summary_of("pairs", [row]).accuracy

    assert level is not None
    assert level.chance == 0.25


def test_a_section_has_the_interval_of_its_subsets() -> None:
    """Of one subset its own Wilson interval; of two a narrower one than either's."""
    one = summary_of("rewardbench", pairs("hep-go", 8, 2)).levels["Reasoning"]
    two = summary_of("rewardbench", [*pairs("hep-go", 8, 2), *pairs("hep-js", 8, 2)]).levels["Reasoning"]

    assert (one.low, one.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert two.high - two.low < one.high - one.low


def test_a_mean_of_missing_sections_is_explained() -> None:
    """The verdict is then on all samples, and says so."""
    summary = summary_of("rewardbench", pairs("hep-go", 8, 2))

    assert verdict(summary).startswith("Accuracy 80.0 (95% interval 49.0 to 94.3; chance is 50.0)")
    assert next(caveats(summary)).startswith("The benchmark's own mean needs samples of every section")


def test_low_label_mass_and_position_bias_are_caveats() -> None:
    """In words, on the page and on the terminal."""
    faint = answer(1.0, label_mass=0.02)
    row = pair("a/0", faint, answer(0.0, label_mass=0.02)).model_copy(update={"flips": 1, "first_log_odds": 1.0})

    said = " ".join(printed(summary_of("pairs", [row])).split())

    assert "on average the model gave the labels 2.0% of its probability" in said
    assert "100.0% of the comparisons change their winner with the order" in said


def lines_of(*rows: Row | str) -> str:
    """What items.jsonl holds."""
    return "".join(row if isinstance(row, str) else row.model_dump_json() + "\n" for row in rows)


def test_the_last_line_of_an_id_counts(tmp_path: Path) -> None:
    """A failed sample that was asked again is the later verdict, in its first place."""
    path = tmp_path / "items.jsonl"
    path.write_text(lines_of(failed("a/0"), pair("a/1", 1, 0), pair("a/0", 1, 0)), encoding="utf-8")

    assert read_rows(path) == [pair("a/0", 1, 0), pair("a/1", 1, 0)]


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    """A killed process may leave it in the middle of a character."""
    path = tmp_path / "items.jsonl"
    path.write_bytes(lines_of(pair("a/0", 1, 0), '{"id": "a/é').encode()[:-1])

    assert read_rows(path) == [pair("a/0", 1, 0)]


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    """It is not ignored: something else wrote to the file."""
    path = tmp_path / "items.jsonl"
    path.write_text(lines_of(pair("a/0", 1, 0), '{"id": "a/1"\n', pair("a/2", 1, 0)), encoding="utf-8")

    with pytest.raises(ValueError, match=r"items\.jsonl, line 2: "):
        read_rows(path)


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path: Path) -> None:
    """U+2028 stays unescaped in JSON."""
    row = failed("a/0", "odd\u2028code")
    (tmp_path / "items.jsonl").write_text(lines_of(row, pair("a/1", 1, 0)), encoding="utf-8")

    assert read_rows(tmp_path / "items.jsonl")[0] == row


@pytest.mark.parametrize(
    ("model", "name"),
    [("org/name", "org/name"), ("/tmp/runs/judge-7", "judge-7"), ("./judge-7", "judge-7"), (None, "no one")],
)
def test_a_title_has_a_name_not_a_path(model: str | None, name: str) -> None:
    """A hub's id stays whole."""
    assert model_name(model) == name
