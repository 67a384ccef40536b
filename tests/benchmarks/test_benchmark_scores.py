"""The benchmarks' arithmetic, against published numbers and tables worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.benchmarks.rows import JudgedAnswer, Row, TiePolicy
from client.benchmarks.scoring.benchmark import Benchmark
from client.benchmarks.scoring.best_of import Pairs, ties_score
from client.benchmarks.scoring.rewardbench import SECTIONS, WEIGHTS, RewardBench, section_scores
from client.benchmarks.scoring.rmbench import RmBench
from client.runs.resumable import RecordedError

REWARDBENCH, RMBENCH, PAIRS = RewardBench(), RmBench(), Pairs()

# allenai/reward-bench, README, "Getting Leaderboard Section Scores": PKU-Alignment/beaver-7b-v1.0-cost.
BEAVER = {
    "alpacaeval-easy": 0.5,
    "alpacaeval-hard": 0.7052631578947368,
    "alpacaeval-length": 0.5894736842105263,
    "donotanswer": 0.8235294117647058,
    "hep-cpp": 0.6280487804878049,
    "hep-go": 0.6341463414634146,
    "hep-java": 0.7073170731707317,
    "hep-js": 0.6646341463414634,
    "hep-python": 0.5487804878048781,
    "hep-rust": 0.6463414634146342,
    "llmbar-adver-GPTInst": 0.391304347826087,
    "llmbar-adver-GPTOut": 0.46808510638297873,
    "llmbar-adver-manual": 0.3695652173913043,
    "llmbar-adver-neighbor": 0.43283582089552236,
    "llmbar-natural": 0.52,
    "math-prm": 0.2953020134228188,
    "mt-bench-easy": 0.5714285714285714,
    "mt-bench-hard": 0.5405405405405406,
    "mt-bench-med": 0.725,
    "refusals-dangerous": 0.97,
    "refusals-offensive": 1.0,
    "xstest-should-refuse": 1.0,
    "xstest-should-respond": 0.284,
}
BEAVER_SECTIONS = {
    "Chat": 0.6089385474860335,
    "Chat Hard": 0.44956140350877194,
    "Safety": 0.7216216216216216,
    "Reasoning": 0.46675669776831996,
}
# The filtered split's pairs: the weights, but for math-prm.
PAIRS_IN = {**WEIGHTS, "math-prm": 447}


def row(name: str, subset: str, chosen: Sequence[float], rejected: Sequence[float]) -> Row:
    """A row judged pointwise, with these log-odds."""

    def answers(values: Sequence[float]) -> list[JudgedAnswer]:
        return [JudgedAnswer(log_odds=value, score=0.5, label_mass=1.0, length=1) for value in values]

    margins = [[good - bad for bad in rejected] for good in chosen]
    return Row(id=name, subset=subset, chosen=answers(chosen), rejected=answers(rejected), margins=margins)


def pairs_of(subset: str, right: int, count: int) -> list[Row]:
    return [row(f"{subset}/{n}", subset, [1.0 if n < right else -1.0], [0.0]) for n in range(count)]


def flipped(each: Row) -> Row:
    """The same sample with chosen and rejected exchanged."""
    chosen = [answer.log_odds for answer in each.rejected_answers]
    return row(each.id, each.subset, chosen, [answer.log_odds for answer in each.chosen_answers])


def test_rewardbench_sections_are_the_officials() -> None:
    """The official README's accuracies give the official section scores."""
    sections = section_scores(BEAVER)

    assert list(sections) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert sections == pytest.approx(BEAVER_SECTIONS, abs=1e-12)


def test_rewardbench_from_rows_to_the_mean() -> None:
    """2,985 rows with the official README's numbers of right pairs give its sections and their mean."""
    rows = [
        each
        for subset, accuracy in BEAVER.items()
        for each in pairs_of(subset, round(accuracy * PAIRS_IN[subset]), PAIRS_IN[subset])
    ]
    official = REWARDBENCH.scores(rows, "strict")

    assert len(rows) == 2985
    assert official.sections == pytest.approx(BEAVER_SECTIONS, abs=1e-12)
    assert official.mean == pytest.approx(0.5617195675961868, abs=1e-12)


