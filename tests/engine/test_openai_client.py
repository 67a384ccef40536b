"""Where the upstream server is, and which model it serves: found out at start, with errors that say what to change."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from service.engine.upstream.errors import UpstreamError
from service.engine.upstream.openai_client import Access, base_url, find_served
from tests.support.openai_server import MODEL, Reply, Upstream, error


def test_the_only_model_is_found_with_its_length(upstream: Upstream) -> None:
    """Nobody has to type what the server says."""
    served = find_served(Access(url=upstream.url), None)

    assert (served.id, served.max_tokens) == (MODEL, 1024)


@pytest.mark.parametrize(("name", "problem"), [("gpt", "does not serve gpt; it serves a, b"), (None, "serves a, b")])
def test_a_model_that_is_not_served_is_told_from_those_that_are(
    upstream: Upstream, name: str | None, problem: str
) -> None:
    """And a name is asked for where there is a choice."""
    upstream.models = [{"id": "b"}, {"id": "a"}]

    with pytest.raises(UpstreamError, match=problem):
        find_served(Access(url=upstream.url), name)


def test_a_server_without_a_list_is_taken_at_our_word(upstream: Upstream) -> None:
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
def test_an_address_that_is_no_api_is_told(upstream: Upstream, reply: Reply, problem: str) -> None:
    """In words that say what to change."""
    upstream.always = lambda _: reply

    with pytest.raises(UpstreamError, match=problem):
        find_served(Access(url=upstream.url), "gpt")


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "schlüssel", ""])
def test_a_key_that_no_header_holds_is_refused_unsaid(key: str) -> None:
    """The transport's own message would repeat it."""
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
def test_addresses_are_read_as_openais_clients_read_them(given: str, base: str) -> None:
    """`/v1` is added where no path is given."""
    assert base_url(given) == base


@pytest.mark.parametrize(
    "given", ["localhost:8000", "http://user:pw@host/v1", "https://host/v1?key=1", "ftp://host", "http://host:65536"]
)
def test_addresses_that_hold_secrets_or_are_none_are_refused(given: str) -> None:
    """A key in an address would end up in logs."""
    with pytest.raises(ValueError, match="must"):
        base_url(given)
