"""BIG-Bench Hard (Suzgun et al., arXiv:2210.09261): 27 tasks with one right answer each.

Asked without examples. The answer is read off the response (see answers.py), and where there are options, the model is
asked a second time, for the answer alone, and the likeliest option counts: that needs no generation, and tells models
apart that do not keep to the form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from client.data.tables import TableRow
from trainer.evaluation.tasks.answers import (
    as_number,
    final_answer,
    find_letter,
    find_number,
    find_word,
    normal,
)
from trainer.evaluation.tasks.items import Check, Task, TaskItem, item_id, make_task, text_field

NAME: Final = "bbh"
EXACT: Final = "exact"
# A change of these functions' verdicts is a change of this number.
_CHECKER: Final = "bbh 1"
_LETTERED: Final = re.compile(r"^\(([A-Z])\)[ \t]*(.*)$", re.MULTILINE)
_LISTED: Final = re.compile(r"^-[ \t]*(\S[^\n]*?)[ \t]*$", re.MULTILINE)
# Tasks whose inputs do not list their two answers.
_PAIRS: Final = (("True", "False"), ("yes", "no"), ("Yes", "No"))


def read_bbh(rows: Sequence[TableRow]) -> Task:
    """`input`, `target`, and optionally `task` and `id`. Raises DataError."""
    return make_task(NAME, EXACT, rows, _read_item, _CHECKER)


def _read_item(row: TableRow) -> TaskItem:
    question, target = text_field(row, "input"), text_field(row, "target").strip()
    make = partial(TaskItem, id=item_id(row), group=str(row.fields.get("task") or NAME))
    _, marker, listing = question.rpartition("Options:")
    lettered = {letter: text.strip() for letter, text in _LETTERED.findall(listing)} if marker else {}
    if re.fullmatch(r"\([A-Z]\)", target):
        if target[1] not in lettered:
            raise row.problem(f"the target is {target}, but the input lists no such option")
        options = tuple(f"({letter})" for letter in lettered)
        _require_choice(row, lettered)
        form = '"Answer: (X)", where X is the letter of the right option'
        return make(
            prompt=_asking(question, form),
            check=lambda response: _check(find_letter(response, lettered), target[1]),
            options=options,
            gold=options.index(target),
            question=_alone(question, "the letter of the right option in parentheses"),
        )
    words = tuple(_LISTED.findall(listing)) if marker else next((pair for pair in _PAIRS if target in pair), ())
    if words:
        if target not in words:
            raise row.problem(f"the target {target!r} is none of the options {', '.join(words)}")
        _require_choice(row, words)
        return make(
            prompt=_asking(question, " or ".join(f'"Answer: {word}"' for word in words)),
            check=lambda response: _check(find_word(response, words), target),
            options=words,
            gold=words.index(target),
            question=_alone(question, " or ".join(words)),
        )
    check, form = _free_check(target)
    return make(prompt=_asking(question, form), check=check)


def _require_choice(row: TableRow, options: Collection[str]) -> None:
    if len(options) == 1:
        raise row.problem("the input lists a single option: any model would choose it")


def _free_check(target: str) -> tuple[Callable[[str], Check], str]:
    """The check of an answer without options, and the form in which it is asked for."""
    number = as_number(target)
    if number is None:
        return lambda response: _check(normal(final_answer(response)[0]), normal(target)), '"Answer: …"'

    def check(response: str) -> Check:
        found = find_number(response)
        return Check(correct=found == number, answer=None if found is None else str(found))

    return check, '"Answer: N", where N is a number'


def _check(found: str | None, target: str) -> Check:
    return Check(correct=found == target, answer=found or None)


def _asking(question: str, form: str) -> str:
    return f"{question}\n\nThink briefly if you need to, and end with a line of the form {form}."


def _alone(question: str, form: str) -> str:
    return f"{question}\n\nReply with nothing but {form}."