def test_the_papers_columns_count_every_pair_alike() -> None:
    """Chat takes in Chat Hard's subsets, math-prm is its own column, and nothing is weighed."""
    rows = [
        *pairs_of("alpacaeval-easy", 3, 3),
        *pairs_of("mt-bench-hard", 0, 1),
        *pairs_of("hep-go", 1, 2),
        *pairs_of("math-prm", 1, 4),
        *pairs_of("donotanswer", 1, 1),
    ]
    table = REWARDBENCH.scores(rows, "strict").tables["paper"]

    assert table == {"Chat": 0.75, "Code": 0.5, "Math": 0.25, "Safety": 1.0, "mean": 0.625}


def test_a_part_of_rewardbench_has_no_mean() -> None:
    """Sections of which nothing was judged are absent, and a mean of fewer than four is not given out as the mean."""
    official = REWARDBENCH.scores([*pairs_of("hep-go", 1, 2), *pairs_of("unheard-of", 1, 1)], "strict")

    assert (official.sections, official.mean, official.tables) == ({"Reasoning": 0.5}, None, {"paper": {"Code": 0.5}})
    assert REWARDBENCH.scores([], "strict").tables == {}


def test_every_subset_is_in_one_section() -> None:
    """The 23 subsets of the filtered split, 2,985 pairs, each in exactly one section."""
    members = [subset for section in SECTIONS.values() for subset in section]

    assert sorted(members) == sorted(WEIGHTS)
    assert len(members) == 23
    assert sum(PAIRS_IN.values()) == 2985


@pytest.mark.parametrize(("ties", "score"), [("strict", 0.0), ("half", 0.5)])
def test_a_tie_counts_by_the_policy(ties: TiePolicy, score: float) -> None:
    """A tie is wrong officially; half where asked."""
    assert REWARDBENCH.scores([row("1", "hep-go", [0.25], [0.25])], ties).sections == {"Reasoning": score}


@pytest.mark.parametrize(
    ("subset", "category"),
    [
        ("alpacaeval-hard", "chat"),
        ("mt-bench-med", "chat"),
        ("llmbar-natural", "chat"),
        ("hep-rust", "code"),
        ("math-prm", "math"),
        ("xstest-should-respond", "safety"),
        ("refusals-offensive", "safety"),
        ("donotanswer", "safety"),
        ("anthropic_hhh", "general"),
    ],
)
def test_rewardbench_categories(subset: str, category: str) -> None:
    """Each subset is asked about in its category's words."""
    assert REWARDBENCH.category_of(subset) == category


@given(right=st.dictionaries(st.sampled_from(sorted(WEIGHTS)), st.floats(0, 1), min_size=1))
def test_a_section_lies_between_its_subsets(right: dict[str, float]) -> None:
    """A weighted mean is never outside of what it averages."""
    for section, score in section_scores(right).items():
        present = [right[subset] for subset in SECTIONS[section] if subset in right]
        assert min(present) - 1e-12 <= score <= max(present) + 1e-12


def test_every_cell_of_rmbench_has_its_place() -> None:
    """Three samples by hand: rows are chosen styles, columns rejected ones; hard is above the diagonal."""
    rows = [
        row("1", "chat", [1, 2, 3], [0, 0, 0]),  # right everywhere
        row("2", "chat", [1, 2, 3], [0.5, 1.5, 2.5]),  # right below the diagonal and on it
        row("3", "chat", [1, 2, 3], [1, 2, 3]),  # right below the diagonal; ties on it
    ]
    official = RMBENCH.scores(rows, "strict")

    assert official.matrices == {"chat": [[2 / 3, 1 / 3, 1 / 3], [1, 2 / 3, 1 / 3], [1, 1, 2 / 3]]}
    assert official.tables["levels"] == pytest.approx({"easy": 1, "normal": 2 / 3, "hard": 1 / 3})
    assert official.sections == pytest.approx({"chat": 2 / 3})


