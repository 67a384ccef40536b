"""The benchmark of typed decisions: which questions it asks, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.decision_speed import Way, measure
from bench.decision_speed import main as time_ways
from bench.decisions import main
from bench.support.decision_items import LEVELS, NO, YES, Asked, half_of, load_items
from bench.support.decision_measures import Answered, figures
from tests.support.live import live_service


def write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(number: int, subset: str = "gsm8k-solutions") -> dict[str, Any]:
    """A prompt with two answers."""
    return {
        "id": f"{subset}/{number}",
        "subset": subset,
        "prompt": f"{number} + 1?",
        "chosen": f" {number + 1}",
        "rejected": "0",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a few lines of each file."""
    listed = [
        {"id": f"snarks/{n}", "task": "snarks", "input": f"Which, {n}?\nOptions:\n(A) this\n(B) that", "target": "(B)"}
        for n in range(20)
    ]
    yes_no = [
        {"id": f"navigate/{n}", "task": "navigate", "input": f"Go {n}.\nOptions:\n- Yes\n- No", "target": "Yes"}
        for n in range(20)
    ]
    free = {"id": "word_sorting/0", "task": "word_sorting", "input": "b a", "target": "a b"}
    topics = ("code", "math", "safety", "general", "chat")
    write(tmp_path, "bbh_540.jsonl", [*listed, *yes_no, free])
    write(tmp_path, "gsm8k_pairs_dev.jsonl", [pair(n) for n in range(20)])
    write(tmp_path, "rewardbench_dev.jsonl", [pair(n, "llmbar-natural") for n in range(20)] + [pair(0, "hep-go")])
    instructions = [{"id": f"{t}/{n}", "prompt": f"{t} {n}", "category": t} for t in topics for n in range(20)]
    write(tmp_path, "instructions.jsonl", instructions)
    return tmp_path


def test_the_halves_share_no_prompt_and_leave_none_out(data: Path) -> None:
    """Every group of items is in exactly one half."""
    dev = {item.group for item in load_items("dev", data=data)}
    report = {item.group for item in load_items("report", data=data)}

    assert not dev & report
    assert {f"snarks/{n}" for n in range(20)} | {f"gsm8k-solutions/{n}" for n in range(20)} <= dev | report


def test_questions_without_a_known_answer_are_left_out(data: Path) -> None:
    """BBH's free answers, and RewardBench's code."""
    groups = {item.group for half in ("dev", "report") for item in load_items(half, data=data)}

    assert not groups & {"word_sorting/0", "hep-go/0"}


def test_a_limit_counts_the_prompts_of_each_part(data: Path) -> None:
    """Both answers to a prompt come or stay together, with the choice between them."""
    items = load_items("report", 2, data)

    assert [len(item.asked) for item in items if item.group.startswith("gsm8k")] == [1, 2, 2] * 2
    assert len({item.group for item in items}) == 2 * 5


def test_the_options_of_bbh_keep_their_order_and_leave_the_input(data: Path) -> None:
    """The wire shows them again."""
    item = next(item for item in load_items(half_of("Which, 3?"), data=data) if item.group == "snarks/3")

    assert item.input == "Which, 3?"
    assert item.asked == (Asked("choice", "bbh", "What is the answer?", ("this", "that"), (), 1),)


def test_the_better_answer_stands_in_either_place(data: Path) -> None:
    """And the index of the right option follows it."""
    items = [item for half in ("dev", "report") for item in load_items(half, data=data)]
    choices = [asked for item in items for asked in item.asked if asked.kind == "choice" and asked.task == "gsm8k"]

    assert {choice.right for choice in choices} == {0, 1}
    assert all(choice.options[choice.right or 0] != "0" for choice in choices)


def predicted(yes: float, right: int, better: bool | None = None, group: str = "g") -> Answered:
    """A predicate's answer."""
    return Answered(group, Asked("predicate", "t", "?", right=right, better=better), (yes, 1 - yes), 0.9)


def test_certain_and_right_predicates_have_no_error() -> None:
    """And those that are certain and wrong have nothing else."""
    right = figures([predicted(1.0, YES), predicted(0.0, NO)])
    wrong = figures([predicted(0.0, YES), predicted(1.0, NO)])

    assert right.accuracy
    assert wrong.accuracy
    assert (right.accuracy.value, right.ece.value, right.brier.value) == (1.0, 0.0, 0.0)
    assert (wrong.accuracy.value, wrong.ece.value, wrong.brier.value) == (0.0, 1.0, 1.0)


def test_an_undecided_predicate_is_not_right() -> None:
    """Whatever the truth is: nothing is gained by saying nothing."""
    found = figures([predicted(0.5, YES), predicted(0.5, NO)])

    assert found.accuracy
    assert found.accuracy.value == 0.0
    assert found.brier.value == found.chance_brier == 0.25


