"""Win rates and what they are made of; two models through the whole evaluation with a service that has no model."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Judge
from client.benchmarks.results.records import Row, RowError
from service.engine.fake import FakeEngine, fake_tokenizer
from tests.support.live import Live, live_service
from tests.support.tiny import make_tiny_model
from tests.support.training import with_nan
from trainer.evaluate import main, summary_of
from trainer.evaluation.harness import HarnessOptions, choose_items, pooled
from trainer.evaluation.verdicts import Duel, Metrics, is_refusal, make_duels, measure
from trainer.evaluation.winrate import Outcome, length_controlled, mean_estimate, outcome_of, win_rate
from trainer.run.files import read_records
from trainer.run.records import Instruction, Sample
from trainer.sample import Sampled

SMALL = ["--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]
CREDITS = {"w": 1.0, "t": 0.5, "l": 0.0}


def outcomes(text: str, differences: list[int] | None = None) -> list[Outcome]:
    """Of a text of w, t and l."""
    lengths = differences or [0] * len(text)
    return [Outcome("chat", CREDITS[letter], length) for letter, length in zip(text, lengths, strict=True)]


def duel(name: str, base: str = "A base answer.", new: str = "A new answer.", category: str = "chat") -> Duel:
    """Two answers to one instruction."""
    sides = [Sample(id=name, sample=0, response=text, tokens=3, finish="stop") for text in (base, new)]
    return Duel(Instruction(id=name, prompt="Why?", category=category), *sides)


def row(name: str, margin: float, flips: int = 0) -> Row:
    """What was said of a duel."""
    answer = {"log_odds": margin / 2, "score": 0.5, "label_mass": 0.8, "length": 5}
    sides = {"chosen": answer, "rejected": {**answer, "log_odds": -margin / 2}}
    told = {"margins": [[margin]], "flips": flips, "first_log_odds": 0.5, "model": "m", "fingerprint": "f"}
    return Row.model_validate({"id": name, "subset": "chat", **sides, **told})


def failed(name: str) -> Row:
    """A duel that could not be judged."""
    return Row(id=name, subset="chat", error=RowError(code="inference_failed", message="no"))


def measured(duels: list[Duel], rows: list[Row]) -> Metrics:
    """The numbers, where both modes said the same."""
    return measure(duels, {"pairwise": rows, "pointwise": rows}, ("base", "new"), {"model": "m"})


def test_a_tie_counts_half() -> None:
    """Two wins, a tie and a loss are 2.5 of 4; the standard error is that of the mean of 1, 1, ½, 0."""
    rate = win_rate(outcomes("wwtl"))

    assert rate is not None
    assert (rate.value, rate.wins, rate.ties, rate.losses) == (0.625, 2, 1, 1)
    assert rate.standard_error == pytest.approx(math.sqrt((2 * 0.375**2 + 0.125**2 + 0.625**2) / 3 / 4))


def test_the_interval_is_wilsons() -> None:
    """7 of 10: 0.397 to 0.892 at 95% (Wilson's formula by hand)."""
    rate = win_rate(outcomes("wwwwwwwlll"))

    assert rate is not None
    assert (rate.low, rate.high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))


def test_nothing_compared_gives_no_number() -> None:
    """No win rate is made up; of a single comparison there is no standard error."""
    single = win_rate(outcomes("w"))

    assert win_rate([]) is None
    assert length_controlled([]) is None
    assert mean_estimate([]) is None
    assert single is not None
    assert single.standard_error is None


def test_log_odds_become_outcomes() -> None:
    """Above 0 a win, at 0 a tie, below a loss."""
    assert [outcome_of("chat", log_odds, 3).credit for log_odds in (0.1, 0.0, -0.1)] == [1.0, 0.5, 0.0]


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    """With nothing to control for, both rates agree (but for the weak prior)."""
    controlled = length_controlled(outcomes("w" * 70 + "l" * 30))

    assert controlled is not None
    assert controlled.value == pytest.approx(0.7, abs=1e-3)
    assert controlled.standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 100), rel=0.01)


