"""The typed client when things go wrong: what it retries, how long it waits, and real connections that break."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from bench.support.process import free_port
from client import (
    AsyncJudge,
    BadRequestError,
    JudgeAPIError,
    JudgeConnectionError,
    JudgeError,
    JudgeTimeoutError,
    OverloadedError,
)
from client.transport.retries import MAX_BACKOFF, parse_retry_after, wait_after
from tests.client.tcp_server import Script, drip, tcp_server
from tests.support.fake_judge import SCORE, Ask, Service, ask_sync, both, busy, http

ONCE = {"max_retries": 0}


@pytest.fixture
def mute() -> Iterator[str]:
    """The URL of a server that reads and never answers."""
    with tcp_server([None]) as (url, _):
        yield url


# Retries.


@both
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_transient_error_is_retried(ask: Ask, status: int) -> None:
    """429, 502, 503 and 504 are retried until the answer comes."""
    service = Service(httpx.Response(status), httpx.Response(status), httpx.Response(200, json=SCORE))

    result = ask(service, "score", "p", "r")

    assert result.score == 0.75
    assert len(service.requests) == 3


@both
def test_an_error_that_a_gateway_turned_into_a_200_is_that_error(ask: Ask) -> None:
    """Its code decides: a transient error is retried, any other is raised."""
    full = {"message": "the queue is full", "type": "overloaded_error", "code": "overloaded"}
    bad = {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}
    service = Service(httpx.Response(200, json={"error": full}), httpx.Response(200, json={"error": bad}))

    with pytest.raises(BadRequestError, match="400 context_length_exceeded: too long"):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 2


@both
@pytest.mark.parametrize("page", [b"<html>Back soon</html>", b"", b"[]", b'{"error": "busy"}'])
def test_another_servers_200_is_an_error(ask: Ask, page: bytes) -> None:
    """A proxy's page with the status 200 is neither a result nor a pydantic error."""
    service = Service(httpx.Response(200, content=page, headers={"Content-Type": "text/html"}))

    with pytest.raises(JudgeError, match="is this the URL of a judge-as-api service"):
        ask(service, "score", "p", "r")


@both
@pytest.mark.parametrize("status", [400, 401, 404, 408, 413, 422, 500])
def test_other_errors_are_raised_at_once(ask: Ask, status: int) -> None:
    """An error that would be the same again is not retried."""
    service = Service(httpx.Response(status))

    with pytest.raises(JudgeAPIError):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 1


@both
def test_a_broken_connection_is_retried(ask: Ask) -> None:
    """Scoring is idempotent, so a connection that breaks in the middle of an answer is retried."""
    service = Service(httpx.RemoteProtocolError("peer closed connection"), httpx.Response(200, json=SCORE))

    result = ask(service, "score", "p", "r")

    assert result.score == 0.75


@both
def test_a_timeout_of_the_transport_is_not_retried(ask: Ask) -> None:
    """An attempt has all the time that is left, so one that timed out was the last."""
    service = Service(httpx.ReadTimeout("slow"))

    with pytest.raises(JudgeTimeoutError, match="POST /score"):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 1


@both
def test_the_last_error_is_raised_when_retries_are_used_up(ask: Ask) -> None:
    """max_retries=2 makes three attempts, then raises the last error."""
    service = Service(busy())

    with pytest.raises(OverloadedError, match="the queue is full"):
        ask(service, "score", "p", "r", settings={"max_retries": 2})
    assert len(service.requests) == 3


@both
def test_a_call_keeps_its_request_id(ask: Ask) -> None:
    """The request id is the same in all attempts of a call."""
    service = Service(busy(), httpx.Response(200, json=SCORE))

    ask(service, "score", "p", "r")

    first, second = service.headers("X-Request-Id")
    assert first == second
    assert len(first or "") == 32


@both
def test_retry_after_is_waited_for_and_counts_against_the_deadline(ask: Ask) -> None:
    """The second attempt begins no earlier than Retry-After says, and has only the remaining time."""
    service = Service(busy(Retry_After="0.05"), httpx.Response(200, json=SCORE))

    ask(service, "score", "p", "r", settings={"timeout": 20.0})

    first, second = (float(seconds or "nan") for seconds in service.headers("X-Request-Timeout"))
    assert second <= first - 0.049


@both
def test_a_wait_beyond_the_deadline_is_not_begun(ask: Ask) -> None:
    """If Retry-After would pass the deadline, the error is raised at once, with the requested wait."""
    service = Service(busy(Retry_After="3600"))

    with pytest.raises(OverloadedError) as caught:
        ask(service, "score", "p", "r", settings={"timeout": 30.0})
    assert caught.value.retry_after == 3600.0
    assert len(service.requests) == 1


@both
@pytest.mark.parametrize("method", ["health", "ready"])
def test_probes_are_never_retried(ask: Ask, method: str) -> None:
    """health() and ready() report the state now, they do not wait for a better one."""
    service = Service(busy(Retry_After="0"))

    with pytest.raises(OverloadedError):
        ask(service, method)
    assert len(service.requests) == 1


def test_retries_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Retries leave no lines in a program's output."""
    ask_sync(Service(busy(), httpx.Response(200, json=SCORE)), "score", "p", "r")

    assert capfd.readouterr() == ("", "")


def test_retries_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At INFO, the logger `client` names each retry and its cause, without the caller's text."""
    caplog.set_level("INFO", logger="client")

    ask_sync(Service(busy(), httpx.Response(200, json=SCORE)), "score", "secret prompt", "r")

    (record,) = (record for record in caplog.records if record.name == "client")
    assert "POST /score" in record.getMessage()
    assert "the queue is full" in record.getMessage()
    assert "secret" not in record.getMessage()


