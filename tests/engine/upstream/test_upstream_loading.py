"""From settings to the upstream engine: the probe, starts that must fail, and the model's fingerprint and length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.engine.upstream.errors import UpstreamError
from service.loading.engines import find_model, load_engine
from service.loading.upstream import find_upstream
from service.settings import Settings
from service.worker.scheduler import make_scheduler
from tests.support.openai_server import Upstream, error


def test_an_unreachable_server_is_reported_with_its_address() -> None:
    """At start, not with the first request. `message`, which is for callers, does not have the address."""
    settings = Settings(engine="upstream", upstream_url="http://127.0.0.1:9", upstream_model="x")

    with pytest.raises(
        UpstreamError, match=r"no answer from the upstream server: http://127.0.0.1:9/v1: .*refused"
    ) as told:
        find_model(settings)
    assert told.value.message == "no answer from the upstream server"


def test_a_failed_probe_ends_the_start(upstream: Upstream) -> None:
    """Such as that of a server which lists the model but gives no probabilities."""
    upstream.always = lambda seen: error(400, "logprobs are not supported") if seen.body else None
    config = Settings(engine="upstream", upstream_url=upstream.url)

    with pytest.raises(RuntimeError, match="says: logprobs are not supported"):
        load_engine(config, find_model(config))


def test_a_judge_that_needs_a_classification_head_is_refused(upstream: Upstream) -> None:
    """OpenAI's API has none. The server is not asked."""
    with pytest.raises(ValueError, match="classification head"):
        find_model(Settings(engine="upstream", upstream_url=upstream.url, judge="reward-model"))

    assert not upstream.seen


def test_settings_that_are_missing_are_named(upstream: Upstream) -> None:
    """In an error that says which flag to set."""
    with pytest.raises(ValueError, match="--upstream-url"):
        find_model(Settings(engine="upstream"))
    with pytest.raises(ValueError, match="--model"):
        find_model(Settings(engine="upstream", upstream_url=upstream.url, upstream_api="completions"))


def test_what_changes_the_numbers_changes_the_fingerprint(upstream: Upstream, tiny_model: Path) -> None:
    """So that queues and caches of different set-ups never mix."""
    upstream.models = [{"id": "a"}, {"id": "b"}]
    variants: list[dict[str, Any]] = [
        {"upstream_model": "a"},
        {"upstream_model": "b"},
        {"upstream_model": "a", "floor": -20.0},
        {"upstream_model": "a", "upstream_top_logprobs": 5},
        {"upstream_model": "a", "upstream_body": {"reasoning_effort": "none"}},
        {"upstream_model": "a", "model": str(tiny_model)},
        {"upstream_model": "a", "upstream_api": "decisions"},
        {"upstream_model": "a", "upstream_api": "systemone"},
    ]
    found = [
        find_upstream(Settings(engine="upstream", upstream_url=upstream.url, **variant)).fingerprint
        for variant in (*variants, variants[0])
    ]

    assert len(set(found)) == len(variants)
    assert found[-1] == found[0]


def test_prompts_are_as_long_as_the_server_says(upstream: Upstream, tiny_model: Path) -> None:
    """Minus one for the generated label, or --max-tokens. Text, whose length is estimated, may be twice as long."""
    url: dict[str, Any] = {"engine": "upstream", "upstream_url": upstream.url}
    ids = find_upstream(Settings(**url, model=str(tiny_model)))
    less = find_upstream(Settings(**url, model=str(tiny_model), max_tokens=100))
    text = find_upstream(Settings(**url))

    assert [ids.max_tokens, less.max_tokens, text.max_tokens] == [1023, 100, 2048]


def test_extra_body_fields_are_sent_with_each_request(upstream: Upstream) -> None:
    """Such as the one that turns off a model's thinking."""
    more = {"chat_template_kwargs": {"enable_thinking": False}}
    config = Settings(engine="upstream", upstream_url=upstream.url, upstream_body=json.dumps(more))
    load_engine(config, find_model(config)).close()

    assert upstream.asked[0].body["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_batch_is_four_times_the_concurrency(upstream: Upstream) -> None:
    """A larger one would only take longer."""
    config = Settings(engine="upstream", upstream_url=upstream.url, upstream_concurrency=8)
    engine = load_engine(config, find_model(config))
    scheduler = make_scheduler(config, engine)
    engine.close()

    assert scheduler.room == 32