def test_a_win_rate_that_is_length_alone_is_taken_out() -> None:
    """A model that is longer in most cases and preferred for that wins often, and half with lengths held even."""
    rng = random.Random(0)
    lengths = [rng.gauss(100, 150) for _ in range(4000)]
    sd = math.sqrt(sum((x - sum(lengths) / 4000) ** 2 for x in lengths) / 4000)
    won = [rng.random() < 1 / (1 + math.exp(-2 * math.tanh(x / sd))) for x in lengths]
    found = [Outcome("chat", float(w), round(x)) for w, x in zip(won, lengths, strict=True)]

    raw, controlled = win_rate(found), length_controlled(found)
    assert raw is not None
    assert controlled is not None
    assert controlled.standard_error is not None
    assert raw.value > 0.6
    assert abs(controlled.value - 0.5) < 3 * controlled.standard_error


def test_outcomes_that_length_separates_still_have_a_number() -> None:
    """The prior keeps the regression finite."""
    controlled = length_controlled(outcomes("wwwlll", [10, 20, 30, -10, -20, -30]))

    assert controlled is not None
    assert controlled.value == pytest.approx(0.5, abs=1e-6)


def test_who_is_longer_and_no_better_loses_when_controlled() -> None:
    """Half the wins in spite of longer answers is less than half at equal lengths, if length helps."""
    found = outcomes("wwwwwlllll" * 20, [300, 250, 200, 150, 120, 100, 60, 30, 10, -20] * 20)
    controlled = length_controlled(found)

    assert controlled is not None
    assert controlled.value < 0.3


def test_equal_answers_are_ties_and_never_asked() -> None:
    """A duel without a row counts as a tie only where both answers are the same."""
    metrics = measured([duel("1", "Same.", "Same. "), duel("2"), duel("3")], [row("3", 1.0)])

    assert metrics.pairwise is not None
    assert (metrics.pairwise.ties, metrics.compared, metrics.identical) == (1, 2, 1)


@pytest.mark.parametrize(
    ("duels", "rows"),
    [
        ([duel("1", "Same.", "Same. "), duel("2", "Same.", "Same.", category="math")], []),
        ([duel("1"), duel("2", category="math")], [row("1", 0.0), row("2", 0.0)]),
    ],
)
def test_ties_alone_are_no_win_rate(duels: list[Duel], rows: list[Row]) -> None:
    """Equal answers, or a judge that prefers none, are said to be that, and never 50% with no error."""
    metrics = measured(duels, rows)

    rates = (metrics.pairwise, metrics.both_orders, metrics.pointwise, metrics.length_controlled, metrics.gain)
    assert (rates, metrics.by_category, metrics.compared) == ((None,) * 5, {}, 2)
    assert summary_of(metrics).startswith("no win rate: in none of 2 comparisons")


def test_failures_and_empty_answers_are_in_no_rate() -> None:
    """They are counted instead."""
    duels = [duel("1"), duel("2"), duel("3", new=" ")]
    metrics = measured(duels, [row("1", 2.0), failed("2")])

    assert metrics.pairwise is not None
    assert (metrics.pairwise.count, metrics.failed, metrics.empty) == (1, 1, 1)
    assert metrics.failures["pairwise"] == {"inference_failed": 1}
    assert metrics.responses["new"].empty == 1


def test_a_winner_that_flips_with_the_order_is_a_tie_in_the_strict_rate() -> None:
    """The mean of both orders still counts in the other."""
    metrics = measured([duel("1"), duel("2")], [row("1", 2.0, flips=1), row("2", 1.0)])

    assert metrics.pairwise is not None
    assert metrics.both_orders is not None
    assert (metrics.pairwise.value, metrics.both_orders.value) == (1.0, 0.75)
    assert metrics.position is not None
    assert metrics.position.flip_rate == 0.5


