"""--from-rubric: a TOML file that says which contrasts (contrasts.py) to make of which good answers.

    data = "answers.jsonl"        # or a list; files beside this one, or hub:NAME[@SPLIT]
    harmful = ["safety"]          # categories whose requests should be refused; or a column `harmful` says so

    [[contrast]]
    kind = "other_request"
    count = 300                   # how many at most; all that can be made without it
    length_ratio = 1.5

    [[contrast]]
    kind = "broken_code"
    data = "solutions.jsonl"      # instead of the data above
    category = "code"             # whose template asks; default: each answer's own
    each = 2                      # different bugs in one answer

A row of data holds `prompt`, and the good answer in `response` or `chosen`; optional are `id`, `category`, `harmful`,
and `label`, by which bad answers are left out.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.data import layouts
from client.data.sources import HUB, source_rows
from client.data.tables import TableRow
from client.runtime.validation import first_problem
from client.texts import is_blank
from trainer.errors import InputError
from trainer.tuning.judge.contrasts import Contrast, GoodAnswer, Kind, contrasts
from trainer.tuning.judge.labels import UNDECIDED, Label, verdict_of

_YES: Final = frozenset({"true", "yes", "1", "1.0"})
# What no answer had if a contrast could not be made once.
_MISSING: Final[dict[Kind, str]] = {
    "other_request": "there is no answer to another, similar request",
    "broken_code": "none has code (a fenced block in a known language, or code alone)",
    "broken_number": "none is a solution that calculates and ends in a number",
    "refusal": "all of them refuse",
    "cut_off": "all are too short",
    "repeated": "all are too short",
}


class RubricContrast(Contrast):
    """A contrast with data of its own."""

    data: str | tuple[str, ...] | None = None


class Rubric(BaseModel):
    """The file's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contrast: tuple[RubricContrast, ...] = Field(min_length=1)
    data: str | tuple[str, ...] | None = None
    harmful: tuple[str, ...] = ()

    def sources(self, contrast: RubricContrast) -> tuple[str, ...]:
        """The data of a contrast."""
        data = contrast.data or self.data or ()
        return (data,) if isinstance(data, str) else data


