"""Labels from files: every form of them, what is left out and why, and what evaluation files already know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.tables import DataError
from trainer.errors import InputError
from trainer.tuning.judge.labels import Label, clean, read_labels
from trainer.tuning.judge.leaks import leaking
from trainer.tuning.preferences import held_out_indices

PAIR = {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"}


def written(path: Path, *rows: dict[str, Any]) -> str:
    """A file with these rows, as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pairs_and_single_answers_may_stand_in_one_file(tmp_path: Path) -> None:
    """Pairs with how sure they are and by how much, single answers with a verdict, and the category of either."""
    file = written(
        tmp_path / "labels.jsonl",
        {**PAIR, "probability": 0.8, "margin": 2, "category": "math"},
        {"prompt": "Who?", "response": "I", "label": "no"},
        {"prompt": "Who?", "response": "You", "label": 0.7},
    )

    labels, left_out = read_labels(file)

    assert [(x.answers, x.target, x.margin, x.category) for x in labels] == [
        (("4", "5"), 0.8, 2.0, "math"),
        (("I",), 0.0, 0.0, None),
        (("You",), 0.7, 0.0, None),
    ]
    assert not left_out


def test_csv_and_another_column_of_categories(tmp_path: Path) -> None:
    """A spreadsheet's texts become labels; --category names the column."""
    file = tmp_path / "labels.csv"
    file.write_text("prompt,response,label,domain\nWho?,I,TRUE,law\nWho?,You,0,\n")

    labels, _ = read_labels(str(file), category="domain")

    assert [(label.target, label.category) for label in labels] == [(1.0, "law"), (0.0, None)]


def test_every_chosen_answer_is_better_than_every_rejected_one(tmp_path: Path) -> None:
    """A row of several answers is as many labels as there are pairs of them, each with the row's own columns."""
    row = {**PAIR, "chosen": ["4", "four"], "rejected": ["5", "6", "four"], "margin": 1, "template": "math@1"}

    labels, left_out = read_labels(written(tmp_path / "labels.jsonl", row))

    answers = [("4", "5"), ("4", "6"), ("4", "four"), ("four", "5"), ("four", "6")]
    assert [label.answers for label in labels] == answers
    assert [label.id for label in labels] == ["1#1", "1#2", "1#3", "1#4", "1#5"]
    assert {(label.margin, label.template) for label in labels} == {(1.0, "math@1")}
    assert left_out == {"equal answers": 1}


def test_scores_compare_every_two_responses(tmp_path: Path) -> None:
    """The higher score is better, whatever its unit; equal ones are ties, and a response without one is not judged."""
    scored = {"prompt": "Who?", "responses": ["a", "b", "c", "d"], "scores": [0.5, 3, 0.5, None], "category": "chat"}

    labels, left_out = read_labels(written(tmp_path / "labels.jsonl", scored, PAIR))

    assert [(x.id, x.answers, x.target, x.category) for x in labels[:2]] == [
        ("1#1", ("b", "a"), 1.0, "chat"),
        ("1#4", ("b", "c"), 1.0, "chat"),
    ]
    assert labels[2].answers == ("4", "5")
    assert left_out == {"ties": 1, "no score": 3}


def test_scores_in_a_spreadsheet_are_json(tmp_path: Path) -> None:
    """As the responses are."""
    file = tmp_path / "labels.csv"
    file.write_text('prompt,responses,scores\nWho?,"[""a"", ""b""]","[1, 2]"\n')

    ((label,), _) = read_labels(str(file))

    assert label.answers == ("b", "a")


def test_several_questions_about_the_same_answers_are_no_contradiction(tmp_path: Path) -> None:
    """Asked with another template, the same pair may be answered the other way round."""
    rows = [{**PAIR, "template": "a@1"}, {**PAIR, "template": "b@1", "probability": 0}]

    labels, left_out = read_labels(written(tmp_path / "labels.jsonl", *rows))

    assert [label.favours for label in labels] == ["4", "5"]
    assert not left_out


