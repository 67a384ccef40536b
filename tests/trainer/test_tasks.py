"""Tasks whose answers a program checks: reading them, finding answers, paired comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from client.data.sources import source_rows
from trainer.errors import InputError
from trainer.evaluation.responses import ends_in_loop, repeated_share
from trainer.evaluation.tasks.bbh import read_bbh
from trainer.evaluation.tasks.contrasts import contrasts
from trainer.evaluation.tasks.gsm8k import check_solution
from trainer.evaluation.tasks.items import Check, InstructionCheck, TaskItem
from trainer.evaluation.tasks.options import TaskOptions
from trainer.evaluation.tasks.scores import CheckedItem, measures, ratio_mean

LETTERS = "Which is a fruit?\nOptions:\n(A) a stone\n(B) Iron\n(C) Apple"
LISTED = "Does it follow?\nOptions:\n- valid \n- invalid"


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    """A file with these rows."""
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def problem(tmp_path: Path, question: str, target: str) -> TaskItem:
    """The only item of a BBH file."""
    return read_bbh(source_rows(written(tmp_path, {"input": question, "target": target}))).items[0]


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Answer: (C)", "C"),
        ("**Answer:** C", "C"),
        ("The answer is C, because it grows.", "C"),
        ("Stones (A) do not grow.\n\nAnswer:\n(C) Apple", "C"),
        ("Answer: apple.", "C"),
        ("It is not (A). Therefore \\boxed{(C)}", "C"),
        ("(A) is a stone, so (C) it is, I think", "C"),
        ("c", "C"),
        ("Answer: A circle", None),
        ("I think so", None),
        ("Answer: (Q)", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option_is_found(response: str, found: str | None, tmp_path: Path) -> None:
    """In parentheses, bare, or by the option's text; a word that begins with a letter is none."""
    check = problem(tmp_path, LETTERS, "(C)").check(response)

    assert (check.answer, check.correct) == (found, found == "C")


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("Answer: invalid", "invalid"),
        ("Invalid. The premises do not say so, although it looks valid.", "invalid"),
        ("It looks valid at first, yet it is invalid", "invalid"),
        ("Valid or not, the answer is: **Invalid**.", "invalid"),
        ("The reasoning is valid.\nAnswer:", "valid"),
        ("No idea", None),
    ],
)
def test_a_listed_word_is_found(response: str, found: str | None, tmp_path: Path) -> None:
    """After a mark, else as the first word, else the last one named; whole words only."""
    check = problem(tmp_path, LISTED, "invalid").check(response)

    assert (check.answer, check.correct) == (found, found == "invalid")


@pytest.mark.parametrize(
    ("response", "gold", "correct"),
    [
        ("3 + 4 = 7\n#### 7", "7", True),
        ("So it costs $1,234.00 in all.", "1234", True),
        ("Answer: 12 apples, which leaves 5", "12", True),
        ("The answer is -0.5.", "-0.50", True),
        ("first 7, then 8", "7", False),
        ("I cannot tell", "7", False),
        ("", "7", False),
        ("thus \\boxed{\\dfrac{1}{2}}", "\\frac{1}{2}", True),
        ("thus \\boxed{\\frac{1}{3}}", "\\frac{1}{2}", False),
        ("Answer: x^2 + 1", "x^2+1", True),
    ],
)
def test_the_final_number_or_formula_counts(response: str, gold: str, correct: bool) -> None:
    """Numbers are compared as numbers, formulas without what changes their look only."""
    assert check_solution(response, gold).correct is correct


