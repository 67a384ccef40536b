"""The upstream server's address and model, as found at start, with errors that say what to change."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from service.engine.upstream.errors import UpstreamError
from service.engine.upstream.openai_client import Access, base_url, find_served
from tests.support.openai_server import MODEL, Reply, Upstream, error


def test_the_only_model_is_found_with_its_length(upstream: Upstream) -> None:
    """It need not be named."""
    served = find_served(Access(url=upstream.url), None)

    assert (served.id, served.max_tokens) == (MODEL, 1024)


@pytest.mark.parametrize(("name", "problem"), [("gpt", "does not serve gpt; it serves a, b"), (None, "serves a, b")])
def test_an_unknown_or_ambiguous_model_lists_what_is_served(upstream: Upstream, name: str | None, problem: str) -> None:
    """Without a name, there must be only one model."""
    upstream.models = [{"id": "b"}, {"id": "a"}]

    with pytest.raises(UpstreamError, match=problem):
        find_served(Access(url=upstream.url), name)


def test_without_a_list_of_models_the_name_is_trusted(upstream: Upstream) -> None:
    """Not every server has one."""
    upstream.always = lambda _: error(404)

    assert find_served(Access(url=upstream.url), "gpt").id == "gpt"


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (error(401, "Incorrect API key provided: sk-very"), "wants a key .401.: set JUDGE_UPSTREAM_API_KEY"),
        (Reply(body={"error": {"code": 401, "message": "no"}}), "wants a key"),
        (Reply(body=b"<html>"), "is this its base URL"),
        (Reply(301, b"", {"Location": "https://elsewhere/v1"}), "redirects"),
    ],
)
def test_a_wrong_address_or_key_is_explained(upstream: Upstream, reply: Reply, problem: str) -> None:
    """The error says what to change."""
    upstream.always = lambda _: reply

    with pytest.raises(UpstreamError, match=problem):
        find_served(Access(url=upstream.url), "gpt")


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "schlüssel", ""])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    """httpx's own message would quote it."""
    with pytest.raises(ValueError, match="JUDGE_UPSTREAM_API_KEY") as refused:
        Access(url="http://127.0.0.1:1/v1", key=SecretStr(key))

    assert not key or key not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://host/v1beta/openai", "https://host/v1beta/openai"),
    ],
)
def test_base_urls_are_as_openais_clients_take_them(given: str, base: str) -> None:
    """`/v1` is added if there is no path."""
    assert base_url(given) == base


@pytest.mark.parametrize(
    "given", ["localhost:8000", "http://user:pw@host/v1", "https://host/v1?key=1", "ftp://host", "http://host:65536"]
)
def test_invalid_urls_and_urls_with_secrets_are_refused(given: str) -> None:
    """A key in a URL would end up in logs."""
    with pytest.raises(ValueError, match="must"):
        base_url(given)