def read_rubric(file: Path) -> Rubric:
    """The rubric, with its files' paths made whole. Raises InputError for one that cannot be used."""
    try:
        rubric = Rubric.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8") from error
    except ValidationError as error:
        raise InputError(f"{file}: {first_problem(error, 'rubric')}") from error
    except RecursionError as error:
        raise InputError(f"{file}: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is what Python says of a number with too many digits
        raise InputError(f"{file}: not TOML: {error}") from error
    placed = []
    for number, contrast in enumerate(rubric.contrast, 1):
        if not rubric.sources(contrast):
            raise InputError(f"{file}: contrast {number} ({contrast.kind}) has no data: give `data`")
        paths = tuple(_placed(source, file) for source in rubric.sources(contrast))
        placed.append(contrast.model_copy(update={"data": paths}))
    return rubric.model_copy(update={"contrast": tuple(placed)})


def rubric_files(rubric: Rubric) -> list[str]:
    """The data of all contrasts: paths, and names of the hub."""
    return sorted({source for contrast in rubric.contrast for source in rubric.sources(contrast)})


def rubric_labels(rubric: Rubric, column: str, seed: int) -> tuple[list[Label], list[str]]:
    """The labels in an order that the seed decides, kinds mixed, and a note for each contrast that fell short.

    `column` is that of the categories. Raises DataError, and InputError for a contrast of which there is none.
    """
    labels: dict[str, Label] = {}
    notes = []
    read = cache(lambda source: _good_answers(source, column, rubric.harmful))
    for contrast in rubric.contrast:
        answers = _joined([read(source) for source in rubric.sources(contrast)])
        made = contrasts(answers, contrast, seed)
        if not made:
            raise InputError(f"{contrast.kind}: nothing can be made of {len(answers)} answers: {_reason(contrast)}")
        if contrast.count is not None and len(made) < contrast.count:
            notes.append(f"{contrast.kind}: {len(made)} of {contrast.count} could be made of {len(answers)} answers")
        for label in made:
            _add(labels, label)
    mixed = sorted(labels.values(), key=lambda label: sha256(f"{seed}\0{label.id}".encode()).digest())
    return mixed, notes


def _add(labels: dict[str, Label], label: Label) -> None:
    """Add a label; if another one has its id (rows of two files are numbered alike), under an id of its own."""
    named, number = label, 1
    while labels.setdefault(named.id, named) != named:
        number += 1
        named = label.model_copy(update={"id": f"{label.id}#{number}"})


def synthetic_counts(labels: Sequence[Label]) -> dict[str, int]:
    """How many labels were made, by kind."""
    return dict(sorted(Counter(label.kind for label in labels if label.kind is not None).items()))


def synthetic_line(counts: dict[str, int]) -> str:
    """What is said of labels that nobody gave."""
    return f"synthetic: {sum(counts.values())} of them were made, and given by nobody: " + ", ".join(
        f"{kind} {count}" for kind, count in counts.items()
    )


def _placed(source: str, file: Path) -> str:
    if source.startswith(HUB):
        return source
    try:
        path = file.parent / Path(source).expanduser()
        found = path.is_file()
    except (RuntimeError, ValueError, OSError) as error:  # ~ of a user that there is not; a zero byte; too long a name
        raise InputError(f"{file}: {source!r} is no path of a file: {error}") from error
    if not found:
        raise InputError(f"{file}: {path}: there is no such file")
    return str(path)


def _reason(contrast: RubricContrast) -> str:
    only = "" if contrast.only is None else f" (only {', '.join(contrast.only)})"
    return f"{_MISSING[contrast.kind]}{only}"


def _joined(files: Sequence[list[GoodAnswer]]) -> list[GoodAnswer]:
    """The answers of all files; ids that several of them have are made different."""
    used: Counter[str] = Counter()
    answers = []
    for answer in (answer for file in files for answer in file):
        used[answer.id] += 1
        number = used[answer.id]
        answers.append(answer if number == 1 else answer.model_copy(update={"id": f"{answer.id}#{number}"}))
    return answers


def _good_answers(source: str, column: str, harmful: Sequence[str]) -> list[GoodAnswer]:
    """The good answers of a file, without blank ones; at least one."""
    answers = [answer for row in source_rows(source) for answer in _answers(row, column, harmful)]
    if not answers:
        raise InputError(f"{source}: has no good answers")
    return answers


def _answers(row: TableRow, column: str, harmful: Sequence[str]) -> Iterator[GoodAnswer]:
    fields = row.fields
    name = next((name for name in ("response", "chosen") if name in fields), None)
    if name is None:
        raise row.problem(f"neither response nor chosen (columns: {', '.join(map(str, fields)) or 'none'})")
    if not _good(row):
        return
    # The layout of pairs reads every form that prompts and answers have; there is nothing to compare here.
    sample = layouts.pairs(
        TableRow(row.source, row.unit, row.number, {**fields, "chosen": fields[name], "rejected": fields[name]})
    )
    category = str(fields.get(column) or "") or None
    answer = GoodAnswer(
        id=sample.id,
        prompt=sample.prompt,
        text=sample.chosen[0],
        category=category,
        harmful=_word(fields, "harmful") in _YES or category in harmful,
    )
    if not is_blank(answer.request) and not is_blank(answer.text):
        yield answer


def _good(row: TableRow) -> bool:
    """Whether the row's `label`, if it has one, calls the answer good. Raises DataError for one that says neither."""
    label = _word(row.fields, "label")
    if label in ("", "none"):
        return True
    verdict = verdict_of(label)
    if verdict is None:
        raise row.problem(f"label is {row.fields['label']!r}, neither yes, no nor a number from 0 to 1")
    return verdict > UNDECIDED


def _word(fields: dict[str, Any], name: str) -> str:
    return str(fields.get(name, "")).strip().lower()
