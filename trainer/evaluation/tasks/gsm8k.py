"""GSM8K (Cobbe et al., arXiv:2110.14168) and problems like it: the final number, or a boxed formula as in MATH."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from client.data.tables import TableRow
from trainer.evaluation.tasks.answers import as_number, final_answer, find_number, last_boxed, normal_formula
from trainer.evaluation.tasks.items import Check, Task, TaskItem, item_id, make_task, text_field

NAME: Final = "gsm8k"
EXACT: Final = "exact"
# A change of these functions' verdicts is a change of this number.
_CHECKER: Final = "gsm8k 1"
_ASKING: Final = 'Think step by step, and end with a line of the form "Answer: N", where N is the final answer.'


def read_gsm8k(rows: Sequence[TableRow]) -> Task:
    """`question` (or `prompt`) and `answer`, which ends in "#### N", in \\boxed{…}, or is the answer alone."""
    return make_task(NAME, EXACT, rows, _read_item, _CHECKER)


def _read_item(row: TableRow) -> TaskItem:
    question, solution = text_field(row, "question", "prompt"), text_field(row, "answer")
    gold = last_boxed(solution)
    if gold is None:
        _, mark, after = solution.rpartition("####")
        gold = after if mark else solution
    gold = gold.strip()
    if not gold or len(gold.splitlines()) > 1:
        raise row.problem('answer must end in "#### N" or in \\boxed{…}, or be the final answer alone')
    return TaskItem(
        id=item_id(row),
        group=str(row.fields.get("subset") or NAME),
        prompt=f"{question}\n\n{_ASKING}",
        check=lambda response: check_solution(response, gold),
    )


def check_solution(response: str, gold: str) -> Check:
    """Whether the response ends up with the gold answer: as numbers if it is one, else as formulas."""
    number = as_number(gold)
    if number is not None:
        found = find_number(response)
        return Check(correct=found == number, answer=None if found is None else str(found))
    formula = last_boxed(response)
    answer = final_answer(response)[0] if formula is None else formula
    return Check(correct=normal_formula(answer) == normal_formula(gold), answer=answer or None)
