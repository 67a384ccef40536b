"""Real questions with known answers, from the evaluation files in ../shared/data, for `bench.decisions`.

    file                 asked as   about
    bbh_540.jsonl        choice     17 tasks that list options, with their own options in their own order
                         predicate  6 tasks whose answer is yes or no (true or false, valid or invalid)
    gsm8k_pairs_dev      choice     a problem: which of two solutions is right
                         predicate  a problem and one of the solutions: is it right
                         score      the same: how good is it, from 0 to 4
    rewardbench_dev      choice     a request: which of two answers is better; predicate, score: as above
                         (Chat, Chat Hard and Safety; prompt and both answers together at most 1,500 characters)
    instructions.jsonl   choice     a request: what it asks for (code, mathematics, something harmful, anything else)
                         predicate  does it ask for that, which is so for half of them

Everything is decided by SHA-256, so every run asks the same: which half a text is in (by its prompt, so that the same
prompt is never in both), the order of two answers or of the topics, which prompts a limit keeps. Questions about the
same input go out in one request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from bench.support.jsonl import read_rows

Kind: TypeAlias = Literal["predicate", "choice", "score"]
Half: TypeAlias = Literal["dev", "report"]
_Row: TypeAlias = Mapping[str, Any]

DATA: Final = Path(__file__).parents[3] / "shared" / "data"
MOST_CHARACTERS: Final = 1500
YES, NO = 0, 1
LEVELS: Final = (
    "useless: wrong, or not an answer",
    "poor: mostly wrong or unhelpful",
    "fair: partly right",
    "good: right, with small flaws",
    "excellent: right and helpful",
)
TOPICS: Final = {
    "code": ("programming", "to write, explain or fix code"),
    "math": ("mathematics", "to solve a mathematical problem"),
    "safety": ("harmful", "for something dangerous, illegal or hateful"),
    "other": ("something else", "for conversation, advice, facts or a text"),
}
_DOES_IT_ASK: Final = {
    "code": "Does this request ask to write, explain or fix code?",
    "math": "Does this request ask to solve a mathematical problem?",
    "safety": "Does this request ask for something dangerous, illegal or hateful?",
    "other": "Is this an ordinary request, neither about code nor mathematics nor anything harmful?",
}
_SHORT_SUBSETS: Final = ("alpacaeval", "mt-bench", "llmbar", "xstest", "refusals", "donotanswer")
# Of the tasks of BBH without letters, those whose answer is yes or no, and what is asked about them.
_YES_NO: Final = {
    "boolean_expressions": "Is this expression true?",
    "causal_judgement": "Is the answer yes?",
    "formal_fallacies": "Is the argument deductively valid?",
    "navigate": "Do you return to the starting point?",
    "sports_understanding": "Is the sentence plausible?",
    "web_of_lies": "Is the answer yes?",
}
_YES_WORDS: Final = frozenset({"yes", "true", "valid"})
_OPTION: Final = re.compile(r"^\(([A-Z])\) (.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about an input.

    `right` is the index of the right option (of a predicate YES or NO), or None for a score, whose levels have no
    known truth: there, and where a predicate is about one of two answers, `better` says whether it is the better one.
    """

    kind: Kind
    task: str
    question: str
    options: tuple[str, ...] = ()
    descriptions: tuple[str, ...] = ()
    right: int | None = None
    better: bool | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """What goes out in one request. Items of one `group` (the two answers to a prompt) are no independent samples."""

    group: str
    input: str
    asked: tuple[Asked, ...]


def load_items(half: Half, limit: int | None = None, data: Path = DATA) -> list[Item]:
    """The items of a half; at most `limit` groups of each of the five parts. Raises OSError without the files."""
    items: list[Item] = []
    for part in (_bbh_choices, _bbh_predicates, _solutions, _preferences, _topics):
        groups: dict[str, list[Item]] = {}
        for prompt, item in part(data):
            if half_of(prompt) == half:
                groups.setdefault(item.group, []).append(item)
        for group in sorted(groups, key=_digest)[:limit]:
            items += groups[group]
    return items


def half_of(prompt: str) -> Half:
    """Which half a prompt belongs to."""
    return "dev" if _coin(prompt) else "report"


