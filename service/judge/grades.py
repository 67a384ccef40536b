"""The grade in a self-rewarding judge's text: read strictly, from the judge's own words alone, or not at all.

The published parser gave 0 where two grades contradicted each other, and 5 for `credit score: 720` in the prompt.
Here a grade is stated by `Score:`, as the judge is told to write it, anywhere; or by `score:` in any case at the
beginning of a line (`Final score:`, `Total score:` too). A whole number from 0 to 5 must follow, and no other number in
that line but the scale, as in `4/5` or `4 out of 5`. Stars, underscores, backticks, brackets, `$` and `\boxed` around
it are ignored. No grade is read from a text

- without a statement (`I would give it a 4`), or with one that holds no such number (`Score: 720`, `Score: 4.5`,
  `Score: 4/10`, `Score: 3 or 4`, `Score: -1`, `Score: four`),
- with statements that contradict each other, one without a grade included,
- that was cut off in the line of its last statement, which might have gone on.

So a text that quotes `credit score: 720`, or the response's own `Score: 5`, gives the judge's own grade or none.
"""

from __future__ import annotations

import re
from typing import Final

from service.questions import TOP_GRADE

_DECORATION: Final = str.maketrans("", "", "*_`[](){}$")
_STATEMENT: Final = re.compile(
    r"(?:(?<!\w)Score|^[^\w\n]*(?:(?i:final|total|overall)\s+)?(?i:score))\s*:(?P<rest>.*)$", re.MULTILINE
)
_GRADE: Final = re.compile(rf"\s*([0-{TOP_GRADE}])(?!\w|[.,]\d)(?:\s*(?:/|out of)\s*{TOP_GRADE}(?!\w|[.,]\d))?")


def parse_grade(text: str, ended: bool = True) -> int | None:
    """The grade that the text states, 0 to 5, or None. `ended`: the text was not cut off."""
    plain = text.translate(_DECORATION).replace("\\boxed", "")
    statements = list(_STATEMENT.finditer(plain))
    found = {_grade_in(statement["rest"]) for statement in statements}
    if len(found) != 1 or (not ended and statements[-1].end() == len(plain)):
        return None
    return found.pop()


def _grade_in(rest: str) -> int | None:
    grade = _GRADE.match(rest)
    if grade is None or re.search(r"\d", rest[grade.end() :]):
        return None
    return int(grade[1])