def test_conversations_are_read_as_everywhere(tmp_path: Path) -> None:
    """Conversations that end with the answer give their earlier turns as the prompt."""
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    answers = ([*turns, {"role": "assistant", "content": text}] for text in ("good", "bad"))
    file = written(tmp_path / "labels.jsonl", dict(zip(("chosen", "rejected"), answers, strict=True)))

    ((label,), _) = read_labels(file)

    assert [turn.content for turn in label.prompt if not isinstance(turn, str)] == ["A", "B", "C"]
    assert label.answers == ("good", "bad")


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path: Path) -> None:
    """Empty texts, equal answers, ties, repeats, and both of two labels that contradict each other."""
    file = written(
        tmp_path / "labels.jsonl",
        PAIR,
        PAIR,
        {**PAIR, "chosen": " "},
        {**PAIR, "chosen": "5"},
        {**PAIR, "prompt": "A?", "probability": 0.5},
        {"prompt": "B?", "chosen": "x", "rejected": "y"},
        {"prompt": "B?", "chosen": "y", "rejected": "x"},
        {"prompt": "C?", "response": "x", "label": 1},
        {"prompt": "C?", "response": "x", "label": 0},
    )

    labels, left_out = read_labels(file)

    assert [label.prompt for label in labels] == ["What is 2+2?"]
    assert left_out == {"duplicates": 1, "empty texts": 1, "equal answers": 1, "ties": 1, "contradictions": 4}


def test_a_swapped_repeat_is_no_contradiction() -> None:
    """The same preference written the other way round, with a probability below one half, is a repeat."""
    first = Label(id="1", prompt="A?", answers=("x", "y"))
    again = Label(id="2", prompt="A?", answers=("y", "x"), target=0.1)

    assert clean([first, again]) == ([first], {"duplicates": 1})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "Who?"}, "neither chosen and rejected, nor response and label, nor responses and scores"),
        (
            {"prompt": "Who?", "responses": ["I", "You"], "scores": [1]},
            r"scores is .\[1\]., not a list with a number, or null, for each of 2 responses",
        ),
        ({"prompt": "Who?", "responses": ["I", "You"], "scores": [1, "?"]}, "scores is .*, not a list"),
        ({"prompt": "Who?", "responses": ["I", "You"], "scores": 1}, "scores is .1., not a list"),
        ({"prompt": "Who?", "response": "I", "label": "maybe"}, "label is 'maybe', not a number from 0 to 1"),
        ({"prompt": "Who?", "response": "I", "label": 2}, "label is 2"),
        ({"prompt": "Who?", "response": ["I", "You"], "label": 1}, "response holds 2 answers"),
        ({**PAIR, "probability": 1.5}, "probability is 1.5"),
        ({**PAIR, "margin": -1}, "margin is -1, not a number 0 or more"),
        ({**PAIR, "margin": "NaN"}, "margin is 'NaN'"),
    ],
)
def test_a_row_that_says_nothing_is_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    """An unusable value is an error with file, line and reason, never a guess."""
    file = written(tmp_path / "labels.jsonl", PAIR, row)

    with pytest.raises(DataError, match=rf"labels\.jsonl, line 2: {problem}"):
        read_labels(file)


def test_a_prompt_is_on_one_side_only() -> None:
    """Held-out labels take all of a prompt's, and the seed alone decides which."""
    prompts = [f"prompt {n // 3}" for n in range(60)]

    held_out = held_out_indices(prompts, 0.2, seed=1)

    assert 9 <= len(held_out) <= 15
    assert {prompts[i] for i in held_out}.isdisjoint(prompts[i] for i in range(60) if i not in held_out)
    assert held_out == held_out_indices(prompts, 0.2, seed=1) != held_out_indices(prompts, 0.2, seed=2)


def test_labels_that_an_evaluation_knows_are_found(tmp_path: Path) -> None:
    """Equal prompts leak whatever their case, and so do eight words in a row; seven do not."""
    evaluation = written(
        tmp_path / "dev.jsonl",
        {"prompt": "What is 2 + 2?"},
        {"prompt": "Please tell me one two three four five six seven eight nine"},
        {"question": [{"role": "system", "content": "Be brief and kind to all who ask you things"}]},
    )
    prompts = [
        "what IS 2+2",
        "one two three four five six seven eight and so on",
        "one two three four five six seven and so on",
        "What is 2 + 3?",
    ]
    labels = [Label(id=str(n), prompt=prompt, answers=("a", "b")) for n, prompt in enumerate(prompts)]

    assert leaking(labels, [Path(evaluation)]) == {0: evaluation, 1: evaluation}


def test_an_evaluation_file_without_prompts_is_refused(tmp_path: Path) -> None:
    """A file that cannot be compared must not pass for one without overlaps."""
    evaluation = written(tmp_path / "dev.jsonl", {"text": "What is 2+2?"})

    with pytest.raises(InputError, match=r"dev\.jsonl, line 1: no prompt"):
        leaking([], [Path(evaluation)])