def test_answers_without_options_are_compared_as_words(tmp_path: Path) -> None:
    """Case, commas and the full stop do not matter; the order does."""
    item = problem(tmp_path, "Sort: pear, apple", "apple pear")

    verdicts = [item.check(text).correct for text in ("Answer: Apple, pear.", "apple pear", "Answer: pear apple")]

    assert verdicts == [True, True, False]
    assert item.options == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "Is it?"}, "line 1: has no target"),
        ({"input": "Is it?", "target": " "}, "line 1: target must be a text"),
        ({"input": ["Is it?"], "target": "yes"}, "line 1: input must be a text"),
        ({"input": LETTERS, "target": "(D)"}, "line 1: the target is (D), but the input lists no such option"),
        ({"input": "Is it?\nOptions:\n(A) yes", "target": "(A)"}, "line 1: the input lists a single option"),
        ({"input": "Is it?\nOptions:\n- yes", "target": "yes"}, "line 1: the input lists a single option"),
        ({"input": LISTED, "target": "maybe"}, "line 1: the target 'maybe' is none of the options valid, invalid"),
    ],
)
def test_bad_problems_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The error names the file and the line."""
    with pytest.raises(InputError, match=r"items\.jsonl") as raised:
        TaskOptions({"bbh": written(tmp_path, row)}).read()

    assert message in str(raised.value)


def test_ids_must_differ(tmp_path: Path) -> None:
    """Rows are told apart by their ids."""
    file = written(tmp_path, *[{"id": "one", "input": "Is it?", "target": "yes"}] * 2)

    with pytest.raises(InputError, match=r"line 2: has the id 'one' of line 1"):
        TaskOptions({"bbh": file}).read()


def test_a_choice_of_items_is_taken_from_every_group(tmp_path: Path) -> None:
    """In proportion to the groups, the same for the same seed."""
    rows = [{"id": f"{n}", "task": "ab"[n % 2], "input": f"Is it {n}?", "target": "yes"} for n in range(20)]
    options = TaskOptions({"bbh": written(tmp_path, *rows)}, items=6)

    first, second = (options.read()[0].items for _ in range(2))

    assert [item.group for item in first].count("a") == 3
    assert [item.id for item in first] == [item.id for item in second]


def checked(name: str, check: Check) -> CheckedItem:
    """An item of that id with that verdict."""
    return CheckedItem(
        **check.model_dump(),
        id=name,
        group="g",
        response="",
        tokens=1,
        finish="stop",
        refusal=False,
        repeated=0,
        loop=False,
    )


def verdicts(*correct: bool | None) -> list[CheckedItem]:
    """Items 0, 1, … with these verdicts; None: the checker broke."""
    checks = [Check(correct=one, error=None if one is not None else "broken") for one in correct]
    return [checked(str(number), check) for number, check in enumerate(checks)]


def test_arms_are_compared_on_the_items_that_both_have() -> None:
    """McNemar's exact test; an item that one arm lacks or that could not be checked is left out."""
    ours, theirs = verdicts(True, True, True, True, True, True, None, True), verdicts(*[False] * 6, True)

    (contrast,) = contrasts("bbh", "new", "base", ours, theirs)

    assert (contrast.count, contrast.better, contrast.worse, contrast.p) == (6, 6, 0, 2 / 2**6)
    assert contrast.sentence.startswith("new is better than base on 6 bbh items (exact): 100.0% against 0.0%")


def test_a_small_difference_is_called_none() -> None:
    """The sentence says what the test supports."""
    (contrast,) = contrasts("bbh", "new", "base", verdicts(True, True, False), verdicts(True, False, False))

    assert "new is no better than base on 3 bbh items" in contrast.sentence
    assert "p = 1)" in contrast.sentence


def test_arms_without_a_common_item_have_no_comparison() -> None:
    """Nothing is computed from nothing."""
    assert contrasts("bbh", "new", "base", verdicts(True), verdicts(None)) == []


def test_instructions_count_by_prompt() -> None:
    """Instruction accuracy is over all instructions, its error over prompts, its test a bootstrap over prompts."""

    def item(name: str, *strict: bool) -> CheckedItem:
        own = tuple(InstructionCheck(id="a", strict=one, loose=True) for one in strict)
        return checked(name, Check(correct=all(strict), loose=True, instructions=own))

    ours, theirs = [item("0", True, True, False), item("1", True)], [item("0", True, False, False), item("1", False)]
    found = {one.measure: one for one in contrasts("ifeval", "new", "base", ours, theirs)}

    assert measures(ours)["instruction_strict"] == {"0": (2, 3), "1": (1, 1)}
    assert (found["instruction_strict"].value, found["instruction_strict"].against_value) == (0.75, 0.25)
    assert (found["instruction_strict"].test, found["prompt_strict"].test) == ("bootstrap", "mcnemar")


def test_the_error_of_a_mean_of_shares_is_the_usual_one() -> None:
    """For denominators of 1 it is the standard error of the mean; of nothing there is no mean."""
    found = ratio_mean([(1, 1), (0, 1), (1, 1), (1, 1)])

    assert found is not None
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(0.25)
    assert ratio_mean([]) is None


@pytest.mark.parametrize(
    ("text", "share", "loop"),
    [
        ("one two three four five six seven", 0.0, False),
        ("a b c d a b c d", 0.2, False),
        ("It begins. " + "and so on " * 6, None, True),
        ("no no no", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_repetition_is_measured(text: str, share: float | None, loop: bool) -> None:
    """Shares of 4-grams that came before, and answers that end in a loop."""
    assert share is None or repeated_share(text) == pytest.approx(share)
    assert ends_in_loop(text) is loop
