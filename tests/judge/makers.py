"""A judge's core without HTTP, over an engine in a thread, and the same numbers by the model's own forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from service.engine.contract import Engine
from service.judge.dispatch import Dispatcher
from service.judge.pipeline import Pipeline
from service.judge.readers import LabelReader
from service.models.tokenizers import load_tokenizer
from service.prompts.builder import PromptBuilder
from service.queue.memory import MemoryQueue
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import Scheduler
from tests.support.reference import Reference


@contextmanager
def running(engine: Engine, tiny_model: Path) -> Iterator[Pipeline]:
    """A pipeline over a queue that a worker with this engine empties."""
    queue, metrics, stop = MemoryQueue(1000, 1_000_000), Metrics(), threading.Event()
    worker = Worker(engine, queue, Scheduler(4096, 64, 0.001), metrics)
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    prompts = PromptBuilder(load_tokenizer(tiny_model), engine.info.max_tokens)
    with ThreadPoolExecutor(1) as executor:
        yield Pipeline(prompts, LabelReader(), Dispatcher(queue, metrics), executor, metrics)
    stop.set()
    thread.join()


@torch.no_grad()
def logprobs(reference: Reference, text: str, labels: list[str]) -> list[float]:
    """The labels' log-probabilities behind the text, by the model's own forward."""
    row = reference.model(**reference.tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
    return [float(row[reference.tokenizer(text + label).input_ids[-1]]) for label in labels]