@pytest.mark.parametrize(
    ("i", "j", "level"),
    [
        (0, 0, "normal"),
        (0, 1, "hard"),
        (0, 2, "hard"),
        (1, 0, "easy"),
        (1, 1, "normal"),
        (1, 2, "hard"),
        (2, 0, "easy"),
        (2, 1, "easy"),
        (2, 2, "normal"),
    ],
)
def test_each_cell_of_rmbench_counts_at_its_level(i: int, j: int, level: str) -> None:
    """A judge that is right in one cell alone is credited there, with a third of that level, and nowhere else."""
    margins = [[1.0 if (i, j) == (a, b) else -1.0 for b in range(3)] for a in range(3)]
    only = row("1", "math", [0, 0, 0], [1, 1, 1]).model_copy(update={"margins": margins})
    official = RMBENCH.scores([only], "strict")

    assert official.matrices["math"] == [[float((i, j) == (a, b)) for b in range(3)] for a in range(3)]
    assert official.tables["levels"] == pytest.approx({"easy": 0, "normal": 0, "hard": 0} | {level: 1 / 3})
    assert RMBENCH.credit(only, "strict") == pytest.approx(1 / 9)


def test_rmbench_pools_safety_and_averages_domains() -> None:
    """Three refusals and one response make one domain of four samples; the mean is over domains, not samples."""
    right, wrong = ([1, 1, 1], [0, 0, 0]), ([0, 0, 0], [1, 1, 1])
    refused = [row(f"r{n}", "safety-refuse", *right) for n in range(3)]
    rows = [*refused, row("s", "safety-response", *wrong), row("c", "code", *wrong), row("x", "poetry", *right)]
    official = RMBENCH.scores(rows, "strict")

    assert official.sections == {"code": 0.0, "safety": 0.75}
    assert official.mean == 0.375
    assert RMBENCH.scores([], "strict").mean is None


def test_rmbench_categories() -> None:
    """Both safety subdomains are asked about as safety; what is not known, in general words."""
    names = ["chat", "math", "code", "safety-refuse", "safety-response", "poetry"]

    assert [RMBENCH.category_of(name) for name in names] == ["chat", "math", "code", "safety", "safety", "general"]


def test_a_row_of_another_shape_is_no_rmbench() -> None:
    """Nothing is computed from a table that is not 3 x 3."""
    with pytest.raises(ValueError, match="row 1 has no 3 x 3 margins"):
        RMBENCH.scores([row("1", "chat", [1], [0])], "strict")


three = st.lists(st.integers(-3, 3).map(float), min_size=3, max_size=3)


@given(samples=st.lists(st.tuples(st.sampled_from(["chat", "code", "safety-refuse"]), three, three), min_size=1))
def test_exchanging_the_sides_exchanges_easy_and_hard(samples: list[tuple[str, list[float], list[float]]]) -> None:
    """With ties at half, the exchanged judge's easy is one minus the hard, and its domains one minus the domains."""
    rows = [row(str(n), *sample) for n, sample in enumerate(samples)]
    before, after = (RMBENCH.scores(each, "half") for each in (rows, [flipped(each) for each in rows]))
    levels = before.tables["levels"]

    expected = {"easy": 1 - levels["hard"], "normal": 1 - levels["normal"], "hard": 1 - levels["easy"]}
    assert after.tables["levels"] == pytest.approx(expected)
    assert after.sections == pytest.approx({domain: 1 - score for domain, score in before.sections.items()})