@both
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_never_retried(ask: Ask, kind: type[BaseException]) -> None:
    """Ctrl-C during a call ends the call."""
    service = Service(kind())

    with pytest.raises(kind):
        ask(service, "score", "p", "r")
    assert len(service.requests) == 1


async def test_a_cancelled_call_ends(mute: str) -> None:
    """Cancelling a task that waits for an answer raises CancelledError in it, and no further attempt begins."""
    async with AsyncJudge(mute) as judge:
        task = asyncio.create_task(judge.score("p", "r"))
        await asyncio.sleep(0.05)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_call_is_cancelled_while_it_waits_to_retry() -> None:
    """Cancelling between two attempts ends the call as well."""
    service = Service(busy(Retry_After="20"))
    async with AsyncJudge("http://judge", transport=httpx.MockTransport(service)) as judge:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(judge.score("p", "r"), 0.05)

    assert len(service.requests) == 1


@pytest.mark.parametrize(("attempt", "longest"), [(1, 0.25), (2, 0.5), (4, 2.0), (9999, MAX_BACKOFF)])
def test_waits_double_up_to_a_bound(attempt: int, longest: float) -> None:
    """Without Retry-After, the n-th wait is between half and all of backoff * 2^(n-1), at most MAX_BACKOFF."""
    wait = wait_after(JudgeConnectionError("x"), attempt, 0.25)

    assert longest / 2 <= wait <= longest


def test_retry_after_is_never_cut_short() -> None:
    """A requested wait is kept in full, however long, plus up to a quarter to spread the callers."""
    error = OverloadedError("busy", status=503, code="overloaded", retry_after=20.0)

    waits = [wait_after(error, 1, 0.25) for _ in range(100)]

    assert min(waits) >= 20.0
    assert max(waits) <= 25.0
    assert len(set(waits)) > 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2015 07:28:00 -0000", 0.0)]
    + [(junk, None) for junk in (None, "", "soon", "-3", "nan", "inf", "Wed, 99 Oct 2015 07:28:00 GMT")],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    """Seconds and a past date are understood; anything else counts as absent."""
    assert parse_retry_after(header) == seconds


def test_retry_after_as_a_date_to_come() -> None:
    """A future date gives the seconds until then."""
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)

    assert parse_retry_after(later) == pytest.approx(100, abs=30)


@both
def test_retry_after_as_a_date_is_counted_from_the_answers_own_date(ask: Ask) -> None:
    """A server whose clock is years off asks for the two minutes between its own two dates."""
    dates = {"Retry_After": "Wed, 21 Oct 2015 07:30:00 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}

    with pytest.raises(JudgeAPIError) as refused:
        ask(Service(busy(**dates)), "score", "p", "r", settings=ONCE)
    assert refused.value.retry_after == 120.0


# Real connections.


@both
def test_a_refused_connection_asks_whether_the_service_runs(ask: Ask) -> None:
    """The message names the URL and asks whether the service is running."""
    url = f"http://127.0.0.1:{free_port()}"

    with pytest.raises(JudgeConnectionError, match=rf"{url}.*is the service running\?"):
        ask(url, "score", "p", "r", settings=ONCE)


def test_a_password_in_the_url_is_not_repeated() -> None:
    """The message of a failed connection leaves out the URL's user and password."""
    with pytest.raises(JudgeConnectionError) as caught:
        ask_sync(f"http://user:hunter2@127.0.0.1:{free_port()}", "score", "p", "r", settings=ONCE)

    assert "hunter2" not in str(caught.value)


@both
@pytest.mark.parametrize("broken", [b"", b"HTTP/1.1 200", http(SCORE)[:-20]], ids=["nothing", "head", "body"])
def test_an_answer_that_breaks_off_is_a_connection_error(ask: Ask, broken: bytes) -> None:
    """Half an answer is a JudgeConnectionError, at whatever byte it ends."""
    with tcp_server([broken]) as (url, _), pytest.raises(JudgeConnectionError) as caught:
        ask(url, "score", "p", "r", settings=ONCE)

    assert not isinstance(caught.value, JudgeTimeoutError)


@both
def test_a_broken_connection_is_replaced(ask: Ask) -> None:
    """After a connection that broke in the middle of an answer, the call is repeated on a new one and succeeds."""
    with tcp_server([http(SCORE)[:-20], http(SCORE)]) as (url, requests):
        result = ask(url, "score", "p", "r", settings={"max_retries": 1})

    assert result.score == 0.75
    assert len(requests) == 2
    assert requests[0].endswith(b'{"prompt":"p","response":"r"}')


@both
@pytest.mark.parametrize("script", [None, drip], ids=["silent", "dripping"])
def test_a_late_answer_is_given_up_at_the_deadline(ask: Ask, script: Script) -> None:
    """A service that is silent, or sends a byte now and then, costs no more than the timeout, and no retry."""
    with tcp_server([script]) as (url, requests), pytest.raises(JudgeTimeoutError, match=r"within 0\.3 s"):
        ask(url, "score", "p", "r", settings={"timeout": 0.3, "max_retries": 3})

    assert len(requests) == 1


async def test_a_hundred_calls_are_in_flight_together() -> None:
    """100 calls of one AsyncJudge: each is answered only once all have arrived."""
    together = asyncio.Barrier(100)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"response":"r"}')
        await together.wait()
        writer.write(http(SCORE))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, AsyncJudge(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as judge:
        results = await asyncio.gather(*(judge.score("p", "r") for _ in range(100)))

    assert {result.score for result in results} == {0.75}
