"""How much of a GPU the judge uses: vLLM by itself, our engine on it, the worker, the whole stack; the torch engine.

    bench/gpu.sh [8b|1b|tiny] [prompts in a round]                 all of it, one process for each way
    python -m bench.gpu WAY --model FOLDER …                       one way; a line of JSON

The model has a Llama's shape and random weights, on which speed does not depend. All ways get the same prompts of
`--tokens` tokens, new ones in each round, so that only the template's head is cached. The share of the peak is the
model's multiplications against the fastest bf16 matrix product measured on the same device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.support.process import running, running_service
from bench.support.random_llama import SHAPES, write_model
from client import Judge, JudgeError
from client.schema import ScoreRequest
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.torch.engine import TorchEngine
from service.engine.vllm.config import VllmOptions, engine_arguments, prepare_environment
from service.engine.vllm.engine import VllmEngine
from service.judge.template_files import load_library
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder
from service.queue.contract import Job, Priority
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler
from tests.support.redis_server import running_redis

MAX_TOKENS: Final = 2047
BATCH: Final = 200
CALLERS: Final = 8
# Judgements that the worker may take at once: enough to fill the engine's batch of tokens.
BATCH_JOBS: Final = 1024
WORDS: Final = ["answer", "question", "good", "time", "people", "number", "first", "water", "long", "day"]


@dataclass(frozen=True, slots=True)
class Options:
    """The command line; its help says what each is."""

    way: str
    model: Path
    shape: str
    prompts: int
    tokens: int
    rounds: int
    vllm_args: Mapping[str, Any]
    results: Path

    @property
    def vllm(self) -> VllmOptions:
        """The same for all ways through vLLM."""
        return VllmOptions(task="labels", max_tokens=MAX_TOKENS, dtype="bfloat16", extra=dict(self.vllm_args))


def parse(argv: Sequence[str] | None) -> Options:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["model", "peak", *WAYS, "report"])
    parser.add_argument("--model", type=Path, help="folder of the model; `model` writes it")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=2000, help="prompts in a round (2000)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a prompt (400)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, after one that is not counted (3)")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    parser.add_argument("--results", type=Path, help="the lines of JSON, for `report`")
    return Options(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; `gpu.sh` runs them all."""
    options = parse(argv)
    if options.way == "report":
        return report(options.results)
    if options.way == "model":
        write_model(options.model, options.shape, MAX_TOKENS + 1)
        return 0
    result = {"tflops": peak()} if options.way == "peak" else measure(options)
    print(json.dumps({"way": options.way, **result}))
    return 0


def peak() -> float:
    """TFLOP/s of the fastest large bf16 matrix product, the best of ten."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    best = 0.0
    for size in (4096, 8192, 16_384) if cuda else (1024, 2048):
        a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        for _ in range(10):
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            a @ b
            if cuda:
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best / 1e12


@dataclass(frozen=True, slots=True)
class Round:
    """The same prompts as requests for HTTP, and as items for an engine."""

    requests: list[ScoreRequest]
    items: list[ScoreItem]


Run = Callable[[Round], None]


def measure(options: Options) -> dict[str, Any]:
    """One way over all rounds: prompts and tokens per second, and TFLOP/s."""
    rounds = [make_round(options, seed) for seed in range(options.rounds + 1)]
    seconds = []
    with WAYS[options.way](options) as run:
        for work in rounds:
            started = time.perf_counter()
            run(work)
            seconds.append(time.perf_counter() - started)
    lengths = [len(item.token_ids) for item in rounds[-1].items]
    median = statistics.median(seconds[1:])
    return {
        "prompts_per_second": len(lengths) / median,
        "tokens_per_second": sum(lengths) / median,
        "tflops": sum(map(_flop(options.model), lengths)) / median / 1e12,
        "seconds": seconds[1:],
        "tokens": sum(lengths),
    }


def make_round(options: Options, seed: int) -> Round:
    """New prompts of about `options.tokens` tokens: a word of WORDS is one token."""
    rng = random.Random(seed)
    builder = PromptBuilder(load_tokenizer(options.model), MAX_TOKENS)
    template = load_library("chat").default("pointwise")
    frame = len(builder.build(template, "word", ["word"], "error").token_ids) - 2
    asked = options.tokens // 8
    requests = [
        ScoreRequest(
            prompt=" ".join(rng.choices(WORDS, k=asked)),
            response=" ".join(rng.choices(WORDS, k=max(1, options.tokens - frame - asked))),
        )
        for _ in range(options.prompts)
    ]
    prompts = [builder.build(template, str(request.prompt), [request.response], "error") for request in requests]
    return Round(requests, [ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries) for prompt in prompts])


def _flop(model: Path) -> Callable[[int], float]:
    """The multiplications and additions of a prompt of n tokens: weights, attention, output layer."""
    config = json.loads((model / "config.json").read_text())
    hidden_size, layers = config["hidden_size"], config["num_hidden_layers"]
    shared = config["num_key_value_heads"] / config["num_attention_heads"]
    weights = layers * hidden_size * (hidden_size * (2 + 2 * shared) + 3 * config["intermediate_size"])
    return lambda n: 2 * weights * n + 2 * layers * hidden_size * n * n + 2 * hidden_size * config["vocab_size"]


@contextmanager
def through_vllm(options: Options) -> Iterator[Run]:
    """vLLM's own offline interface; only its arguments and the labels are ours."""
    prepare_environment(options.vllm)
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(options.model, options.vllm)
    del arguments["data_parallel_size"]
    llm = LLM(**arguments)

    def run(work: Round) -> None:
        prompts = [{"prompt_token_ids": list(item.token_ids)} for item in work.items]
        params = [
            SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(item.label_ids), detokenize=False)
            for item in work.items
        ]
        llm.generate(prompts, params, use_tqdm=False)

    yield run


