"""How much of a GPU the judge uses: vLLM by itself, our engine on it, worker, whole stack; and the torch engine, in
padded batches.

    bench/gpu.sh [8b|1b|tiny] [prompts in a round]                 all of it, one process for each way
    python -m bench.gpu WAY --model FOLDER …                       one way; a line of JSON

The model has random weights in the shape of a Llama: speed does not depend on them. All ways read the same prompts, of
`--tokens` tokens each, and new ones in each round, so that nothing but the template's head is known from before. The
share of the peak is the model's multiplications against the fastest bf16 matrix product measured on the same device.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.support.process import running, running_service
from client import Judge, JudgeError
from client.schema import ScoreRequest
from service.engine.contract import LabelLogprobs, ScoreItem
from service.engine.fake import fake_tokenizer
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

# Layers, width, inner width, heads, heads of keys and values, vocabulary.
SHAPES: Final = {
    "8b": (32, 4096, 14336, 32, 8, 128_256),
    "1b": (16, 2048, 8192, 32, 8, 128_256),
    "tiny": (2, 128, 256, 2, 1, 2048),
}
MAX_TOKENS: Final = 2047
BATCH: Final = 200
CALLERS: Final = 8
# Judgements that the worker may take at once: what the engine's batch of tokens holds.
BATCH_JOBS: Final = 1024
WORDS: Final = ["answer", "question", "good", "time", "people", "number", "first", "water", "long", "day"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one step; `gpu.sh` runs them all."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["model", "peak", *WAYS, "report"])
    parser.add_argument("--model", type=Path, help="folder of the model; `model` writes it")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--prompts", type=int, default=2000, help="in each round")
    parser.add_argument("--tokens", type=int, default=400, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=3, help="after one that is not counted")
    parser.add_argument("--vllm-args", type=json.loads, default={}, help="JSON object for vLLM's engine")
    parser.add_argument("--results", type=Path, help="the lines of JSON, for `report`")
    args = parser.parse_args(argv)
    if args.way == "report":
        return report(args.results)
    if args.way == "model":
        write_model(args.model, args.shape)
        return 0
    result = {"tflops": peak()} if args.way == "peak" else measure(args)
    print(json.dumps({"way": args.way, **result}))
    return 0


def write_model(folder: Path, shape: str) -> None:
    """A Llama of this shape with random bf16 weights, and a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, inner, heads, key_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=MAX_TOKENS + 1,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    LlamaForCausalLM(config).save_pretrained(folder)
    fake_tokenizer(MAX_TOKENS + 1).save_pretrained(folder)


def peak() -> float:
    """TFLOP/s of the fastest of some large bf16 matrix products, the best of ten."""
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
    """The same work as it is sent over HTTP, and as an engine gets it."""

    texts: list[ScoreRequest]
    items: list[ScoreItem]


Run = Callable[[Round], None]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One way over all rounds: prompts and tokens per second, and TFLOP/s."""
    rounds = [make_round(args, seed) for seed in range(args.rounds + 1)]
    seconds = []
    with WAYS[args.way](args) as run:
        for each in rounds:
            started = time.perf_counter()
            run(each)
            seconds.append(time.perf_counter() - started)
    lengths = [len(item.token_ids) for item in rounds[-1].items]
    median = statistics.median(seconds[1:])
    return {
        "prompts_per_second": len(lengths) / median,
        "tokens_per_second": sum(lengths) / median,
        "tflops": sum(map(_work(args.model), lengths)) / median / 1e12,
        "seconds": seconds[1:],
        "tokens": sum(lengths),
    }


def make_round(args: argparse.Namespace, seed: int) -> Round:
    """New texts whose prompts have about `args.tokens` tokens: a word of WORDS is one token."""
    rng = random.Random(seed)
    builder = PromptBuilder(load_tokenizer(args.model), MAX_TOKENS)
    template = load_library("chat").default("pointwise")
    frame = len(builder.build(template, "word", ["word"], "error").token_ids) - 2
    asked = args.tokens // 8
    texts = [
        ScoreRequest(
            prompt=" ".join(rng.choices(WORDS, k=asked)),
            response=" ".join(rng.choices(WORDS, k=max(1, args.tokens - frame - asked))),
        )
        for _ in range(args.prompts)
    ]
    prompts = [builder.build(template, str(text.prompt), [text.response], "error") for text in texts]
    return Round(texts, [ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries) for prompt in prompts])


def _work(model: Path) -> Callable[[int], float]:
    """The multiplications and additions of a prompt of n tokens: weights, attention, output layer."""
    config = json.loads((model / "config.json").read_text())
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shared = config["num_key_value_heads"] / config["num_attention_heads"]
    weights = layers * (width * width * (2 + 2 * shared) + 3 * width * inner)
    return lambda n: 2 * weights * n + 2 * layers * width * n * n + 2 * width * config["vocab_size"]


@contextmanager
def through_vllm(args: argparse.Namespace) -> Iterator[Run]:
    """vLLM's own offline interface, with nothing of ours but its arguments and the labels."""
    options = vllm_options(args)
    prepare_environment(options)
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(args.model, options)
    del arguments["data_parallel_size"]
    llm = LLM(**arguments)

    def run(each: Round) -> None:
        prompts = [{"prompt_token_ids": list(item.token_ids)} for item in each.items]
        params = [
            SamplingParams(max_tokens=1, temperature=0, logprob_token_ids=list(item.label_ids), detokenize=False)
            for item in each.items
        ]
        llm.generate(prompts, params, use_tqdm=False)

    yield run


