"""Scores become pairs: best against worst, everything left out is counted, and training can read the files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.data_utils import is_conversational, maybe_apply_chat_template

from client.labels.candidates import KEPT_MARGIN, CandidatePair, ScoredSample, balance_lengths
from client.labels.pairs import PairOptions
from client.labels.records import FinishReason, Pair, PairStats, Score, ScoreError
from service.engine.fake import fake_tokenizer
from trainer.errors import StageError
from trainer.labels.pairs import NoPairsError, length_remark, make_pairs, write_pairs
from trainer.run.files import read_record, read_records
from trainer.run.records import Instruction, Sample

Row = tuple[str, float | str | None, FinishReason]


def case(*groups: Sequence[Row]) -> tuple[list[Instruction], list[Sample], list[Score]]:
    """One instruction per group; a row is a response, its log-odds (or error code, or None), and its finish."""
    instructions = [
        Instruction(id=f"{n}", prompt=f"Question {n}?", category=("code", "math")[n % 2]) for n in range(len(groups))
    ]
    samples, scores = [], []
    for n, group in enumerate(groups):
        for k, (response, verdict, finish) in enumerate(group):
            samples.append(Sample(id=f"{n}", sample=k, response=response, tokens=1, finish=finish))
            if isinstance(verdict, str):
                scores.append(Score(id=f"{n}", sample=k, error=ScoreError(code=verdict, message="m")))
            elif verdict is not None:
                scores.append(Score(id=f"{n}", sample=k, log_odds=verdict, score=0.5))
    return instructions, samples, scores


def row(response: str, verdict: float | str | None = 0.0, finish: FinishReason = "stop") -> Row:
    """A row of `case`."""
    return response, verdict, finish


def texts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """The chosen and the rejected response of each pair."""
    return [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]


def made(*groups: Sequence[Row], **options: Any) -> tuple[list[tuple[str, str]], PairStats]:
    """The texts of the pairs, and the statistics."""
    pairs, stats = make_pairs(*case(*groups), PairOptions(**options))
    return texts(pairs), stats


def test_the_best_meets_the_worst() -> None:
    """Log-odds decide, because saturated scores are all equal."""
    instructions, samples, _ = case([row("a"), row("b"), row("c")])
    scores = [Score(id="0", sample=k, log_odds=40.0 + k, score=1.0) for k in (2, 0, 1)]
    (pair,), _ = make_pairs(instructions, samples, scores, PairOptions())

    assert texts([pair]) == [("c", "a")]
    assert pair.margin == 2.0
    assert (pair.id, pair.category, pair.prompt[0].role, pair.prompt[0].content) == ("0", "code", "user", "Question 0?")
    assert (pair.chosen[0].role, pair.rejected[0].role) == ("assistant", "assistant")


def test_the_order_of_the_lines_does_not_matter() -> None:
    """A resumed run, with lines in another order, has the same pairs; of two scores of a sample the later counts."""
    rng = random.Random(0)
    group = [row(f"r{k}", rng.choice([0.0, 1.0, 2.0])) for k in range(4)]
    instructions, samples, scores = case(group, group[::-1], [*group, row("r0 ", 5.0)])
    shuffled = random.Random(1).sample(scores, len(scores))
    before = [Score(id="0", sample=0, log_odds=99.0, score=0.5)]

    for options in (PairOptions(), PairOptions(length_balance=True)):
        expected = make_pairs(instructions, samples, scores, options)
        assert make_pairs(instructions, samples[::-1], [*before, *shuffled], options) == expected


def test_ties_and_small_margins_make_no_pair() -> None:
    """Both are counted; the share of ties is taken of the instructions with comparable samples."""
    pairs, stats = made(
        [row("a", 1.0), row("b", 1.0)],
        [row("a", 1.0), row("b", 1.4)],
        [row("a", 1.0), row("b", 1.5)],
        [row("a", 1.0)],
        min_margin=0.5,
    )

    assert pairs == [("b", "a")]
    assert (stats.ties, stats.below_margin, stats.too_few, stats.pairs) == (1, 1, 1, 1)
    assert stats.tie_share == pytest.approx(1 / 3)


def test_unusable_samples_are_left_out_and_counted() -> None:
    """Failed, unscored, empty and repeated samples are counted; the rest is paired."""
    pairs, stats = made(
        [
            row("good", 2.0),
            row(" good\n", 2.0),
            row("bad", -1.0),
            row("failed", "inference_failed"),
            row("unscored", None),
            row(" ", "empty_response"),
        ]
    )

    assert pairs == [("good", "bad")]
    assert (stats.samples, stats.usable) == (6, 2)
    assert (stats.failed, stats.unscored, stats.empty, stats.duplicates) == (1, 1, 1, 1)
    assert stats.failures == {"inference_failed": 1}


CUT = [row("half", 3.0, "length"), row("whole", 1.0), row("poor", 0.0), row("poor half", -1.0, "length")]


@pytest.mark.parametrize(
    ("policy", "expected", "cut_off", "chosen_cut_off"),
    [
        ("reject-only", ("whole", "poor half"), 0, 0),
        ("keep", ("half", "poor half"), 0, 1),
        ("drop", ("whole", "poor"), 2, 0),
    ],
)
def test_cut_off_responses(policy: Any, expected: tuple[str, str], cut_off: int, chosen_cut_off: int) -> None:
    """By default they may be rejected but not chosen; they can also be treated like others, or dropped."""
    pairs, stats = made(CUT, cut_off=policy)

    assert pairs == [expected]
    assert (stats.cut_off, stats.chosen_cut_off, stats.cut_off_share) == (cut_off, chosen_cut_off, 0.5)


def test_only_finished_responses_are_chosen() -> None:
    """If all were cut off, or the only finished one is the worst, there is no pair."""
    pairs, stats = made([row("a", 1.0, "length"), row("b", 2.0, "length")], [row("a", 1.0), row("b", 2.0, "length")])

    assert not pairs
    assert (stats.unfinished, stats.below_margin) == (1, 1)


def test_equal_margins_prefer_the_finished_response() -> None:
    """Among finished responses the earlier one is chosen."""
    pairs, _ = made([row("cut", 1.0, "length"), row("first", 1.0), row("second", 1.0), row("bad", 0.0)], cut_off="keep")

    assert pairs == [("first", "bad")]


def test_statistics_describe_the_pairs() -> None:
    """Margins, lengths and categories are those of the pairs."""
    _, stats = made(
        [row("aaaa", 2.0), row("b", 0.0)],
        [row("a", 4.0), row("bb", 0.0)],
        [row("aa", 1.0), row("bb", 0.0)],
        [row("a", 0.0), row("b", 0.0)],
    )

    assert (stats.margin_mean, stats.margin_median) == (pytest.approx(7 / 3), 2.0)
    assert stats.length_difference == pytest.approx(2 / 3)
    assert stats.chosen_longer == pytest.approx(0.5)
    assert stats.margins.edges[0] == 0.0
    assert stats.margins.edges[-1] == 4.0
    assert [index for index, count in enumerate(stats.margins.counts) if count] == [5, 10, 19]
    assert {name: (one.instructions, one.pairs) for name, one in stats.by_category.items()} == {
        "code": (2, 2),
        "math": (2, 1),
    }


verdicts = st.one_of(st.none(), st.just("bad_label"), st.integers(-3, 3).map(float))
rows = st.tuples(st.sampled_from(["", "a", "bb", "ccc", "dddd"]), verdicts, st.sampled_from(["stop", "length"]))


@given(
    st.lists(st.lists(rows, min_size=1, max_size=5), max_size=5),
    st.sampled_from(["reject-only", "keep", "drop"]),
    st.floats(0, 3),
    st.booleans(),
)
def test_every_sample_and_instruction_is_accounted_for(
    groups: list[list[Row]], cut_off: Any, min_margin: float, length_balance: bool
) -> None:
    """The counts add up whatever the samples, and every pair obeys the options."""
    options = PairOptions(min_margin, cut_off, length_balance)
    pairs, stats = make_pairs(*case(*groups), options)

    left_out = stats.failed + stats.unscored + stats.empty + stats.cut_off + stats.duplicates
    assert stats.samples == sum(map(len, groups)) == stats.usable + left_out
    assert stats.instructions == len(groups)
    assert stats.instructions == stats.pairs + stats.too_few + stats.unfinished + stats.ties + stats.below_margin
    assert len(pairs) == stats.pairs == sum(stats.margins.counts)
    assert all(pair.margin >= min_margin and pair.margin > 0 for pair in pairs)


def by_length(count: int) -> dict[str, list[CandidatePair]]:
    """Candidates of a judge that prefers long responses."""
    rng = random.Random(3)
    candidates = {}
    for n in range(count):
        scored = []
        for k in range(4):
            length = rng.randint(10, 400)
            sample = Sample(id=f"{n}", sample=k, response="x" * length, tokens=1, finish="stop")
            scored.append(ScoredSample(sample, length / 150 + rng.gauss(0, 2), 0.5))
        pairs = [CandidatePair(a, b) for a in scored for b in scored if a.log_odds > b.log_odds]
        candidates[f"{n}"] = sorted(pairs, key=lambda pair: -pair.margin)
    return candidates


def mean_difference(pairs: dict[str, CandidatePair]) -> float:
    """The mean of chosen minus rejected, in characters."""
    return fmean(pair.length_difference for pair in pairs.values())


def test_the_best_can_meet_the_middle() -> None:
    """Of four responses the best meets the third; of two the other."""
    four, two = (make_pairs(*ranked(count), PairOptions(rejected="middle"))[0][0] for count in (4, 2))

    assert [four.chosen[0].content, four.rejected[0].content] == ["text 3", "text 1"]
    assert [two.chosen[0].content, two.rejected[0].content] == ["text 1", "text 0"]


def ranked(count: int) -> tuple[list[Instruction], list[Sample], list[Score]]:
    """One instruction whose responses get better with their number."""
    samples = [Sample(id="a", sample=n, response=f"text {n}", tokens=2, finish="stop") for n in range(count)]
    scores = [Score(id="a", sample=n, log_odds=float(n), score=0.5) for n in range(count)]
    return [Instruction(id="a", prompt="Why?")], samples, scores


def test_length_balance_evens_out_the_lengths() -> None:
    """Chosen responses that were much longer on average no longer are, and margins stay wide."""
    candidates = by_length(200)
    widest = {name: pairs[0] for name, pairs in candidates.items()}

    balanced = balance_lengths(candidates)

    assert mean_difference(widest) > 50
    assert abs(mean_difference(balanced)) < 3
    assert all(balanced[name].margin >= KEPT_MARGIN * widest[name].margin for name in widest)
    assert sum(pair.margin for pair in balanced.values()) > 0.8 * sum(pair.margin for pair in widest.values())


def test_length_balance_works_both_ways() -> None:
    """A judge that prefers short responses is balanced too."""
    short = {
        name: sorted(
            (
                CandidatePair(
                    ScoredSample(one.rejected.sample, -one.rejected.log_odds, 0.5),
                    ScoredSample(one.chosen.sample, -one.chosen.log_odds, 0.5),
                )
                for one in pairs
            ),
            key=lambda pair: -pair.margin,
        )
        for name, pairs in by_length(200).items()
    }

    assert abs(mean_difference(balance_lengths(short))) < 3
    assert balance_lengths({}) == {}


def test_no_pairs_is_an_error_that_explains_itself(tmp_path: Path) -> None:
    """It says what became of the samples and the instructions, and the statistics are on disk."""
    with pytest.raises(NoPairsError, match=r"no usable pairs: of 4 samples 1 could not be scored; of 2 instructions"):
        write_pairs(tmp_path, *case([row("a", 1.0), row("b", 1.0)], [row("a", "e"), row("b", 1.0)]), PairOptions())

    stats = read_record(tmp_path / "pairs_stats.json", PairStats)
    assert (stats.ties, stats.too_few) == (1, 1)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_negative_margin_is_refused() -> None:
    """It would choose the worse response."""
    with pytest.raises(ValueError, match="minimum margin"):
        PairOptions(min_margin=-1.0)


def test_a_sample_of_no_instruction_is_an_error() -> None:
    """Files of different runs cannot be combined."""
    _, samples, scores = case([row("a", 1.0), row("b", 2.0)])

    with pytest.raises(StageError, match="belongs to no instruction"):
        make_pairs([], samples, scores, PairOptions())


def test_the_file_is_what_trl_trains_on(tmp_path: Path) -> None:
    """`datasets` reads it, and TRL recognises conversational preference data and applies the chat template."""
    write_pairs(
        tmp_path, *case([row("good\u2028one", 1.0), row("bad", 0.0)], [row("c", 1.0), row("d", 2.0)]), PairOptions()
    )
    data = Dataset.from_json(str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    rendered = maybe_apply_chat_template(data[0], fake_tokenizer())

    assert is_conversational(data[0])
    assert data.column_names[:3] == ["prompt", "chosen", "rejected"]
    assert data["margin"][:] == [1.0, 1.0]
    assert rendered["prompt"].endswith("Question 0?<|im_end|>\n<|im_start|>assistant\n")
    assert rendered["chosen"] == "good\u2028one<|im_end|>\n"
    assert len(read_records(tmp_path / "pairs.jsonl", Pair)) == 2


def test_pairs_that_teach_a_length_say_so() -> None:
    """Responses that were cut off are only ever rejected, which teaches to be brief; even pairs say nothing."""
    brief = made(*[[row("ends", 1.0), row("goes on and on", 0.0, "length")]] * 12)[1]
    long = made(*[[row("a longer one", 2.0), row("brief", 1.0)]] * 12)[1]
    even = made(*[[row("a longer one", 2.0), row("brief", 1.0)], [row("a longer one", 1.0), row("brief", 2.0)]] * 6)[1]

    assert length_remark(even) is None
    assert "is the longer one in 100% of the pairs, by 7 characters" in (length_remark(long) or "")
    assert "--length-balance" in (length_remark(long) or "")
    assert "is the shorter one in 100% of the pairs, by 10 characters" in (length_remark(brief) or "")
    assert "50% of the samples were cut off, which can only be rejected" in (length_remark(brief) or "")
