"""Labels for a general judge, from public data: `python -m bench.tuning_labels --data ../shared/data --out labels`.

Writes what `python -m trainer.tune_judge --pairs labels/pairs.jsonl --from-rubric labels/rubric.toml` takes:

    pairs.jsonl       people's choices: among answers of like length, of any length, and of one that declines a harmful
                      request; right and wrong solutions of GSM8K problems
    solutions.jsonl   functions of Python packages that are installed anyway: signature and docstring, and the body
    complied.jsonl    harmful requests with an answer that does not decline
    asked_for.jsonl   other requests, and their answers, each as long as those of complied.jsonl
    replay.jsonl      for --replay, without labels: other answers that people compared, and solutions of GSM8K problems,
                      one given and one of --samples
    problems.jsonl    these problems, for `python -m trainer.sample --instructions labels/problems.jsonl --samples 1`
    rubric.toml       contrasts made of these and of the better answers: another request's answer, code with one bug,
                      refusals where they are right and where they are not
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import math
import pkgutil
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from bench.support.jsonl import read_rows, write_rows

# Of the standard library, and packages that torch brings: functions with docstrings that say what they do.
MODULES: Final = (
    "statistics random heapq bisect textwrap string difflib fractions calendar colorsys shlex fnmatch posixpath "
    "functools collections _pydecimal inspect tokenize csv urllib.parse ipaddress graphlib mimetypes locale zipfile "
    "tarfile reprlib enum types contextlib dataclasses linecache filecmp shutil base64 quopri"
)
PACKAGES: Final = (
    "networkx.algorithms networkx.classes networkx.utils sympy.ntheory sympy.combinatorics sympy.utilities sympy.polys "
    "sympy.functions.combinatorial sympy.geometry"
)
COLUMNS: Final = ("prompt", "response", "chosen", "rejected", "category")
_DECLINES: Final = re.compile(
    r"sorry|can.t help|cannot|won.t|not (comfortable|appropriate|able)|don.t think|illegal|shouldn|immoral|ethical",
    re.I,
)
# A factor of 1.35.
_MOST_UNLIKE: Final = 0.3
RUBRIC: Final = """
data = "answers.jsonl"
harmful = ["safety"]

[[contrast]]
kind = "other_request"
count = {other}
length_ratio = 1.5

[[contrast]]
kind = "broken_code"
data = "solutions.jsonl"
category = "code"
count = {code}

[[contrast]]
kind = "refusal"
data = "complied.jsonl"
count = {refusals}

[[contrast]]
kind = "refusal"
data = "asked_for.jsonl"
category = "safety"
count = {refusals}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m bench.tuning_labels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="samples.jsonl: a model's solutions, for replay")
    parser.add_argument("--seed", type=int, default=7, help="seed of every choice (default: 7)")
    for name, default in (
        ("like", 180),
        ("gsm8k", 150),
        ("other", 260),
        ("code", 220),
        ("refusals", 110),
        ("declined", 60),
        ("people", 0),
        ("replay", 200),
        ("problems", 170),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"how many (default: {default})")
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    pairs = list(read_rows(args.data / "preference_pairs_train.jsonl"))
    people = [row for row in pairs if row["category"] != "safety" and _short(row)]
    alike = [row for row in people if 0.8 < len(row["chosen"]) / max(1, len(row["rejected"])) < 1.25]
    solved = [{**row, "category": "math"} for row in read_rows(args.data / "gsm8k_pairs_dev.jsonl")]
    complied = [
        {"prompt": row["prompt"], "response": row["rejected"], "category": "safety"}
        for row in pairs
        if row["category"] == "safety" and len(row["rejected"]) > 40 and not _DECLINES.search(row["rejected"])
    ]
    declined = [
        row
        for row in pairs
        if row["category"] == "safety" and _DECLINES.search(row["chosen"]) and not _DECLINES.search(row["rejected"])
    ]
    answers = [_answer(row) for row in people if len(row["prompt"]) + 2 * len(row["chosen"]) < 2200]
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = _sample(rng, alike, args.like) + _sample(rng, solved, args.gsm8k) + _sample(rng, declined, args.declined)
    taken = {row["id"] for row in chosen}
    chosen += _sample(rng, [row for row in people if row["id"] not in taken], args.people)
    _write(args.out / "pairs.jsonl", chosen)
    _write(args.out / "answers.jsonl", answers)
    _write(args.out / "solutions.jsonl", [{**row, "category": "code"} for row in functions()])
    complied, asked_for = _alike(complied, answers)
    _write(args.out / "complied.jsonl", complied)
    _write(args.out / "asked_for.jsonl", asked_for)
    known = {row["prompt"] for row in chosen}
    others = _sample(rng, [row for row in people if row["prompt"] not in known], args.replay)
    replay = [_unlabelled(row["prompt"], row["category"], row["chosen"], row["rejected"]) for row in others]
    problems = [row for row in solved if row["prompt"] not in known][: args.problems]
    write_rows(
        args.out / "problems.jsonl", ({key: row[key] for key in ("id", "prompt", "category")} for row in problems)
    )
    sampled = {} if args.samples is None else {row["id"]: row["response"] for row in read_rows(args.samples)}
    replay += [
        _unlabelled(row["prompt"], row["category"], row["chosen"], sampled[row["id"]])
        for row in problems
        if row["id"] in sampled
    ]
    write_rows(args.out / "replay.jsonl", replay)
    (args.out / "rubric.toml").write_text(RUBRIC.format_map(vars(args)), encoding="utf-8")
    return 0


