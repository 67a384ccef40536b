"""The upstream engine over a small server of the test's own: its rules, its items, and the whole service on top."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
from pydantic import SecretStr

from client.errors import ErrorCode
from service.engine.contract import ItemFailure, ScoreItem, TextScoreItem
from service.engine.upstream.decisions import Decisions, SystemOne
from service.engine.upstream.dialects import Chat, Completions, RequestOptions
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.openai_client import Access
from service.http.uvicorn_server import Server
from service.loading.engines import find_model, load_engine
from service.queue.memory import MemoryQueue
from service.server import compose
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.worker.loop import Worker
from service.worker.scheduler import make_scheduler
from tests.support.openai_server import MODEL, Upstream
from tests.support.tiny import tiny_tokenizer

CONVERSATION: Final = json.loads((Path(__file__).parents[2] / "data" / "openai_conversation.json").read_text("utf-8"))
"""What vLLM's server really answered, by way of asking; see tests/engine/upstream/openai_recording.py."""
KEY: Final = "sk-very-secret-123"
YES, NO = 40, 41


def spread(ids: Sequence[int]) -> list[float]:
    """Log-probabilities of 600 tokens that depend on the prompt's ids; YES and NO are among the likeliest."""
    rng = random.Random(str(list(ids)))
    logits = [rng.uniform(0, 2) for _ in range(600)]
    logits[YES], logits[NO] = rng.uniform(6, 9), rng.uniform(6, 9)
    total = math.log(sum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def words(message: str) -> list[tuple[str, float]]:
    """Yes, No and other words with log-probabilities that depend on the message."""
    rng = random.Random(message)
    return [(word, -rng.uniform(0.1, 9)) for word in ("Yes", "No", " Yes", "Well", "The")]


def shares(text: str, options: Sequence[str]) -> list[float]:
    """Probabilities of the options that depend on the text."""
    rng = random.Random(text)
    weights = [rng.uniform(0.1, 9) for _ in options]
    return [weight / sum(weights) for weight in weights]


@contextmanager
def completions(upstream: Upstream, *, model: str = MODEL, top: int = 20, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that sends ids."""
    dialect = Completions(RequestOptions(model=model, top_logprobs=top), tiny_tokenizer())
    with _engine(upstream, dialect, **options) as engine:
        yield engine


@contextmanager
def chat(upstream: Upstream, *, model: str = MODEL, top: int = 20, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that sends text."""
    with _engine(upstream, Chat(RequestOptions(model=model, top_logprobs=top)), **options) as engine:
        yield engine


@contextmanager
def decisions(upstream: Upstream, *, model: str = MODEL, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that asks for decisions by OpenAI's protocol."""
    with _engine(upstream, Decisions(RequestOptions(model=model)), **options) as engine:
        yield engine


@contextmanager
def systemone(upstream: Upstream, *, model: str = MODEL, **options: Any) -> Iterator[UpstreamEngine]:
    """An engine that asks for decisions by TypeSafe's protocol."""
    with _engine(upstream, SystemOne(RequestOptions(model=model)), **options) as engine:
        yield engine


@contextmanager
def _engine(
    upstream: Upstream,
    dialect: Chat | Completions | Decisions | SystemOne,
    *,
    timeout: float = 20.0,
    key: str | None = None,
    **options: Any,
) -> Iterator[UpstreamEngine]:
    secret = None if key is None else SecretStr(key)
    access = Access(url=upstream.url, key=secret, timeout=timeout, backoff=0.01)
    engine = UpstreamEngine(access, dialect, max_tokens=1000, **options)
    try:
        yield engine
    finally:
        engine.close()


def item(*token_ids: int) -> ScoreItem:
    """An item with the labels YES and NO."""
    return ScoreItem(token_ids or (1, 2, 3), (YES, NO))


def message(content: str, *labels: str) -> TextScoreItem:
    """An item as text, with the labels Yes and No unless others are given."""
    return TextScoreItem(content, labels or ("Yes", "No"))


def failed(answer: object) -> ErrorCode | None:
    """The code of a failure."""
    return answer.code if isinstance(answer, ItemFailure) else None


def torch_logprobs(exchange: Any) -> tuple[float, float]:
    """The torch engine's log-probabilities of Yes and No, over the spellings that a recorded answer lists."""
    listed = {entry["token"] for entry in exchange["answer"]["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    own = {token: value for token, value in exchange["torch"]["logprobs"].items() if token in listed}
    yes, no = ([value for token, value in own.items() if token.strip() == label] for label in ("Yes", "No"))
    return math.log(sum(map(math.exp, yes))), math.log(sum(map(math.exp, no)))


@contextmanager
def served(upstream: Upstream, **settings: Any) -> Iterator[httpx.Client]:
    """A service over that server, started as `python -m service` starts it."""
    config = Settings(engine="upstream", upstream_url=upstream.url, host="127.0.0.1", port=0, **settings)
    model, metrics = find_model(config), Metrics()
    queue = MemoryQueue(config.max_queue_jobs, config.max_queue_tokens)

    def work(stop: threading.Event) -> None:
        engine = load_engine(config, model)
        try:
            Worker(engine, queue, make_scheduler(config, engine), metrics).run(stop)
        finally:
            engine.close()

    with ThreadPoolExecutor(2) as executor:
        server = Server(compose(config, model, queue, metrics, executor), config, work)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as http:
                yield http
        finally:
            server.should_exit = True
            thread.join(30)
