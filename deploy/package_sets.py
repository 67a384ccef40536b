"""The sets of extras that users take, and what each is for: done for real, with tiny models and a fake engine."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from client.commands.catalog import GROUPS
from deploy.environment import Environment
from deploy.processes import CheckError
from tests.support.fleet import Fleet
from tests.support.tiny import make_tiny_model

Say = Callable[[str], None]
ASK: Final = ("--prompt", "What is 2+2?", "--response", "4")
# A user's program: it must run, and pass `mypy --strict` without any setting for this package.
PROGRAM: Final = """
import asyncio
import sys

from client import AsyncJudge, Judge, JudgeError, ScoreRequest


def ask(url: str) -> float:
    with Judge(url) as judge:
        score: float = judge.score(prompt="What is 2+2?", response="4").score
        return score


async def ask_many(url: str) -> list[float]:
    requests = [ScoreRequest(prompt="What is 2+2?", response=response) for response in ("4", "5")]
    async with AsyncJudge(url) as judge:
        return [result.score for result in await judge.score_many(requests) if not isinstance(result, JudgeError)]


if __name__ == "__main__":
    print(ask(sys.argv[1]), *asyncio.run(ask_many(sys.argv[1])))
"""
MISUSE: Final = "from client import Judge\n\nwrong: int = Judge('http://x').score(prompt=1, response='4')\n"
TINY_TRAINING: Final = ("--device", "cpu", "--dtype", "float32", "--batch", "8", "--rank", "8", "--epochs", "1")


@dataclass(frozen=True, slots=True)
class InstallSet:
    """Extras, whom they are for, the commands that must run with them, and their use."""

    extras: str
    about: str
    commands: Sequence[str]
    use: Callable[[Environment, Say], None]


def use_client(environment: Environment, say: Say) -> None:
    """Ask a service from the shell and from a typed program."""
    program, misuse = environment.work / "program.py", environment.work / "misuse.py"
    program.write_text(PROGRAM, "utf-8")
    misuse.write_text(MISUSE, "utf-8")
    with _fake_service(environment) as url:
        _ask(environment, url)
        scores = environment.call("python", str(program), url).split()
    if len(scores) != 3:
        raise CheckError(f"the program printed {scores}")
    say("judge score and a program with Judge and AsyncJudge, against a service")
    environment.pip("mypy")
    environment.call("mypy", "--strict", str(program))
    try:
        environment.call("mypy", "--strict", str(misuse))
    except CheckError as error:
        if "arg-type" not in str(error) or "assignment" not in str(error):
            raise
        say("mypy --strict passes the program, and refuses a wrong one: the types are installed")
        return
    raise CheckError("mypy --strict passes a program with wrong types: the package is not typed")


def use_service(environment: Environment, say: Say) -> None:
    """Serve the fake engine, with the page, and ask it."""
    with environment.serving("--engine", "fake") as (url, _):
        _ask(environment, url)
        page = _get(url)
        scripts = re.findall(r'(?:src|href)="([\w./]+\.(?:js|css|svg))"', page)
        if not scripts or not all(_get(f"{url}/{name.removeprefix('/')}") for name in scripts):
            raise CheckError(f"the page at / lacks its files: {scripts}")
    say("judge serve --engine fake with its page, asked by judge score; SIGTERM ends it with 0")


def use_torch(environment: Environment, say: Say) -> None:
    """Serve a tiny model, and ask it. Rounded weights and two heads, so that the compiled prefill can take it."""
    model = make_tiny_model(environment.work / "model", heads=2, rounded=True)
    with environment.serving("--model", str(model)) as (url, log):
        _ask(environment, url)
        rung = re.search(r"rung=([\w-]+)", log.read_text("utf-8"))
    say(f"judge serve with a tiny model, asked by judge score; rung on this machine: {rung[1] if rung else 'unknown'}")


def use_benchmarks(environment: Environment, say: Say) -> None:
    """Three pairs of a parquet file, against the fake engine."""
    rows = [{"prompt": f"What is {n}+1?", "chosen": f"{n + 1}", "rejected": "fish"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), environment.work / "pairs.parquet")
    with _fake_service(environment) as url:
        flags = ("--judge-url", url, "--data", "pairs.parquet", "--out", "run")
        environment.call("judge", "bench", "pairs", *flags)
    _require(environment.work / "run", "summary.json", "report.html")
    say("judge bench pairs on three pairs of a parquet file: summary and report")


def use_trainer(environment: Environment, say: Say) -> None:
    """A tiny judge from toy labels, and a tiny model from examples."""
    model = make_tiny_model(environment.work / "model")
    pairs = [{"prompt": f"Question {n}", "chosen": f"Paris is {n}", "rejected": f"fox {n} dog"} for n in range(20)]
    _write(environment.work / "pairs.jsonl", pairs)
    _write(environment.work / "data.jsonl", [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs])
    base = ("--model", str(model), *TINY_TRAINING)
    environment.call("judge", "sft", *base, "--data", "data.jsonl", "--output", "sft")
    environment.call(
        *("judge", "tune", *base, "--pairs", "pairs.jsonl", "--held-out", "0.5", "--merge-dtype", "float32"),
        *("--output", "tuned"),
    )
    _require(environment.work / "tuned", "report.html", "merged/config.json")
    say("judge sft and judge tune on a tiny model: adapter, merged judge, report")


def use_evaluation(environment: Environment, say: Say) -> None:
    """Two instructions of IFEval's form: one of its checkers, and NLTK's sentence model."""
    model = make_tiny_model(environment.work / "model")
    checks = [
        ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 1}),
        ("punctuation:no_comma", {}),
    ]
    rows = [
        {"key": n, "prompt": "Write.", "instruction_id_list": [name], "kwargs": [arguments]}
        for n, (name, arguments) in enumerate(checks)
    ]
    _write(environment.work / "ifeval.jsonl", rows)
    environment.call(
        *("judge", "evaluate", "--base", str(model), "--new", str(model), "--output", "out", "--judge-url"),
        *("http://127.0.0.1:9", "--tasks", "ifeval", "--ifeval", "ifeval.jsonl", "--device", "cpu"),
        *("--dtype", "float32", "--task-max-new-tokens", "6"),
    )
    scores = json.loads((environment.work / "out" / "metrics.json").read_bytes())["tasks"]["scores"]["ifeval"]
    if scores["new"]["missing"]:
        raise CheckError(f"items of IFEval could not be checked: {scores}")
    say("judge evaluate --tasks ifeval on a tiny model, without a judge")


@contextmanager
def _fake_service(environment: Environment) -> Iterator[str]:
    """The URL of a service that runs from the checkout, as the environment lacks what it needs."""
    with Fleet(environment.work) as fleet:
        api = fleet.api()
        fleet.wait_ready()
        yield api.url


def _ask(environment: Environment, url: str) -> None:
    said = environment.call("judge", "score", "--judge-url", url, *ASK)
    if not re.search(r"\d\.\d", said):
        raise CheckError(f"judge score printed no score: {said}")


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def _write(file: Path, rows: Sequence[object]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _require(folder: Path, *names: str) -> None:
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckError(f"{folder.name} lacks {', '.join(absent)}")


_CLIENT: Final = ("score", "compare", "label", "calibrate", "completion")
_SERVE: Final = tuple(GROUPS["Serve a judge"])
_MEASURE: Final = tuple(GROUPS["Measure it"])
_TRAIN: Final = tuple(GROUPS["Train with it"])
SETS: Final = {
    "none": InstallSet("", "no extra: a client alone, and its types under mypy --strict", _CLIENT, use_client),
    "service": InstallSet("service", "the HTTP process; the model runs elsewhere", (*_CLIENT, *_SERVE), use_service),
    "torch": InstallSet("service,torch", "a judge on this machine", (*_CLIENT, *_SERVE), use_torch),
    "benchmarks": InstallSet("benchmarks,hub", "benchmarks, reports, data sets by name", _MEASURE, use_benchmarks),
    "trainer": InstallSet("trainer", "training judges and models", _TRAIN, use_trainer),
    "evaluation": InstallSet("trainer,evaluation", "the trainer with IFEval's checkers", _TRAIN, use_evaluation),
}
