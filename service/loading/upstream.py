"""From settings to the upstream engine: which model its server has, whether it gets tokens or text, a probe."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Final, Literal

from service.engine.contract import AnyItem, Engine, GenerateItem, ScoreItem, Task, TextGenerateItem, TextScoreItem
from service.engine.upstream.dialects import Chat, Completions, Dialect, Generate, Question, Score
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.openai_client import Access, Served, find_served
from service.loading.engines import Model, context_length
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer
from service.settings import UpstreamKey, UpstreamSettings

# A text's tokens are estimated, and this many times a server's own at most, near enough (long words, indented code):
# what is too long below that, the server says.
ESTIMATE_FACTOR: Final = 2
# For servers that do not say how long a prompt they read.
ASSUMED_MAX_TOKENS: Final = 131_072
PROBE: Final = "Is 2+2 equal to 4? Answer Yes or No."
PROBE_LABELS: Final = ("Yes", "No")
PROBE_TOKENS: Final = 16


def find_upstream(settings: UpstreamSettings) -> Model:
    """What the HTTP side has to know of the server's model.

    Raises ValueError where a setting is missing or the judge needs another engine, UpstreamError where the server
    cannot be asked or has another model.
    """
    if settings.task == "classify":
        raise ValueError("--judge reward-model needs an engine that runs a classification head: torch or vllm")
    served = find_served(_access(settings), settings.upstream_model)
    if _api(settings) == "chat":
        longest = ESTIMATE_FACTOR * (served.max_tokens or ASSUMED_MAX_TOKENS)
        return Model(served.id, _fingerprint(settings, served, "text"), None, settings.max_tokens or longest)
    if settings.model is None:
        raise ValueError("--upstream-api completions needs --model: the folder or hub id of the model's tokenizer")
    files = models.resolve(settings.model)
    limits = [settings.max_tokens, context_length(files.path), served.max_tokens and served.max_tokens - 1]
    tokenizer = load_tokenizer(files.path)
    max_tokens = min(limit for limit in limits if limit)
    fingerprint = _fingerprint(settings, served, files.fingerprint)
    return Model(served.id, fingerprint, tokenizer, max_tokens, files.path, files.note)


def load_upstream(settings: UpstreamSettings, model: Model) -> Engine:
    """The engine, after one judgement that shows that the server answers. Raises UpstreamError."""
    question = Question(model=model.id, top=settings.upstream_top_logprobs, extra=settings.upstream_body)
    if model.tokenizer is None:
        return _started(settings, model, Chat(question))
    return _started(settings, model, Completions(question, model.tokenizer))


def _started(settings: UpstreamSettings, model: Model, dialect: Dialect[Score, Generate]) -> Engine:
    engine = UpstreamEngine(
        _access(settings),
        dialect,
        max_tokens=model.max_tokens,
        task=settings.task,
        concurrency=settings.upstream_concurrency,
        floor=settings.floor,
    )
    try:
        engine.probe(_probe(model, settings.task))
    except BaseException:
        engine.close()
        raise
    return engine


def _access(settings: UpstreamSettings) -> Access:
    if settings.upstream_url is None:
        raise ValueError("--engine upstream needs --upstream-url, as http://localhost:8000/v1")
    key = UpstreamKey().upstream_api_key
    timeout, retries = settings.upstream_timeout, settings.upstream_retries
    return Access(url=settings.upstream_url, key=key, timeout=timeout, retries=retries)


def _api(settings: UpstreamSettings) -> Literal["completions", "chat"]:
    if settings.upstream_api != "auto":
        return settings.upstream_api
    return "completions" if settings.model is not None else "chat"


def _fingerprint(settings: UpstreamSettings, served: Served, sent: str) -> str:
    """All that the numbers depend on, `sent` being the tokenizer's files or text: queues and caches must not mix."""
    parts = [
        settings.upstream_url,
        served.id,
        _api(settings),
        settings.upstream_top_logprobs,
        settings.upstream_body,
        settings.floor,
        sent,
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _probe(model: Model, task: Task) -> AnyItem:
    """What the server is asked at start, to see that it answers as the engine needs."""
    if model.tokenizer is None:
        return TextGenerateItem(PROBE, PROBE_TOKENS) if task == "generate" else TextScoreItem(PROBE, PROBE_LABELS)
    token_ids = tuple(model.tokenizer(PROBE).input_ids)
    if task == "generate":
        return GenerateItem(token_ids, PROBE_TOKENS, stop_ids=())
    last_ids = [model.tokenizer(label, add_special_tokens=False).input_ids[-1] for label in PROBE_LABELS]
    return ScoreItem(token_ids, tuple(dict.fromkeys(last_ids)))