@contextmanager
def through_engine(args: argparse.Namespace) -> Iterator[Run]:
    """Our engine on vLLM, all prompts in one call."""
    with closing(VllmEngine.load(args.model, vllm_options(args))) as engine:
        yield lambda each: _check(engine.run(each.items))


@contextmanager
def through_torch(args: argparse.Namespace) -> Iterator[Run]:
    """The torch engine, all prompts in one call."""
    with closing(TorchEngine.load(args.model, dtype="bfloat16")) as engine:
        yield lambda each: _check(engine.run(each.items))


@contextmanager
def through_worker(args: argparse.Namespace) -> Iterator[Run]:
    """Queue, scheduler and worker in this process, over our engine."""
    with closing(VllmEngine.load(args.model, vllm_options(args))) as engine, asyncio.Runner() as runner:
        queue = MemoryQueue(10**6, 10**9)
        runner.run(queue.open())
        worker = Worker(engine, queue, Scheduler(engine.info.batch_tokens, BATCH_JOBS, 0.001), Metrics())
        stop = threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,))
        thread.start()
        try:
            yield lambda each: runner.run(_through_queue(queue, each.items))
        finally:
            stop.set()
            thread.join()
            runner.run(queue.close())


async def _through_queue(queue: MemoryQueue, work: Sequence[ScoreItem]) -> None:
    now = time.monotonic()
    jobs = [Job(f"{now}-{number}", item, now + 3600, now, Priority.BULK) for number, item in enumerate(work)]
    replies = await asyncio.gather(*await queue.submit(jobs))
    _check([reply.outcome for reply in replies])


@contextmanager
def through_stack(args: argparse.Namespace) -> Iterator[Run]:
    """HTTP, Redis and a worker process: batches of 200 from 8 callers."""
    with running_redis() as redis:
        model = ("--engine", "vllm", "--model", str(args.model), "--max-tokens", str(MAX_TOKENS))
        shared = (*model, "--queue-url", redis.url, "--log-level", "warning")
        engine = ("--dtype", "bfloat16", "--batch-jobs", str(BATCH_JOBS), "--vllm-args", json.dumps(args.vllm_args))
        patient = ("--cache-entries", "0", "--request-timeout", "3600")
        with (
            running("service.worker", *shared, *engine),
            running_service(*shared, *patient, start_timeout=1800) as service,
            Judge(service.url, timeout=3600) as judge,
            ThreadPoolExecutor(CALLERS) as pool,
        ):
            yield lambda each: _through_http(judge, pool, each.texts)


def _through_http(judge: Judge, pool: ThreadPoolExecutor, texts: Sequence[ScoreRequest]) -> None:
    batches = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    for results in pool.map(judge.score_batch, batches):
        failed = [result for result in results if isinstance(result, JudgeError)]
        if failed:
            raise failed[0]


def _check(answers: Sequence[object]) -> None:
    """Raises RuntimeError unless every item was judged: a fast failure is no speed."""
    failed = [answer for answer in answers if not isinstance(answer, LabelLogprobs)]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(answers)} prompts were not judged: {failed[0]}")


def vllm_options(args: argparse.Namespace) -> VllmOptions:
    """The same for all ways through vLLM."""
    return VllmOptions(task="labels", max_tokens=MAX_TOKENS, dtype="bfloat16", extra=args.vllm_args)


WAYS: Final[dict[str, Callable[[argparse.Namespace], AbstractContextManager[Run]]]] = {
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
        one = results[way]
        speed, share = one["prompts_per_second"], one["tflops"] / top
        numbers = [f"{speed:,.1f}", f"{one['tokens_per_second']:,.0f}", f"{one['tflops']:,.2f}", f"{share:.1%}"]
        table.add_row(way, *numbers, f"{speed / alone:.1%}" if alone else "")
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    from client.runtime import program

    program.finish(main)