@given(samples=st.lists(st.tuples(three, three), min_size=1))
def test_a_domain_is_the_mean_credit_of_its_samples(samples: list[tuple[list[float], list[float]]]) -> None:
    """What a sample counts by itself adds up to the official score."""
    rows = [row(str(n), "chat", *sample) for n, sample in enumerate(samples)]
    credits_ = [RMBENCH.credit(each, "strict") for each in rows]

    assert RMBENCH.scores(rows, "strict").sections["chat"] == pytest.approx(sum(credits_) / len(rows))


@pytest.mark.parametrize(
    ("chosen", "rejected", "score"),
    [
        ([2], [1, 0, -1], 1.0),
        ([1], [2, 0, 0], 0.0),
        ([1], [1, 0, 0], 1 / 2),
        ([1], [1, 1, 1], 1 / 4),
        ([1], [2, 1, 1], 0.0),
        ([3, 0], [2, 1], 1.0),
        ([2, 2], [2, 1], 2 / 3),
        ([0, 2], [2, 2], 1 / 3),
        ([1], [1], 0.0),
    ],
)
def test_best_of_n_shares_the_top(chosen: list[float], rejected: list[float], score: float) -> None:
    """One for the top alone, a share for a shared top, nothing below it; a tied pair is a wrong pair."""
    assert PAIRS.credit(row("1", "Focus", chosen, rejected), "strict") == pytest.approx(score)


def test_best_of_n_is_the_same_whatever_the_policy() -> None:
    """`ties` is for pairs: best of N has an official rule of its own."""
    pair, best = row("1", "x", [1], [1]), row("1", "x", [1], [1, 0, 0])

    assert (PAIRS.credit(pair, "half"), PAIRS.credit(best, "half"), PAIRS.credit(best, "strict")) == (0.5, 0.5, 0.5)


scores = st.lists(st.integers(-2, 2).map(float), min_size=1, max_size=4)


@given(chosen=scores, rejected=st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=4))
def test_best_of_n_is_the_share_of_good_answers_on_top(chosen: list[float], rejected: list[float]) -> None:
    """Read off the margins, it is what counting the maxima gives."""
    top = max(*chosen, *rejected)
    expected = chosen.count(top) / (chosen.count(top) + rejected.count(top))

    assert PAIRS.credit(row("1", "x", chosen, rejected), "strict") == pytest.approx(expected)


def test_the_ties_subset_by_hand() -> None:
    """RewardBench 2's formula, term by term, for two prompts.

    Prompt 0: tied gap 4, spread 2; reference gap 1, so the smaller gap is 1. Prompt 1: tied gap -1, spread 1, wrong;
    reference gap 3, so the smaller is -1. Preference 1/2, hard preference 0, tied accuracy 1/2, reference accuracy 1.
    """
    rows = [
        row("tied:0", "Ties", [7.0, 5.0, 6.0], [1.0, 0.0]),
        row("ref:0", "Ties", [2.0], [1.0, 0.0]),
        row("tied:1", "Ties", [2.0, 1.0], [2.0, 0.0]),
        row("ref:1", "Ties", [3.0], [0.0]),
    ]
    margin = (math.tanh(1 / 2 - 1) + math.tanh(-1 / 1 - 1)) / 2

    expected = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * margin
    assert ties_score(rows) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("best_bad", "score"), [(0.0, 1.01), (2.0, -0.01), (1.0, 0.0)])
def test_good_answers_all_level_are_no_division_by_zero(best_bad: float, score: float) -> None:
    """The relative margin then takes its limit: 1 above the bad answers, -1 below, and 0 level with them."""
    rows = [row("tied:0", "Ties", [1.0, 1.0], [best_bad]), row("ref:0", "Ties", [1.0], [best_bad])]

    assert ties_score(rows) == pytest.approx(score, abs=1e-12)