def test_categories_have_rates_of_their_own() -> None:
    """Each over its own instructions."""
    duels = [duel("1", category="math"), duel("2", category="code"), duel("3", category="code")]
    metrics = measured(duels, [row("1", 1.0), row("2", -1.0), row("3", 1.0)])

    assert {name: rate.value for name, rate in metrics.by_category.items()} == {"code": 0.5, "math": 1.0}


def test_an_instruction_that_one_model_did_not_answer_is_no_duel() -> None:
    """Answers are matched by the instruction's id."""
    instructions = [Instruction(id=name, prompt="Why?") for name in "ab"]
    base = [Sample(id=name, sample=0, response="r", tokens=1, finish="stop") for name in "ba"]

    assert [one.instruction.id for one in make_duels(instructions, base, base[1:])] == ["a"]


@pytest.mark.parametrize(
    ("response", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, I won\u2019t.", True),
        ("As an AI language model, I have no opinion.", True),
        ("The capital of France is Paris.", False),
        ("Paris. " * 40 + "I cannot say more.", False),
    ],
)
def test_refusals_are_told_by_their_opening(response: str, refuses: bool) -> None:
    """A short list of phrases near the beginning."""
    assert is_refusal(response) == refuses


def test_harness_items_are_seeded_and_spread() -> None:
    """So many in all, over the sub-tasks, in ascending order; all there are where there are fewer."""
    sizes = {"one": 300, "two": 700}
    chosen = choose_items(sizes, HarnessOptions(items=100, seed=1))

    assert sum(map(len, chosen.values())) == 100
    assert (
        chosen
        == choose_items(sizes, HarnessOptions(items=100, seed=1))
        != choose_items(sizes, HarnessOptions(items=100))
    )
    assert all(items == sorted(set(items)) for items in chosen.values())
    assert choose_items({"few": 3}, HarnessOptions()) == {"few": [0, 1, 2]}


def test_harness_results_are_pooled_by_items() -> None:
    """A sub-task counts by its items; standard errors, and metrics that not all have, are left out."""
    results = {"a": {"acc,none": 1.0, "acc_stderr,none": 0.1, "f1,none": 1.0}, "b": {"acc,none": 0.0, "alias": "b"}}

    assert pooled(results, {"a": 3, "b": 1}) == {"items": 4, "acc": 0.75}


@pytest.fixture(scope="module")
def judge() -> Iterator[Live]:
    """A service with the fake engine."""
    with live_service(cache_entries=0) as live:
        yield live


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def command(tiny_model: Path, other_model: Path, judge: Live, tmp_path: Path) -> list[str]:
    """The tiny model against the other one on eight instructions, in tmp_path/out."""
    file = tmp_path / "held_out.jsonl"
    rows = [Instruction(id=f"{n}", prompt=f"What is {n}?", category=("chat", "poems")[n % 2]) for n in range(8)]
    file.write_text("".join(one.model_dump_json() + "\n" for one in rows))
    models = ["--base", str(tiny_model), "--new", str(other_model)]
    where = ["--instructions", str(file), "--out", str(tmp_path / "out"), "--judge-url", judge.url]
    return [*models, *where, *SMALL]


def metrics_of(folder: Path) -> Any:
    """What was measured."""
    return json.loads((folder / "metrics.json").read_bytes())


def asked(live: Live) -> float:
    """How many judgements the service has been asked for."""
    return sum(
        sample.value
        for metric in live.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "judge_judgements_total"
    )


