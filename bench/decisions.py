"""Typed decisions over HTTP on real questions: how often a judge is right, and how far to trust its probabilities.

    python -m bench.decisions --model NAME [--limit 200] [--rotations 4] [--json FILE]
    python -m bench.decisions --half dev --rotations 1 --wording letter
    python -m bench.decisions --judge-url URL [--api-key KEY]

bench.support.decision_items describes the questions, bench.support.decision_measures the figures. Without --judge-url a
service is started that answers all of them, and then a second one that asks each choice in several rotations of its
options. All answers go into the JSON file, so that other figures can be made of them.

The questions are in two halves: the built-in templates were worded with `dev`, so figures come from `report`.
decision_wordings.toml has the wordings that were tried.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take a while
    from client.runtime import program

    program.begin("python -m bench.decisions", "service")

import argparse
import asyncio
import json
import tempfile
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, get_args

import httpx
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.support.decision_items import DATA, Asked, Half, Item, Kind, load_items
from bench.support.decision_measures import Answered, Estimate, Figures, figures
from bench.support.process import running_service
from client.runs.progress import Progress, progress_bar
from client.runtime.files import write_whole

WORDINGS: Final = Path(__file__).with_name("decision_wordings.toml")
CALLERS: Final = 8
TIMEOUT: Final = 3600.0


@dataclass(frozen=True)  # without slots, for the figures, which take a while
class Run:
    """What a service answered. `name` is the table's word for it, `failures` counts error codes."""

    name: str
    answers: list[Answered]
    failures: Counter[str]

    @cached_property
    def by_part(self) -> dict[tuple[str, str], Figures]:
        """The figures of each kind of question, as a whole ("all") and by task."""
        parts: dict[tuple[str, str], list[Answered]] = {}
        for kind in get_args(Kind):
            for answer in self.answers:
                if answer.asked.kind == kind:
                    parts.setdefault((kind, "all"), []).append(answer)
                    parts.setdefault((kind, answer.asked.task), []).append(answer)
        return {part: figures(answers) for part, answers in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Ask everything and print the table; returns 1 if a question was not answered."""
    args = _parser().parse_args(argv)
    items = load_items(args.half, args.limit, args.data)
    runs = _runs(args, items)
    table = shown(runs, f"{args.judge_url or args.model}, half {args.half}")
    Console(width=230).print(table)
    if args.json:
        write_whole(args.json, json.dumps(_record(args, runs), indent=1))
    failures = sum((run.failures for run in runs), Counter[str]())
    for code, count in failures.items():
        print(f"{count} questions were not answered: {code}")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    judge = parser.add_mutually_exclusive_group()
    judge.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="known name, hub id or folder")
    judge.add_argument("--judge-url", help="a running service, as it is, instead of one that is started")
    parser.add_argument("--api-key", help="that service's")
    parser.add_argument("--half", default="report", choices=get_args(Half), help="which questions (default: report)")
    parser.add_argument("--limit", type=int, default=200, help="prompts of each of the five parts (default: 200)")
    parser.add_argument("--rotations", type=int, default=4, help="of a choice's options; 1: no second service")
    words = tomllib.loads(WORDINGS.read_text("utf-8"))
    parser.add_argument("--wording", choices=list(words), help="of decision_wordings.toml instead of the built-in one")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the evaluation files")
    parser.add_argument("--json", type=Path, help="also write every answer there")
    return parser


def _runs(args: argparse.Namespace, items: Sequence[Item]) -> list[Run]:
    if args.judge_url:
        return [asyncio.run(ask(args.judge_url, items, "as it is", args.api_key))]
    runs = [_own_service(args, items, 1)]
    if args.rotations > 1:
        runs.append(_own_service(args, _only(items, "choice"), args.rotations))
    return runs


def _own_service(args: argparse.Namespace, items: Sequence[Item], rotations: int) -> Run:
    flags = ["--model", args.model, "--choice-rotations", str(rotations), "--request-timeout", str(TIMEOUT)]
    name = "" if rotations == 1 else f"up to {rotations} rotations"
    with tempfile.TemporaryDirectory() as folder:
        if args.wording:
            templates = tomllib.loads(WORDINGS.read_text("utf-8"))[args.wording]
            write_whole(file := Path(folder) / "wording.json", json.dumps({"templates": templates}))
            flags += ["--template-file", str(file)]
        with running_service(*flags, start_timeout=TIMEOUT) as service:
            return asyncio.run(ask(service.url, items, name))


def _only(items: Sequence[Item], kind: Kind) -> list[Item]:
    """The items' questions of one kind."""
    kept = [(item, tuple(asked for asked in item.asked if asked.kind == kind)) for item in items]
    return [Item(item.group, item.input, asked) for item, asked in kept if asked]


async def ask(url: str, items: Sequence[Item], name: str, api_key: str | None = None) -> Run:
    """Send each item as one request, a few at a time."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    run, turns = Run(name, [], Counter()), asyncio.Semaphore(CALLERS)
    with progress_bar(Console(stderr=True), f"decisions {name}".strip()) as show:
        progress = Progress(len(items))
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT) as http:

            async def one(item: Item) -> list[Answered] | str:
                async with turns:
                    answer = await http.post("/v1/decisions", json=body_of(item))
                progress.done += 1
                show(progress)
                return read(item, answer)

            outcomes = await asyncio.gather(*map(one, items))
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, str):
            run.failures[outcome] += len(item.asked)
        else:
            run.answers.extend(outcome)
    return run


def body_of(item: Item) -> dict[str, Any]:
    """The item as a request."""
    return {"model": "judge", "input": item.input, "questions": [_question(asked) for asked in item.asked]}


def _question(asked: Asked) -> dict[str, Any]:
    question: dict[str, Any] = {"type": asked.kind, "instructions": asked.question}
    if asked.kind == "choice":
        described = asked.descriptions or (None,) * len(asked.options)
        pairs = zip(asked.options, described, strict=True)
        question["choices"] = [
            {"value": value, "description": text} if text else {"value": value} for value, text in pairs
        ]
    if asked.kind == "score":
        question["levels"] = [{"label": level} for level in asked.options]
    return question


def read(item: Item, answer: httpx.Response) -> list[Answered] | str:
    """The answers to an item's questions, or the code of the error in their place."""
    content = answer.json()
    if answer.status_code != 200:
        return str(content["error"]["code"])
    return [
        Answered(item.group, asked, _probabilities(asked, found), found["x_label_mass"])
        for asked, found in zip(item.asked, content["answers"], strict=True)
    ]


def _probabilities(asked: Asked, found: dict[str, Any]) -> tuple[float, ...]:
    if asked.kind == "predicate":
        return found["probability"], 1 - found["probability"]
    if asked.kind == "score":
        return tuple(each["probability"] for each in found["probabilities"])
    by_value = {each["value"]: each["probability"] for each in found["probabilities"]}
    return tuple(by_value[option] for option in asked.options)


def shown(runs: Sequence[Run], title: str) -> Table:
    """The table, in percent but for label mass, with 95% intervals in brackets; it is Markdown, for documents."""
    table = Table(title=title, box=MARKDOWN)
    for name in ("question", "about", "answers"):
        table.add_column(name, no_wrap=True)
    for name in (
        "right",
        "by chance",
        "better above worse",
        "AUC",
        "ECE",
        "Brier",
        "even odds",
        "first",
        "label mass, 5%",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        for (kind, task), found in run.by_part.items():
            name = f"{kind}, {run.name}" if run.name else kind
            table.add_row(name, task, str(found.answers), *_cells(found))
    return table


def _cells(found: Figures) -> list[str]:
    return [
        _interval(found.accuracy),
        _percent(found.chance),
        _interval(found.above),
        _interval(found.auc),
        _interval(found.ece),
        _interval(found.brier),
        _percent(found.chance_brier),
        _percent(found.first),
        f"{found.label_mass:.2f}, {found.least_mass:.2f}",
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _interval(found: Estimate | None) -> str:
    return "" if found is None else f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _record(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "settings": {name: value if isinstance(value, int) else str(value) for name, value in vars(args).items()},
        "runs": [
            {
                "name": run.name,
                "figures": {" ".join(part): asdict(found) for part, found in run.by_part.items()},
                "failures": run.failures,
                "answers": [asdict(answer) for answer in run.answers],
            }
            for run in runs
        ],
    }


if __name__ == "__main__":
    program.finish(main)