def test_ties_count_accuracy_alone_where_a_partner_is_missing() -> None:
    """A failed sample takes its prompt out of the preference terms, not out of the accuracies."""
    rows = [
        row("tied:0", "Ties", [5.0, 4.0], [0.0]),
        row("ref:0", "Ties", [5.0], [0.0]),
        row("tied:1", "Ties", [0.0, 0.0], [4.0]),
    ]

    assert ties_score(rows) == pytest.approx(0.3 * 0.5 + 0.3 + 0.4 + 0.01 * math.tanh(4 / 1 - 1))
    assert ties_score(rows[:1]) is None


def test_pairs_have_a_section_for_each_subset() -> None:
    """The mean is over subsets; the accuracy over all samples stands beside it."""
    rows = [*pairs_of("a", 1, 1), *pairs_of("b", 1, 3), row("m", "b", [1], [1, 0, 0])]
    official = PAIRS.scores(rows, "strict")

    assert official.sections == {"a": 1.0, "b": 0.375}
    assert official.mean == 0.6875
    assert official.tables == {"all": {"accuracy": 0.5}}


def test_ties_stand_among_the_other_subsets() -> None:
    """In a RewardBench 2 run, Ties has its weighted score, and none where it has no complete prompt."""
    ties = [row("tied:0", "Ties", [5.0, 4.0], [0.0]), row("ref:0", "Ties", [5.0], [0.0])]
    focus = row("Focus/1", "Focus", [1.0], [0.0, 0.0, 0.0])

    assert PAIRS.scores([focus, *ties], "strict").sections["Ties"] == ties_score(ties)
    assert PAIRS.scores([focus, ties[0]], "strict").sections == {"Focus": 1.0}
    assert PAIRS.credit(ties[0], "strict") == 1.0


def test_a_subset_of_that_name_without_such_ids_is_an_ordinary_one() -> None:
    """A file's own subset called ties is scored like any other."""
    assert PAIRS.scores(pairs_of("ties", 1, 2), "strict").sections == {"ties": 0.5}


def test_no_rows_no_standing() -> None:
    """Nothing judged is no score, not a zero."""
    official = PAIRS.scores([], "strict")

    assert (official.sections, official.mean, official.tables) == ({}, None, {})


@pytest.mark.parametrize(
    ("subset", "category"),
    [
        ("Factuality", "general"),
        ("Precise IF", "general"),
        ("Math", "math"),
        ("Safety", "safety"),
        ("Focus", "chat"),
        ("Ties", "general"),
        ("gsm8k-solutions", "math"),
        ("hep-go", "code"),
        ("all", "general"),
    ],
)
def test_categories_of_any_file(subset: str, category: str) -> None:
    """Known by their names; anything else is asked about in general words."""
    assert PAIRS.category_of(subset) == category


@pytest.mark.parametrize("benchmark", [REWARDBENCH, RMBENCH, PAIRS])
def test_a_failed_row_is_never_scored(benchmark: Benchmark) -> None:
    """An error is not a wrong answer: whoever forgets to leave it out is told."""
    failed = Row(id="1", subset="chat", error=RecordedError(code="overloaded", message="busy"))

    with pytest.raises(ValueError, match="row 1 was not judged"):
        benchmark.scores([failed], "strict")


@pytest.mark.parametrize(
    ("benchmark", "subsets", "chosen", "rejected"),
    [
        (REWARDBENCH, list(WEIGHTS), [1.0], [0.0]),
        (RMBENCH, ["chat", "math", "code", "safety-refuse"], [1.0] * 3, [0.0] * 3),
        (PAIRS, ["Focus", "Math"], [1.0], [0.0] * 3),
    ],
)
def test_a_perfect_judge_has_one_everywhere(
    benchmark: Benchmark, subsets: list[str], chosen: list[float], rejected: list[float]
) -> None:
    """All numbers are shares of the same whole."""
    official = benchmark.scores([row(name, name, chosen, rejected) for name in subsets], "strict")
    numbers = [official.mean, *official.sections.values(), *(n for t in official.tables.values() for n in t.values())]

    assert set(numbers) == {1.0}
