"""From settings to the upstream engine: which model its server has, in whose tokens prompts are written, a probe."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Literal

from client.errors import ErrorCode
from service import models
from service.codec import load_tokenizer
from service.engine.contract import GenerateItem, ScoreItem, Task
from service.engine.upstream.dialects import Chat, Completions, Question
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.openai_client import Access, Served, find_served
from service.engine.upstream.text import digest, text_tokenizer
from service.errors import ServiceError
from service.loading import Model, context_length
from service.prompt import PromptBuilder
from service.settings import UpstreamKey, UpstreamSettings
from service.templates import REQUIRED_SLOTS, TemplateLibrary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of ours to one of a server's at most, near enough: what is too long below that, the server says.
TEXT_TOKENS: Final = 8
# For servers that do not say how long a prompt they read.
TEXT_MAX_TOKENS: Final = 131_072 * TEXT_TOKENS
PROBE_TOKENS: Final = 16


def find_upstream(settings: UpstreamSettings) -> Model:
    """What the HTTP side has to know of the server's model.

    Raises ValueError where a setting is missing, UpstreamError where the server cannot be asked or has another model.
    """
    served = find_served(_access(settings), settings.upstream_model)
    if _api(settings) == "chat":
        longest = TEXT_TOKENS * served.max_tokens if served.max_tokens else TEXT_MAX_TOKENS
        max_tokens = settings.max_tokens or longest
        tokenizer: PreTrainedTokenizerBase = text_tokenizer(_labels(settings), max_tokens)
        return Model(served.id, _fingerprint(settings, served, digest(tokenizer)), tokenizer, max_tokens)
    if settings.model is None:
        raise ValueError("--upstream-api completions needs --model: the folder or hub id of the model's tokenizer")
    files = models.resolve(settings.model)
    limits = [settings.max_tokens, context_length(files.path), served.max_tokens and served.max_tokens - 1]
    tokenizer = load_tokenizer(files.path)
    max_tokens = min(limit for limit in limits if limit)
    fingerprint = _fingerprint(settings, served, files.fingerprint)
    return Model(served.id, fingerprint, tokenizer, max_tokens, files.path, files.note)


def load_upstream(settings: UpstreamSettings, model: Model) -> UpstreamEngine:
    """The engine, after one judgement that shows that the server answers. Raises UpstreamError, ValueError."""
    if settings.task == "classify":
        raise ValueError("--judge reward-model needs an engine that runs a classification head: torch or vllm")
    access = _access(settings)
    question = Question(model=model.id, top=settings.upstream_top_logprobs, extra=settings.upstream_body)
    dialect = (Chat if _api(settings) == "chat" else Completions)(question, model.tokenizer)
    engine = UpstreamEngine(
        access,
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


def _labels(settings: UpstreamSettings) -> set[str]:
    templates = TemplateLibrary.load("chat", settings.template_file, tuple(REQUIRED_SLOTS)).all()
    return {label for template in templates for side in template.labels for label in side.labels}


def _fingerprint(settings: UpstreamSettings, served: Served, tokenizer: str) -> str:
    """All that the numbers, and the meaning of the ids, depend on: queues and caches of others must not mix with it."""
    parts = [
        settings.upstream_url,
        served.id,
        _api(settings),
        settings.upstream_top_logprobs,
        settings.upstream_body,
        settings.floor,
        tokenizer,
    ]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _probe(model: Model, task: Task) -> ScoreItem | GenerateItem:
    prompts = PromptBuilder(model.tokenizer, model.max_tokens)
    template = TemplateLibrary.load("chat" if prompts.has_chat_template else "raw").default("pointwise")
    try:
        prompt = prompts.build(template, "What is 2+2?", ["4"], "error")
    except ServiceError as exc:
        raise ServiceError(ErrorCode.NOT_READY, f"no probe can be built for this model: {exc.message}") from exc
    if task == "generate":
        return GenerateItem(prompt.token_ids, PROBE_TOKENS, ())
    return ScoreItem(prompt.token_ids, prompt.label_ids, prompt.boundaries)