@contextmanager
def through_engine(options: Options) -> Iterator[Run]:
    """Our engine on vLLM, all prompts in one call."""
    with closing(VllmEngine.load(options.model, options.vllm)) as engine:
        yield lambda work: _check(engine.run(work.items))


@contextmanager
def through_torch(options: Options) -> Iterator[Run]:
    """The torch engine, all prompts in one call."""
    with closing(TorchEngine.load(options.model, dtype="bfloat16")) as engine:
        yield lambda work: _check(engine.run(work.items))


@contextmanager
def through_worker(options: Options) -> Iterator[Run]:
    """Queue, scheduler and worker in this process, over our engine."""
    with closing(VllmEngine.load(options.model, options.vllm)) as engine, asyncio.Runner() as runner:
        queue = MemoryQueue(10**6, 10**9)
        runner.run(queue.open())
        worker = Worker(engine, queue, Scheduler(engine.info.batch_tokens, BATCH_JOBS, 0.001), Metrics())
        stop = threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        try:
            yield lambda work: runner.run(_through_queue(queue, work.items))
        finally:
            stop.set()
            thread.join()
            runner.run(queue.close())


async def _through_queue(queue: MemoryQueue, items: Sequence[ScoreItem]) -> None:
    now = time.monotonic()
    jobs = [Job(f"{now}-{number}", item, now + 3600, now, Priority.BULK) for number, item in enumerate(items)]
    replies = await asyncio.gather(*await queue.submit(jobs))
    _check([reply.outcome for reply in replies])


@contextmanager
def through_stack(options: Options) -> Iterator[Run]:
    """HTTP, Redis and a worker process: batches of 200 from 8 callers."""
    with running_redis() as redis:
        model = ("--engine", "vllm", "--model", str(options.model), "--max-tokens", str(MAX_TOKENS))
        shared = (*model, "--queue-url", redis.url, "--log-level", "warning")
        engine = ("--dtype", "bfloat16", "--batch-jobs", str(BATCH_JOBS), "--vllm-args", json.dumps(options.vllm_args))
        patient = ("--cache-entries", "0", "--request-timeout", "3600")
        with (
            running("service.worker", *shared, *engine),
            running_service(*shared, *patient, start_timeout=1800) as service,
            Judge(service.url, timeout=3600) as judge,
            ThreadPoolExecutor(CALLERS) as pool,
        ):
            yield lambda work: _through_http(judge, pool, work.requests)


def _through_http(judge: Judge, pool: ThreadPoolExecutor, requests: Sequence[ScoreRequest]) -> None:
    batches = [list(requests[start : start + BATCH]) for start in range(0, len(requests), BATCH)]
    for results in pool.map(judge.score_batch, batches):
        failed = [result for result in results if isinstance(result, JudgeError)]
        if failed:
            raise failed[0]


def _check(answers: Sequence[object]) -> None:
    """Raises RuntimeError unless every item was judged: failures are fast, and must not count."""
    failed = [answer for answer in answers if not isinstance(answer, LabelLogprobs)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} prompts were not judged: {failed[0]}")


WAYS: Final[dict[str, Callable[[Options], AbstractContextManager[Run]]]] = {
    "vllm": through_vllm,
    "engine": through_engine,
    "worker": through_worker,
    "stack": through_stack,
    "torch": through_torch,
}


def report(path: Path) -> int:
    """A table of the lines in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    results = {line["way"]: line for line in lines}
    top = results["peak"]["tflops"]
    alone = results["vllm"]["prompts_per_second"] if "vllm" in results else None
    tokens = max(line["tokens"] for line in lines if line["way"] != "peak")
    title = f"{tokens:,} tokens a round; measured bf16 peak {top:,.1f} TFLOP/s"
    table = Table("way", "prompts/s", "tokens/s", "TFLOP/s", "of the peak", "of vLLM alone", title=title)
    for way in (way for way in WAYS if way in results):
        result = results[way]
        speed, share = result["prompts_per_second"], result["tflops"] / top
        numbers = [f"{speed:,.1f}", f"{result['tokens_per_second']:,.0f}", f"{result['tflops']:,.2f}", f"{share:.1%}"]
        table.add_row(way, *numbers, f"{speed / alone:.1%}" if alone else "")
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