def test_the_win_rate_is_what_the_judge_says(command: list[str], judge: Live, tmp_path: Path) -> None:
    """Each comparison is the service's own, in both orders, by the category's template where there is one."""
    assert main(command) == 0
    out = tmp_path / "out"
    held_out = read_records(tmp_path / "held_out.jsonl", Instruction)
    base, new = (
        {one.id: one.response for one in read_records(out / f"{side}.jsonl", Sampled)} for side in ("base", "new")
    )
    with Judge(judge.url) as client:
        found = [
            client.compare(
                one.prompt,
                [base[one.id], new[one.id]],
                mode="pairwise",
                category={"poems": "general"}.get(one.category, one.category),
            ).best
            for one in held_out
        ]

    assert metrics_of(out)["pairwise"]["wins"] == sum(found)
    assert metrics_of(out)["instructions"] == metrics_of(out)["compared"] == 8


def test_a_finished_evaluation_asks_nothing_more(command: list[str], judge: Live, tmp_path: Path) -> None:
    """Two judgements for each comparison and mode, once; lost verdicts alone are asked again."""
    before = asked(judge)
    codes = [main(command), main(command)]
    first = asked(judge) - before
    items = tmp_path / "out" / "pairwise" / "items.jsonl"
    items.write_bytes(b"".join(items.read_bytes().splitlines(keepends=True)[:5]))
    (tmp_path / "out" / "verdicts.done").rename(tmp_path / "out" / "verdicts.begun")
    again = main(command)

    assert [*codes, again] == [0, 0, 0]
    assert first == 8 * 4
    assert asked(judge) - before - first == 3 * 2


def test_a_model_against_itself_has_no_win_rate(
    command: list[str], tiny_model: Path, judge: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights and random numbers give the same answers: no judge is asked, and the summary says why."""
    before = asked(judge)
    same = Path(shutil.copytree(tiny_model, tmp_path / "same"))
    code = main([*command, "--new", str(same)])

    assert code == 0
    assert asked(judge) == before
    assert metrics_of(tmp_path / "out")["pairwise"] is None
    assert (metrics_of(tmp_path / "out")["identical"], metrics_of(tmp_path / "out")["same_weights"]) == (8, True)
    assert "has the weights of" in capsys.readouterr().err


def test_a_broken_model_is_no_contestant(
    command: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are NaN stop the evaluation at the first token: exit code 1, and no numbers."""
    code = main([*command, "--new", str(with_nan(tiny_model, tmp_path / "nan", "model.norm.weight"))])

    assert code == 1
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_another_judge_may_evaluate(command: list[str], tmp_path: Path) -> None:
    """--eval-judge-url is asked in the place of --judge-url."""
    with live_service() as other:
        code = main([*command, "--judge-url", "http://127.0.0.1:9", "--eval-judge-url", other.url])

    assert code == 0
    assert metrics_of(tmp_path / "out")["judge"]["model"] == "fake"


def test_comparisons_that_fail_are_told_and_may_be_borne(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Above --max-failures the evaluation stops; below it they are left out and counted."""
    poison = fake_tokenizer().encode("5")[0]
    with live_service(FakeEngine(poison_token=poison)) as broken:
        strict = main([*command, "--judge-url", broken.url])
        lenient = main([*command, "--judge-url", broken.url, "--max-failures", "0.9"])

    metrics = metrics_of(tmp_path / "out")
    assert (strict, lenient) == (1, 0)
    assert "--max-failures" in capsys.readouterr().err
    assert 1 <= metrics["failed"] < 8
    assert metrics["compared"] == 8 - metrics["failed"]


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--lm-eval", "all"], 2, "pip install 'lm_eval"),
        (["--new", "nowhere"], 2, "is no folder here and no hub id"),
        (["--judge-url", "http://127.0.0.1:9"], 1, "the judge at http://127.0.0.1:9 cannot be used"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_anything_is_sampled(
    more: list[str], code: int, told: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing harness, an unknown model, a judge out of reach."""
    assert main([*command, *more]) == code
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_folder_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Other settings are named."""
    codes = [main(command), main([*command, "--temperature", "0"])]

    assert codes == [0, 1]
    assert "another configuration (other temperature)" in capsys.readouterr().err
