"""How long questions about one long input take: /v1/decisions, as many calls of /score, and vLLM's /v1/systemone.

    python -m bench.decision_speed [--model NAME] [--questions 1 4 16] [--tokens 1000] [--rounds 5] [--json FILE]
    python -m bench.decision_speed --vllm     a Qwen3 with random weights, by this service and by an installed vLLM

Each turn has an input of its own, so that only the questions of one turn have anything in common; the service keeps no
scores. Rounds are interleaved and medians printed. vLLM runs with its defaults but for bfloat16 and the length of the
context; its prompts are worded in its own way, and about as long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import httpx
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from bench.service import texts
from bench.support.process import free_port, running, running_service, wait_for_status
from bench.support.random_qwen3 import write_qwen3
from client.runtime.files import write_whole
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer

QUESTIONS: Final = (
    "Is the text polite?",
    "Is the text in English?",
    "Does the text hold a number?",
    "Is the text about a person?",
    "Does the text hold code?",
    "Does the text give advice?",
    "Is the text angry?",
    "Does the text name a country?",
    "Is the text a story?",
    "Does the text ask a question?",
    "Is the text about money?",
    "Does the text hold a list?",
    "Is the text dangerous?",
    "Is the text about science?",
    "Does the text make a joke?",
    "Is the text well written?",
)
TIMEOUT: Final = 3600.0
VLLM_FLAGS: Final = ("--dtype", "bfloat16", "--max-model-len", "4096", "--served-model-name", "judge")
VLLM_MEMORY: Final = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}

Way: TypeAlias = Callable[[str, Sequence[str]], None]
"""Has all questions about a text answered."""


@dataclass(slots=True)
class Timed:
    """The seconds that a way took for some questions about one input, in each round."""

    way: str
    questions: int
    seconds: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way and print the table. Raises httpx.HTTPStatusError if a request is not answered."""
    args = _parser().parse_args(argv)
    with ExitStack() as stack:
        folder = models.resolve(args.model).path
        tokenizer = load_tokenizer(folder)
        if args.vllm:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_qwen3(folder, tokenizer)
        ways = dict(stack.enter_context(_own_ways(folder)))
        if args.vllm:
            ways["vLLM /v1/systemone"] = stack.enter_context(_vllm(folder))
        timed = measure(ways, args.questions, args.rounds, inputs(tokenizer, args.tokens))
    name = "random Qwen3-0.6B" if args.vllm else args.model
    Console(width=130).print(
        _table(timed, f"{name}: an input of {args.tokens} tokens, medians of {args.rounds} rounds")
    )
    if args.json:
        write_whole(args.json, json.dumps([asdict(each) for each in timed], indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="qwen2.5-coder-0.5b-instruct", help="known name, hub id or folder; with --vllm its tokenizer"
    )
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 4, 16], help="about one input, up to 16")
    parser.add_argument("--tokens", type=int, default=1000, help="length of the input (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, whose median is printed (default: 5)")
    parser.add_argument("--vllm", action="store_true", help="random weights, and vLLM beside this service")
    parser.add_argument("--json", type=Path, help="also write every round there")
    return parser


def inputs(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Iterator[str]:
    """Texts of about so many tokens, each of them new and beginning differently, the same in every run."""
    rows = texts(1000)
    words = tokenizer.encode("\n\n".join(f"{row.prompt}\n{row.response}" for row in rows), add_special_tokens=False)
    for start in range(0, len(words) - tokens, tokens):
        yield str(tokenizer.decode(words[start : start + tokens]))


@contextmanager
def _own_ways(folder: Path) -> Iterator[dict[str, Way]]:
    flags = ("--model", str(folder), "--cache-entries", "0", "--request-timeout", str(TIMEOUT))
    with (
        running_service(*flags, start_timeout=TIMEOUT) as service,
        httpx.Client(base_url=service.url, timeout=TIMEOUT) as http,
        ThreadPoolExecutor(len(QUESTIONS)) as pool,
    ):

        def score(text: str, question: str) -> None:
            _post(http, "/score", {"template": "predicate", "prompt": text, "response": question})

        def decisions(text: str, questions: Sequence[str]) -> None:
            asked = [{"type": "predicate", "instructions": question} for question in questions]
            _post(http, "/v1/decisions", {"model": "judge", "input": text, "questions": asked})

        def one_by_one(text: str, questions: Sequence[str]) -> None:
            for question in questions:
                score(text, question)

        def at_once(text: str, questions: Sequence[str]) -> None:
            list(pool.map(lambda question: score(text, question), questions))

        yield {"/v1/decisions": decisions, "/score, one after another": one_by_one, "/score, all at once": at_once}


@contextmanager
def _vllm(folder: Path) -> Iterator[Way]:
    for name, value in VLLM_MEMORY.items():
        os.environ.setdefault(name, value)
    port = str(free_port())
    command = ("vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1", "--port", port)
    url = f"http://127.0.0.1:{port}"
    with running(*command, *VLLM_FLAGS) as process, httpx.Client(base_url=url, timeout=TIMEOUT) as http:
        wait_for_status(f"{url}/health", 200, process, 900)

        def systemone(text: str, questions: Sequence[str]) -> None:
            asked = {f"q{n}": {"type": "noul", "instructions": question} for n, question in enumerate(questions)}
            _post(http, "/v1/systemone", {"model": "judge", "state": text, "questions": asked})

        yield systemone


def _post(http: httpx.Client, path: str, body: object) -> None:
    http.post(path, json=body).raise_for_status()


def measure(ways: dict[str, Way], counts: Sequence[int], rounds: int, inputs: Iterator[str]) -> list[Timed]:
    """Time each way with each number of questions, in turn, after a round that does not count."""
    timed = [Timed(way, count) for count in counts for way in ways]
    turns = [(number, each) for number in range(rounds + 1) for each in timed]
    for number, each in track(turns, "turns", console=Console(stderr=True)):
        text, questions = next(inputs), QUESTIONS[: each.questions]
        started = time.perf_counter()
        ways[each.way](text, questions)
        if number:
            each.seconds.append(time.perf_counter() - started)
    return timed


def _table(timed: Sequence[Timed], title: str) -> Table:
    table = Table("questions", "way", title=title, box=MARKDOWN)
    for name in ("seconds", "lowest to highest", "questions/s", "against /v1/decisions"):
        table.add_column(name, justify="right")
    medians = {(each.way, each.questions): statistics.median(each.seconds) for each in timed}
    for each in timed:
        median = medians[each.way, each.questions]
        spread = f"{min(each.seconds):.2f} to {max(each.seconds):.2f}"
        ratio = median / medians["/v1/decisions", each.questions]
        table.add_row(
            str(each.questions), each.way, f"{median:.2f}", spread, f"{each.questions / median:.1f}", f"{ratio:.2f}"
        )
    return table


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
