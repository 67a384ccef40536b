"""The typed client: `Judge` for ordinary code, `AsyncJudge` for asyncio. They differ in the transport call alone.

Every method raises a JudgeError (client/errors.py has the tree) when there is no usable answer, and
pydantic.ValidationError, which is a ValueError, when its arguments make no valid request: then nothing was sent.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import httpx
from tenacity import AsyncRetrying, Retrying

from client.bulk import DEFAULT_OPTIONS, BulkOptions, Q, in_order, stream_compares, stream_scores
from client.errors import JudgeAPIError
from client.schema import (
    CompareRequest,
    CompareResult,
    HealthResult,
    ModelsResult,
    ReadyResult,
    ScoreRequest,
    ScoreResult,
    TemplatesResult,
)
from client.transport import calls as _calls
from client.transport.calls import Call, CompareOptions, Prompt, ScoreOptions
from client.transport.connections import LoopConnections, Origin, ProcessConnections, check_open
from client.transport.exchange import Exchange
from client.transport.threads import InThread, run_in_thread

T = TypeVar("T")

W = TypeVar("W", httpx.BaseTransport, httpx.AsyncBaseTransport)


class _Client(Generic[W]):
    """What both clients are told, checked once. They pickle and copy as that: connections never leave their process."""

    backoff: float = 0.25

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 4,
        transport: W | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        if max_retries < 0:
            raise ValueError(f"max_retries must be 0 or more, not {max_retries}")
        self._base_url, self._api_key, self._headers = base_url, found_key(api_key), headers
        self._timeout = timeout
        self._max_retries = max_retries
        self._transport: W | None = transport
        self._connect()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in {"_connections", "_proxy"}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def _connect(self) -> None:
        """Check the address, and prepare connections, of which none is opened yet."""
        origin = Origin.of(self._base_url, self._api_key, self._headers, direct=self._transport is not None)
        self._proxy = origin.proxy
        self._prepare(origin)

    def _prepare(self, origin: Origin) -> None:
        raise NotImplementedError

    def _exchange(self, call: Call[T]) -> Exchange[T]:
        return Exchange(
            call, timeout=self._timeout, max_retries=self._max_retries, backoff=self.backoff, proxy=self._proxy
        )


class Judge(_Client[httpx.BaseTransport]):
    """A connection to a judge-as-api service. Threads may share one, and so may processes after a fork.

        with Judge("http://localhost:8000") as judge:
            result = judge.score("What is 2+2?", "4", category="math")
            print(result.score, result.log_odds)
            best = judge.compare("Name a prime.", ["7", "8"], mode="pairwise").best
            many = judge.score_many(ScoreRequest(prompt="Name a prime.", response=str(n)) for n in range(10_000))

    `score_batch` is one request; `score_many` is as many as it takes, at the rate that the service bears. A client
    pickles and copies as its settings, the key among them.

    Args:
        base_url: Where the service is, with http:// or https://; a path before the routes is kept.
        api_key: Sent as `Authorization: Bearer`. None takes the environment's JUDGE_API_KEY, where it is set: it must
            hold one key, not the list that a service accepts. The empty string sends none.
        timeout: Seconds for a whole call, retries and the waits between them included. (The sync client cannot
            interrupt a read in progress: against a server that drips, a call may take up to about twice as long.)
        max_retries: How often a call is repeated after a broken connection, 429, 502, 503 or 504. Scoring is
            idempotent. Waits grow from `backoff` and heed Retry-After; one that would pass the deadline is not
            begun, the last error is raised at once. `health` and `ready` ask once. Retries are logged at INFO.
        transport: As in httpx: `httpx.MockTransport(handler)` puts a function in the service's place.
            It is used as it is: one with connections is not to be shared over a fork, and has to pickle itself.
        headers: Sent with every request, e.g. `traceparent`.

    Attributes:
        backoff: Seconds before the first retry (up to half less at random), doubled for each further one, at most 8.
            Set it to 0 on the instance for tests that should not wait.

    Raises ValueError for arguments that cannot work.
    """

    def _prepare(self, origin: Origin) -> None:
        self._connections = ProcessConnections(partial(origin.client, self._transport))

    def score(self, prompt: Prompt, response: str, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """How good an answer `response` is to `prompt`: a text, or messages of which the user's is the last.

        Options: `category` or `template` (a name, or an InlineTemplate of your own), and `truncation`: "error"
        (the default), "prompt_left" or "response_middle".
        """
        return self._run(_calls.score(prompt, response, options))

    def compare(self, prompt: Prompt, responses: Sequence[str], **options: Unpack[CompareOptions]) -> CompareResult:
        """Which of 2 to 16 `responses` answers `prompt` best.

        Options: those of `score`, `mode` ("pointwise" or "pairwise"; by default as the judge does it) and `tie_margin`
        in log-odds.
        """
        return self._run(_calls.compare(prompt, responses, options))

    def score_batch(self, items: Sequence[ScoreRequest]) -> list[ScoreResult | JudgeAPIError]:
        """Judge many in one request: for each item, in order, its result, or its error as an object that is not raised.

        What fails the request as a whole (too many items, no service) is raised. Items are not retried one by one.
        """
        return self._run(_calls.score_batch(items))

    def compare_batch(self, items: Sequence[CompareRequest]) -> list[CompareResult | JudgeAPIError]:
        """Compare many in one request; errors as in `score_batch`."""
        return self._run(_calls.compare_batch(items))

    def score_many(
        self,
        requests: Iterable[ScoreRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[ScoreResult | JudgeAPIError]:
        """Judge thousands in batches: for each request, in order, its result or its error as an object.

        As many calls are under way as the service bears. One that is refused, unanswered or cut off is made again
        until nothing was answered for `options.patience` seconds, then its error is raised; so are errors that asking
        again cannot mend. `max_retries` plays no part, and a call has `timeout` or 330 s, whichever is longer.
        `progress` is called with the number of outcomes known so far.

        The calls are made by an event loop in a helper thread, which also reads `requests` and calls `progress`; the
        caller may be in a running loop (Jupyter). Ctrl-C drops the calls. A `transport` must bear several threads.
        """
        return self._many(stream_scores, requests, options, progress)

    def compare_many(
        self,
        requests: Iterable[CompareRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[CompareResult | JudgeAPIError]:
        """Compare thousands in batches; all else as in `score_many`."""
        return self._many(stream_compares, requests, options, progress)

    def templates(self) -> TemplatesResult:
        """The templates and categories that requests may name."""
        return self._run(_calls.templates())

    def models(self) -> ModelsResult:
        """The model that judges, its fingerprint and its limits."""
        return self._run(_calls.models())

    def health(self) -> HealthResult:
        """Whether the process answers. Asks once."""
        return self._run(_calls.health())

    def ready(self) -> ReadyResult:
        """Whether the service can judge now; raises OverloadedError, which says why, when it cannot. Asks once."""
        return self._run(_calls.ready())

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _many(
        self,
        stream: Callable[[AsyncJudge, Iterable[Q], BulkOptions], AsyncGenerator[tuple[int, T], None]],
        requests: Iterable[Q],
        options: BulkOptions,
        progress: Callable[[int], None] | None,
    ) -> list[T]:
        check_open(self._connections.closed)

        async def work() -> list[T]:
            async with self._twin() as judge:
                return await in_order(stream(judge, requests, options), progress)

        return run_in_thread(work)

    def _twin(self) -> AsyncJudge:
        judge = AsyncJudge(
            self._base_url,
            api_key=self._api_key,
            timeout=self._timeout,
            transport=InThread(self._transport) if self._transport else None,
            headers=self._headers,
        )
        judge.backoff = self.backoff
        return judge

    def _run(self, call: Call[T]) -> T:
        http = self._connections.http()
        exchange = self._exchange(call)
        result: T = Retrying(**exchange.retry_policy())(self._attempt, http, exchange)
        return result

    def _attempt(self, http: httpx.Client, exchange: Exchange[T]) -> T:
        request = exchange.request(http)
        with exchange.errors_translated(http), closing(http.send(request, stream=True)) as response:
            exchange.check_whose(response)
            body = b"".join(exchange.in_time(response.iter_bytes()))
        return exchange.read(response, body)


class AsyncJudge(_Client[httpx.AsyncBaseTransport]):
    """`Judge` for asyncio, with up to 256 connections at a time: the same arguments, methods, results and errors.

        async with AsyncJudge("http://localhost:8000") as judge:
            results = await asyncio.gather(*(judge.score("What is 2+2?", answer) for answer in ("4", "5")))

    Calls beyond the connections wait for a free one, on their own timeout. Each event loop that uses the client has
    connections of its own; they are closed by `aclose`, or when asyncio.run ends the loop.
    """

    def _prepare(self, origin: Origin) -> None:
        self._connections = LoopConnections(partial(origin.async_client, self._transport))

    async def score(self, prompt: Prompt, response: str, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """See `Judge.score`."""
        return await self._run(_calls.score(prompt, response, options))

    async def compare(
        self, prompt: Prompt, responses: Sequence[str], **options: Unpack[CompareOptions]
    ) -> CompareResult:
        """See `Judge.compare`."""
        return await self._run(_calls.compare(prompt, responses, options))

    async def score_batch(self, items: Sequence[ScoreRequest]) -> list[ScoreResult | JudgeAPIError]:
        """See `Judge.score_batch`."""
        return await self._run(_calls.score_batch(items))

    async def compare_batch(self, items: Sequence[CompareRequest]) -> list[CompareResult | JudgeAPIError]:
        """See `Judge.compare_batch`."""
        return await self._run(_calls.compare_batch(items))

    async def score_many(
        self,
        requests: Iterable[ScoreRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[ScoreResult | JudgeAPIError]:
        """See `Judge.score_many`; here all of it runs on the caller's loop. client/bulk.py has it as a stream."""
        return await in_order(stream_scores(self, requests, options), progress)

    async def compare_many(
        self,
        requests: Iterable[CompareRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[CompareResult | JudgeAPIError]:
        """See `Judge.compare_many`."""
        return await in_order(stream_compares(self, requests, options), progress)

    async def templates(self) -> TemplatesResult:
        """See `Judge.templates`."""
        return await self._run(_calls.templates())

    async def models(self) -> ModelsResult:
        """See `Judge.models`."""
        return await self._run(_calls.models())

    async def health(self) -> HealthResult:
        """See `Judge.health`."""
        return await self._run(_calls.health())

    async def ready(self) -> ReadyResult:
        """See `Judge.ready`."""
        return await self._run(_calls.ready())

    async def aclose(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        await self._connections.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _run(self, call: Call[T]) -> T:
        http = await self._connections.http()
        exchange = self._exchange(call)
        result: T = await AsyncRetrying(**exchange.retry_policy(), sleep=asyncio.sleep)(self._attempt, http, exchange)
        return result

    async def _once(self, call: Call[T], *, at_least: float) -> T:
        """Ask without retries, for the client's timeout or `at_least` seconds, whichever is longer."""
        timeout = max(self._timeout, at_least)
        http = await self._connections.http()
        once = Exchange(call, timeout=timeout, max_retries=0, backoff=self.backoff, proxy=self._proxy)
        return await self._attempt(http, once)

    async def _attempt(self, http: httpx.AsyncClient, exchange: Exchange[T]) -> T:
        request = exchange.request(http)
        with exchange.errors_translated(http):
            async with (
                asyncio.timeout(exchange.remaining()),
                aclosing(await http.send(request, stream=True)) as response,
            ):
                exchange.check_whose(response)
                body = await response.aread()
        return exchange.read(response, body)


def found_key(api_key: str | None) -> str:
    """The key to send, "" for none; None looks into the environment. Raises ValueError for what is no single key."""
    return _checked_key(os.environ.get("JUDGE_API_KEY") if api_key is None else api_key)


def _checked_key(key: str | None) -> str:
    key = (key or "").strip()
    if "," in key or key.startswith("["):
        raise ValueError("api_key (or JUDGE_API_KEY) holds a list, as a service takes it: give the client one key")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError("api_key (or JUDGE_API_KEY) must be printable ASCII without spaces")
    return key
