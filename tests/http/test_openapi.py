"""Fuzzing from the live OpenAPI document: no request breaks the service, and every answer is as documented."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.live import Live, live_service

PROMISES = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
DECIDING = ["/v1/decisions", "/v1/systemone"]
JUDGING = ["/score", "/score/batch", "/compare", "/compare/batch"]
RERANKING = ["/rerank", "/v1/rerank", "/v2/rerank"]
REWARDING = ["/get_reward", "/remote_rm", "/v1/score/evaluation"]
READING = ["/templates", "/v1/models", "/health", "/ready", "/metrics"]
VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
TRIALS = [
    *(("post", path, mode) for path in (*JUDGING, *DECIDING, *RERANKING, *REWARDING) for mode in (VALID, INVALID)),
    *(("get", path, VALID) for path in READING),
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a small body limit, so that it is reached too."""
    with live_service(max_body_bytes=20_000) as service:
        yield service


@pytest.fixture(scope="module")
def openapi(live: Live) -> schemathesis.BaseSchema:
    """The running service's document."""
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


def test_every_documented_operation_is_fuzzed(openapi: schemathesis.BaseSchema) -> None:
    """A new route must be added to TRIALS."""
    documented = {(operation.ok().method.lower(), operation.ok().path) for operation in openapi.get_all_operations()}

    assert documented == {(method, path) for method, path, _ in TRIALS}


@pytest.mark.parametrize(("method", "path", "mode"), TRIALS)
def test_every_answer_is_as_documented(
    openapi: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    """No 500, and no undocumented status, header, content type or body."""

    @given(case=openapi[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def send(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=PROMISES)

    send()