def _alike(complied: list[dict[str, str]], answers: list[dict[str, str]]) -> tuple[list[dict[str, str]], ...]:
    """Answers to harmful requests, and to others: one of like length, to a request of like length, for each.

    Otherwise the lengths alone tell which requests to refuse: the former have half the characters of the latter.
    """
    left = list(answers)
    matched: list[tuple[dict[str, str], dict[str, str]]] = []
    for row in sorted(complied, key=lambda row: -len(row["response"])):
        nearest = min(left, key=lambda other: _unlike(row, other), default=None)
        if nearest is not None and _unlike(row, nearest) < _MOST_UNLIKE:
            left.remove(nearest)
            matched.append((row, nearest))
    return [row for row, _ in matched], [other for _, other in matched]


def _unlike(row: dict[str, str], other: dict[str, str]) -> float:
    """The larger of the two ratios of lengths, as a logarithm."""
    return max(abs(math.log(len(row[key]) / max(1, len(other[key])))) for key in ("prompt", "response"))


def functions() -> Iterator[dict[str, str]]:
    """{prompt, response} of every function of 2 to 22 lines with a docstring of a sentence or more; names once."""
    seen = set()
    for module in _modules():
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):
            continue
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or node.name in seen or len(node.body) < 2:
                continue
            docstring, written = ast.get_docstring(node) or "", node.body[0]
            end = written.end_lineno or 0
            body = "\n".join(lines[end : node.end_lineno])
            if (
                60 < len(docstring) < 1200
                and 2 <= len(body.strip().splitlines()) <= 22
                and written.lineno != node.lineno
            ):
                seen.add(node.name)
                head = textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))
                indent = len(lines[node.lineno - 1]) - len(lines[node.lineno - 1].lstrip())
                yield {"prompt": head + "\n", "response": "\n".join(line[indent:] for line in body.split("\n"))}


def _modules() -> Iterator[ModuleType]:
    names = MODULES.split()
    for name in PACKAGES.split():
        package = importlib.import_module(name)
        found = sorted(each.name for each in pkgutil.walk_packages(package.__path__, f"{name}."))
        names += [each for each in found if "test" not in each and "bench" not in each]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            try:
                yield importlib.import_module(name)
            except ImportError:
                continue


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_rows(file, ({key: row[key] for key in row if key in COLUMNS} for row in rows))


def _unlabelled(prompt: str, category: str, *responses: str) -> dict[str, Any]:
    return {"prompt": prompt, "category": category, "responses": list(responses)}


def _answer(row: dict[str, Any]) -> dict[str, str]:
    return {"prompt": row["prompt"], "response": row["chosen"], "category": row["category"]}


def _short(row: dict[str, Any]) -> bool:
    return sum(len(row[key]) for key in ("prompt", "chosen", "rejected")) < 2400


def _sample(rng: random.Random, rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return rng.sample(rows, min(count, len(rows)))


if __name__ == "__main__":
    sys.exit(main())
