"""The report of a run: self-contained, safe with hostile texts, and readable at every stage of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.benchmarks.report.formats import cut_text
from client.benchmarks.rows import Row
from client.labels.pairs import PairOptions
from client.labels.records import Pair, Score
from client.schema import Message
from tests.support.html import EVIL, assert_self_contained
from tests.support.rows import pair
from trainer.evaluation.metrics import measure
from trainer.evaluation.verdicts import make_duels
from trainer.labels.pairs import make_pairs
from trainer.report.evidence import MAX_TEXT, SHOWN, shown_answers
from trainer.report.page import write_run_report
from trainer.run.files import write_record, write_records
from trainer.run.records import Instruction, Sample


def response(name: str, number: int, text: str) -> Sample:
    """A response to an instruction."""
    return Sample(id=name, sample=number, response=text, tokens=5, finish="stop")


def verdict(name: str, margin: float) -> Row:
    """The judge prefers the new answer by so many log-odds."""
    return pair(name, margin / 2, -margin / 2, flips=0, first_log_odds=0.5, model=EVIL)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one whole round, with hostile texts everywhere, and a second one that has only its pairs."""
    config = {"model": EVIL, "labels": {"labeler": "ipo"}, "dpo.beta": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [f"{n}" for n in range(30)]
    instructions = [Instruction(id=name, prompt=f"{EVIL} {name}", category=EVIL) for name in names]
    write_records(tmp_path / "held_out.jsonl", instructions)
    write_records(tmp_path / "base.jsonl", [response(name, 0, f"{EVIL} old") for name in names])
    for number in (1, 2):
        add_pairs(tmp_path / f"round-{number}", instructions)
    part = tmp_path / "round-1"
    write_records(part / "new.jsonl", [response(name, 0, f"{EVIL} new") for name in names])
    add_training(part)
    rows = [verdict(name, float(name) - 9.5) for name in names]
    (part / "pairwise").mkdir()
    (part / "pairwise" / "items.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    duels = make_duels(instructions, *([response(name, 0, text) for name in names] for text in ("old", "new one")))
    metrics = measure(duels, {"pairwise": rows, "pointwise": rows}, (EVIL, EVIL), {"model": EVIL})
    write_record(part / "metrics.json", metrics.model_copy(update={"judge_is_labeler": True}))
    return tmp_path


def add_pairs(folder: Path, instructions: list[Instruction]) -> None:
    """Pairs of hostile texts, and their statistics."""
    samples = [response(one.id, k, f"{EVIL}{k}" + "long " * k * int(one.id)) for one in instructions for k in range(2)]
    scores = [Score(id=s.id, sample=s.sample, log_odds=s.sample * float(s.id), score=0.5) for s in samples]
    pairs, stats = make_pairs(instructions, samples, scores, PairOptions())
    write_records(folder / "pairs.jsonl", pairs)
    write_record(folder / "pairs_stats.json", stats)


def add_training(folder: Path) -> None:
    """A training's log and result."""
    log: list[dict[str, Any]] = [
        {"step": n, "loss": 0.7 - n / 20, "rewards/margins": n / 10, "rewards/accuracies": 0.5} for n in range(1, 6)
    ]
    log.append({"step": 5, "eval_loss": 0.6, "eval_rewards/margins": 0.2})
    (folder / "dpo_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    result = {"method": "lora", "base": EVIL, "pairs": 26, "held_out": 3, "too_long": 0, "steps": 5}
    (folder / "dpo.json").write_text(json.dumps(result))


def test_the_page_needs_nothing_from_outside(run: Path) -> None:
    """No scripts, nothing to load; references stay on the page, each to one id."""
    assert_self_contained(write_run_report(run).read_text())


def test_untrusted_texts_stay_text(run: Path) -> None:
    """Markup and template code in instructions, responses, names and settings are shown, not executed."""
    text = write_run_report(run).read_text()

    assert "{{ 7*7 }}" in text
    assert EVIL not in text


def test_each_round_is_shown(run: Path) -> None:
    """Figures of pairs, loss, rewards and win rates, with a warning that the judge also labelled."""
    text = write_run_report(run).read_text()

    assert text.count("<figure>") == 9
    assert "from 0.650 to 0.450" in text
    assert "the judge that labelled the training data" in text
    assert "20 : 0 : 10" in text


def test_a_round_that_is_not_over_says_so(run: Path) -> None:
    """It shows what there is."""
    text = write_run_report(run).read_text()

    second = text[text.index("Round 2") :]
    assert "Not evaluated, and not trained yet" in second
    assert "29 pairs of 30 instructions" in second


def test_what_failed_is_listed(run: Path) -> None:
    """The number of instructions whose two samples tie is shown."""
    text = write_run_report(run).read_text()

    assert "instructions whose samples tie</th><td>1</td>" in text


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    """Byte for byte, and a page that would not change is not written."""
    page = write_run_report(run)
    content, written = page.read_bytes(), page.stat().st_mtime_ns

    assert write_run_report(run).stat().st_mtime_ns == written
    page.unlink()
    assert write_run_report(run).read_bytes() == content


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    """Before the first round there is nothing to show, and nothing fails."""
    assert "0 rounds" in write_run_report(tmp_path).read_text()


def test_shown_answers_are_the_clearest_and_some_at_random() -> None:
    """Wins and losses with the best and the worst first, others drawn once and for all; none twice, and no ties."""
    names = [f"{n}" for n in range(50)]
    instructions = [Instruction(id=name, prompt="Why?") for name in names]
    duels = make_duels(instructions, *([response(name, 0, text) for name in names] for text in ("old", "new")))
    rows = {name: verdict(name, float(name) - 25) for name in names}
    shown = shown_answers(duels, rows)

    wins, losses, drawn = ([one.log_odds for one in answers] for answers in shown.values())
    assert wins == [24, 23, 22, 21]
    assert losses == [-25, -24, -23, -22]
    assert len(set(drawn) - set(wins) - set(losses)) == SHOWN
    assert shown_answers(duels, rows) == shown


def test_few_steps_are_a_table_not_a_plot(run: Path) -> None:
    """A plot of one dot says nothing."""
    log = run / "round-1" / "dpo_log.jsonl"
    log.write_text(json.dumps({"step": 1, "loss": 0.6931, "rewards/margins": 0.01, "rewards/accuracies": 0.5}) + "\n")
    text = write_run_report(run).read_text()

    assert "<td>0.693</td>" in text
    assert "over 1 steps" not in text


@pytest.mark.parametrize(
    ("model", "title"),
    [("/data/models/tiny/", "tiny"), ("org/model@v1", "org/model@v1"), ("smollm2-135m-instruct",) * 2],
)
def test_the_title_is_a_name(run: Path, model: str, title: str) -> None:
    """A folder is shown by its last part."""
    (run / "config.json").write_text(json.dumps({"model": model}))

    assert f"<h1>Self-improvement of {title}</h1>" in write_run_report(run).read_text()


def test_a_gain_that_cannot_be_told_from_none_is_called_that(run: Path) -> None:
    """20 wins in 30 comparisons are no evidence; the page says so, and that labeler and judge are one."""
    text = " ".join(write_run_report(run).read_text().split())

    assert "is no better than" in text
    assert "as far as can be told from 30 comparisons (66.7%, 95% interval 48.8 to 80.8)" in text
    assert "The judge of this comparison also gave the labels" in text


def test_long_texts_are_cut_where_it_shows() -> None:
    """The page says how many characters are left out."""
    assert cut_text("x" * MAX_TEXT, MAX_TEXT) == "x" * MAX_TEXT
    assert cut_text("x" * (MAX_TEXT + 1234), MAX_TEXT).endswith("x\n[… 1,234 more characters]")


def test_pairs_of_conversations_are_measured_by_their_answers(run: Path) -> None:
    """A pair's length difference is that of its last messages."""
    message = Message(role="assistant", content="Short.")
    longer = Message(role="assistant", content="Much longer.")
    only_pair = Pair(
        prompt=[Message(role="user", content="q")],
        chosen=[longer],
        rejected=[message],
        id="1",
        margin=1.0,
        score_chosen=0.7,
        score_rejected=0.5,
    )
    write_records(run / "round-2" / "pairs.jsonl", [only_pair])

    assert "Length differences, +6 characters on average" in write_run_report(run).read_text()
