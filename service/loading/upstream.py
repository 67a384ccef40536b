"""From settings to the upstream engine: which model the server runs, how to ask it, and a probe at start-up."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Final, Literal, TypeAlias

from service.engine.contract import AnyItem, Engine, GenerateItem, ScoreItem, Task, TextGenerateItem, TextScoreItem
from service.engine.upstream.decisions import INSTRUCTIONS, Decisions, SystemOne
from service.engine.upstream.dialects import Chat, Completions, Dialect, GenerateT, RequestOptions, ScoreT
from service.engine.upstream.engine import UpstreamEngine
from service.engine.upstream.openai_client import Access, Served, find_served
from service.loading.model import Model, context_length
from service.models import resolve as models
from service.models.tokenizers import load_tokenizer
from service.settings import UpstreamKey, UpstreamSettings

# The length of a text in tokens is only estimated, and is at most about twice the true one (long words, indented
# code). Longer prompts are refused here; between the two limits the server decides.
ESTIMATE_FACTOR: Final = 2
# For servers that do not state their context length.
ASSUMED_MAX_TOKENS: Final = 131_072
PROBE: Final = "Is 2+2 equal to 4? Answer Yes or No."
PROBE_LABELS: Final = ("Yes", "No")
PROBE_TOKENS: Final = 16
Api: TypeAlias = Literal["completions", "chat", "decisions", "systemone"]
DECIDED: Final = (
    "asked over /{api}: the server puts its own words around the prompt; label_mass is what it reports, and 1 if it "
    "reports none"
)
"""The remark that users see on a model that is asked for decisions."""


def find_upstream(settings: UpstreamSettings) -> Model:
    """What the HTTP side needs to know of the server's model; one request to the server.

    Raises ValueError for a missing setting or a judge that needs another engine, UpstreamError if the server does not
    answer or does not have the model.
    """
    if settings.task == "classify":
        raise ValueError("--judge reward-model needs an engine that runs a classification head: torch or vllm")
    api = _api(settings)
    if settings.task == "generate" and api in {"decisions", "systemone"}:
        raise ValueError(f"parsed grades are read from text, which --upstream-api {api} does not return: use chat")
    served = find_served(_access(settings), settings.upstream_model)
    if api != "completions":
        return _text_model(settings, served, api)
    if settings.model is None:
        raise ValueError("--upstream-api completions needs --model: the folder or hub id of the model's tokenizer")
    files = models.resolve(settings.model)
    # One token less than the server reads: it counts the generated label.
    limits = [settings.max_tokens, context_length(files.path), served.max_tokens and served.max_tokens - 1]
    tokenizer = load_tokenizer(files.path)
    max_tokens = min(limit for limit in limits if limit)
    fingerprint = _upstream_fingerprint(settings, served, files.fingerprint)
    return Model(served.id, fingerprint, tokenizer, max_tokens, files.path, files.note)


def _text_model(settings: UpstreamSettings, served: Served, api: Api) -> Model:
    limit = ESTIMATE_FACTOR * (served.max_tokens or ASSUMED_MAX_TOKENS)
    sent, note = ("text", None) if api == "chat" else (f"text, {INSTRUCTIONS}", DECIDED.format(api=api))
    fingerprint = _upstream_fingerprint(settings, served, sent)
    return Model(served.id, fingerprint, None, settings.max_tokens or limit, note=note)


def load_upstream(settings: UpstreamSettings, model: Model) -> Engine:
    """The engine, once the server has answered a probe. Raises UpstreamError."""
    options = RequestOptions(model=model.id, top_logprobs=settings.upstream_top_logprobs, extra=settings.upstream_body)
    if model.tokenizer is not None:
        return _probed(settings, model, Completions(options, model.tokenizer))
    match _api(settings):
        case "decisions":
            return _probed(settings, model, Decisions(options))
        case "systemone":
            return _probed(settings, model, SystemOne(options))
        case _:
            return _probed(settings, model, Chat(options))


def _probed(settings: UpstreamSettings, model: Model, dialect: Dialect[ScoreT, GenerateT]) -> Engine:
    engine = UpstreamEngine(
        _access(settings),
        dialect,
        max_tokens=model.max_tokens,
        task=settings.task,
        concurrency=settings.upstream_concurrency,
        floor=settings.floor,
    )
    try:
        engine.probe(_probe_item(model, settings.task))
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


def _api(settings: UpstreamSettings) -> Api:
    if settings.upstream_api != "auto":
        return settings.upstream_api
    return "completions" if settings.model is not None else "chat"


def _upstream_fingerprint(settings: UpstreamSettings, served: Served, sent: str) -> str:
    """A digest of everything the scores depend on, so that queues and caches of different set-ups never mix.

    `sent` is the fingerprint of the tokenizer's files, or "text" with what is sent beside it.
    """
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


def _probe_item(model: Model, task: Task) -> AnyItem:
    """A small item of the kind that the engine will be given."""
    if model.tokenizer is None:
        return TextGenerateItem(PROBE, PROBE_TOKENS) if task == "generate" else TextScoreItem(PROBE, PROBE_LABELS)
    token_ids = tuple(model.tokenizer(PROBE).input_ids)
    if task == "generate":
        return GenerateItem(token_ids, PROBE_TOKENS, stop_ids=())
    last_ids = [model.tokenizer(label, add_special_tokens=False).input_ids[-1] for label in PROBE_LABELS]
    return ScoreItem(token_ids, tuple(dict.fromkeys(last_ids)))
