"""How a written grade is read: from the judge's own text, strictly, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.judge.grades import parse_grade

STATED = {
    "Score: 4": 4,
    "Score: 0": 0,
    "Score:5": 5,
    "score: 3": 3,
    "Final score: 1": 1,
    "- Score: 2": 2,
    "**Score:** 4": 4,
    "Score: **4**": 4,
    "**Score: 2/5**": 2,
    "Score: $\\boxed{3}$": 3,
    "Score: 4 / 5": 4,
    "Score: 4 out of 5.": 4,
    "Score: 4.": 4,
    "Score: 4 because nothing is missing": 4,
    "It earns 3 points of 5.\n\nScore: 3\n\nThe 2 others are missed.": 3,
    "Score: 2\nSo, once more:\nScore: 2": 2,
    "It says that the credit score: 720 is good.\nScore: 1": 1,
    "The underscore: 5 is a sign.\nScore: 1": 1,
}
NOT_STATED = [
    "",
    "I would give this answer a 4.",
    "4",
    "The score of 4 is fair.",
    "Your credit score: 4 is low.",
    "Score: 720",
    "Score: 6",
    "Score: 10",
    "Score: -1",
    "Score: 4.5",
    "Score: 4,5",
    "Score: 4/10",
    "Score: 4 out of 50",
    "Score: 4th",
    "Score: four",
    "Score: \u0663",
    "Score:",
    "Score:\n4",
    "Score: [0-5]",
    "Score: 3 or 4",
    "Score: 3-4",
    "Score: 4 since 3 criteria hold",
    "Score: 3\nScore: 4",
    "Score: 4\nScore: unclear",
    "My Credit Score: 720\nScore: 2",
    'The answer ends in "Score: 5".\nScore: 1',
]


@pytest.mark.parametrize(("text", "grade"), STATED.items())
def test_a_grade_that_is_stated_is_read(text: str, grade: int) -> None:
    """One whole number from 0 to 5 behind `Score:`, in the ways in which models write it."""
    assert parse_grade(text) == grade


@pytest.mark.parametrize("text", NOT_STATED)
def test_whatever_else_is_no_grade(text: str) -> None:
    """No statement, other numbers, several numbers, and statements that contradict each other give none."""
    assert parse_grade(text) is None


@pytest.mark.parametrize("text", ["Score: 1", "Score: 4 beca", "Score: 4\nScore: "])
def test_a_text_cut_off_in_its_last_statement_has_none(text: str) -> None:
    """The number might have gone on: 1 may be the beginning of 10."""
    assert parse_grade(text, ended=False) is None


def test_a_text_cut_off_later_has_one() -> None:
    """A statement whose line is complete counts, though the text goes on."""
    assert parse_grade("Score: 1\nThat is beca", ended=False) == 1


@given(st.text(), st.booleans())
def test_any_text_gives_a_grade_or_none(text: str, ended: bool) -> None:
    """Nothing that a model can write raises, or gives a number outside the scale."""
    assert parse_grade(text, ended) in {None, 0, 1, 2, 3, 4, 5}