def test_a_choice_is_held_against_the_probability_of_what_it_chose() -> None:
    """Three options, the second one chosen at 0.6, once rightly."""
    asked = [Asked("choice", "t", "?", ("a", "b", "c"), (), right) for right in (1, 2)]
    found = figures([Answered(str(n), each, (0.3, 0.6, 0.1), 0.9) for n, each in enumerate(asked)])

    assert found.accuracy
    assert found.accuracy.value == 0.5
    assert found.chance == pytest.approx(1 / 3)
    assert found.ece.value == pytest.approx(0.1)
    assert found.brier.value == pytest.approx((0.4**2 + 0.6**2) / 2)
    assert (found.above, found.auc, found.first) == (None, None, 0.0)


def scored(group: str, better: bool, top: float) -> Answered:
    """A score's answer, with the probability of the top level; the rest is the lowest one's."""
    asked = Asked("score", "t", "?", LEVELS, better=better)
    return Answered(group, asked, (1 - top, 0.0, 0.0, 0.0, top), 0.9)


def test_scores_are_ranked_within_pairs_and_over_all() -> None:
    """One pair right, one tied; over all, a better one is above a worse one in two of four cases and a tie in one."""
    found = figures([scored("1", True, 0.9), scored("1", False, 0.2), scored("2", True, 0.1), scored("2", False, 0.1)])

    assert found.accuracy is None
    assert found.above
    assert found.above.value == 0.75
    assert found.auc
    assert found.auc.value == pytest.approx((2 + 0 + 0.5) / 4)


def test_the_label_mass_that_few_are_below_is_told() -> None:
    """The mean alone would hide a question that the model did not answer."""
    answers = [Answered(str(n), Asked("predicate", "t", "?", right=YES), (0.9, 0.1), n / 100) for n in range(101)]
    found = figures(answers)

    assert found.label_mass == pytest.approx(0.5)
    assert found.least_mass == pytest.approx(0.05)


def test_a_run_asks_a_service_and_keeps_every_answer(data: Path, tmp_path: Path) -> None:
    """A row for each kind and task, and in the file all that the figures are made of."""
    file = tmp_path / "found.json"
    with live_service() as live:
        flags = ["--judge-url", live.url, "--data", str(data), "--limit", "3", "--json", str(file)]
        assert main(flags) == 0

    (run,) = json.loads(file.read_text("utf-8"))["runs"]
    asked = [asked for item in load_items("report", 3, data) for asked in item.asked]
    assert [answer["asked"]["question"] for answer in run["answers"]] == [each.question for each in asked]
    assert all(sum(answer["probabilities"]) == pytest.approx(1) for answer in run["answers"])
    assert {"predicate all", "predicate bbh", "choice topic", "score gsm8k"} <= set(run["figures"])


def test_what_is_not_answered_is_counted_and_in_no_figure(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service with a judge that reads no labels refuses every request."""
    file = tmp_path / "found.json"
    with live_service(judge="reward-model") as live:
        flags = ["--judge-url", live.url, "--data", str(data), "--limit", "1", "--json", str(file)]
        assert main(flags) == 1

    (run,) = json.loads(file.read_text("utf-8"))["runs"]
    assert (run["answers"], run["figures"]) == ([], {})
    assert "14 questions were not answered: unsupported_by_judge" in capsys.readouterr().out


def test_the_speed_of_each_way_is_measured_in_turn() -> None:
    """Each turn has another input; the first round does not count."""
    seen: list[tuple[str, int]] = []
    ways: dict[str, Way] = {name: lambda text, asked: seen.append((text, len(asked))) for name in ("one", "two")}

    timed = measure(ways, [1, 4], 2, iter(map(str, range(100))))

    assert [(each.way, each.questions, len(each.seconds)) for each in timed] == [
        ("one", 1, 2),
        ("two", 1, 2),
        ("one", 4, 2),
        ("two", 4, 2),
    ]
    assert seen == [(str(number), (1, 1, 4, 4)[number % 4]) for number in range(12)]


def test_a_services_ways_are_timed_over_http(tiny_model: Path, tmp_path: Path) -> None:
    """One request of /v1/decisions, and calls of /score in turn and at once."""
    file = tmp_path / "found.json"
    flags = ["--model", str(tiny_model), "--questions", "2", "--tokens", "20", "--rounds", "1", "--json", str(file)]
    assert time_ways(flags) == 0

    timed = json.loads(file.read_text("utf-8"))
    assert [each["way"] for each in timed] == ["/v1/decisions", "/score, one after another", "/score, all at once"]
    assert all(each["questions"] == 2 and each["seconds"][0] > 0 for each in timed)