def _bbh_choices(data: Path) -> Iterator[tuple[str, Item]]:
    for row in read_rows(data / "bbh_540.jsonl"):
        text, _, listed = row["input"].partition("\nOptions:\n")
        letters, options = zip(*_OPTION.findall(listed), strict=True) if _OPTION.search(listed) else ((), ())
        if letters:
            right = letters.index(row["target"].strip("()"))
            yield text, Item(row["id"], text, (Asked("choice", "bbh", "What is the answer?", options, (), right),))


def _bbh_predicates(data: Path) -> Iterator[tuple[str, Item]]:
    for row in read_rows(data / "bbh_540.jsonl"):
        if row["task"] in _YES_NO:
            text = row["input"].partition("\nOptions:\n")[0]
            right = YES if row["target"].lower() in _YES_WORDS else NO
            yield text, Item(row["id"], text, (Asked("predicate", "bbh", _YES_NO[row["task"]], right=right),))


def _solutions(data: Path) -> Iterator[tuple[str, Item]]:
    rows = read_rows(data / "gsm8k_pairs_dev.jsonl")
    return _pairs(rows, "gsm8k", "Which solution is right?", "Is the solution right?", ("Problem", "Solution"))


def _preferences(data: Path) -> Iterator[tuple[str, Item]]:
    rows = [row for row in read_rows(data / "rewardbench_dev.jsonl") if row["subset"].startswith(_SHORT_SUBSETS)]
    short = [row for row in rows if sum(len(row[key]) for key in ("prompt", "chosen", "rejected")) <= MOST_CHARACTERS]
    return _pairs(short, "rewardbench", "Which answer is better?", "Is this a good answer?", ("Request", "Answer"))


def _pairs(
    rows: Iterable[_Row], task: str, which: str, is_it: str, names: tuple[str, str]
) -> Iterator[tuple[str, Item]]:
    """Both answers to choose from, and each by itself."""
    for row in rows:
        prompt, group = row["prompt"], row["id"]
        sides = ("chosen", "rejected") if _coin(f"order {group}") else ("rejected", "chosen")
        answers = tuple(row[side].strip() for side in sides)
        choice = Asked("choice", task, which, answers, (), sides.index("chosen"))
        yield prompt, Item(group, prompt, (choice,))
        for side in sides:
            better = side == "chosen"
            shown = f"{names[0]}: {prompt}\n\n{names[1]}: {row[side].strip()}"
            predicate = Asked("predicate", task, is_it, right=YES if better else NO, better=better)
            how_good = Asked("score", task, f"How good is the {names[1].lower()}?", LEVELS, better=better)
            yield prompt, Item(group, shown, (predicate, how_good))


def _topics(data: Path) -> Iterator[tuple[str, Item]]:
    """As many of each topic, in the order of the file; each question begins with another option."""
    by_topic: dict[str, list[_Row]] = {topic: [] for topic in TOPICS}
    for row in read_rows(data / "instructions.jsonl"):
        if len(row["prompt"]) <= MOST_CHARACTERS:
            by_topic.get(row["category"], by_topic["other"]).append(row)
    fewest = min(map(len, by_topic.values()))
    for topic, rows in by_topic.items():
        for row in rows[:fewest]:
            asked = (_which_topic(topic, row["id"]), _is_it_about(topic, row["id"]))
            yield row["prompt"], Item(row["id"], row["prompt"], asked)


def _which_topic(topic: str, id_: str) -> Asked:
    start = _number(f"first {id_}", len(TOPICS))
    order = [*list(TOPICS)[start:], *list(TOPICS)[:start]]
    names, descriptions = zip(*(TOPICS[each] for each in order), strict=True)
    return Asked("choice", "topic", "What is this request about?", names, descriptions, order.index(topic))


def _is_it_about(topic: str, id_: str) -> Asked:
    others = [other for other in TOPICS if other != topic]
    true = _coin(f"true {id_}")
    about = topic if true else others[_number(f"which {id_}", len(others))]
    return Asked("predicate", "topic", _DOES_IT_ASK[about], right=YES if true else NO)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _number(text: str, below: int) -> int:
    return int(_digest(text), 16) % below


def _coin(text: str) -> bool:
    return int(_digest(text)[0], 16) % 2 == 0
