"""The typed client: `Judge` for ordinary code, `AsyncJudge` for asyncio, with the same methods.

Every method raises a JudgeError (client/errors.py shows the tree) if there is no usable answer, and
ValueError if its arguments do not make a valid request; nothing was sent then.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TypeVar, Unpack

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
from client.transport import calls
from client.transport.callers import AsyncCaller, SyncCaller
from client.transport.calls import CompareOptions, Prompt, ScoreOptions
from client.transport.connections import check_open
from client.transport.threads import InThread, run_in_thread

T = TypeVar("T")


class Judge(SyncCaller):
    """A client for a judge-as-api service. Threads may share one, and so may processes after a fork.

        with Judge("http://localhost:8000") as judge:
            result = judge.score("What is 2+2?", "4", category="math")
            print(result.score, result.log_odds)
            best = judge.compare("Name a prime.", ["7", "8"], mode="pairwise").best
            many = judge.score_many(ScoreRequest(prompt="Name a prime.", response=str(n)) for n in range(10_000))

    Use `score_batch` for one request with many items, and `score_many` for any number of items, sent at the rate that
    the service bears. A client pickles and copies as its settings, including the key.

    Args:
        base_url: The service's address, with http:// or https://; a path in front of the routes is kept. None takes
            JUDGE_URL from the environment, or http://127.0.0.1:8000.
        api_key: Sent as `Authorization: Bearer`. None takes JUDGE_API_KEY from the environment, if set; that must hold
            a single key, not the list that a service accepts. The empty string sends no key.
        timeout: Seconds for a whole call, including retries and the waits between them. (The sync client cannot
            interrupt a read in progress: if the service sends byte by byte, a call may take about twice as long.)
        max_retries: How many times a call is repeated after a broken connection or a 429, 502, 503 or 504; scoring is
            idempotent. Waits grow from `backoff` and respect Retry-After. If a wait would pass the deadline, the last
            error is raised at once instead. `health` and `ready` are never retried. Retries are logged at INFO by the
            logger `client`.
        transport: As in httpx; `httpx.MockTransport(handler)` replaces the service with a function. It is used as it
            is: one that holds connections must not be shared across a fork, and pickling the client pickles it.
        headers: Sent with every request, e.g. `traceparent`.

    Attributes:
        backoff: Upper bound, in seconds, of the wait before the first retry; the actual wait is at least half of it, at
            random. It doubles with every retry, up to 8. Tests that should not wait set it to 0 on the instance.

    Raises:
        ValueError: For arguments that cannot work, such as an address without a scheme.
    """

    def score(self, prompt: Prompt, response: str, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """Judge how good an answer `response` is to `prompt`.

            judge.score("What is 2+2?", "4", category="math").log_odds

        Args:
            prompt: A text, or messages (dicts or `Message`) of which the last is the user's.
            response: The answer to judge.
            **options: `category` or `template` (a name, a list of names that are all asked, or an InlineTemplate of
                your own), and `truncation`: "error" (the default), "prompt_left" or "response_middle". See
                `ScoreRequest`.
        """
        return self._send(calls.score(prompt, response, options))

    def compare(self, prompt: Prompt, responses: Sequence[str], **options: Unpack[CompareOptions]) -> CompareResult:
        """Rank 2 to 16 `responses` to one `prompt`.

            judge.compare("Name a prime.", ["7", "8"]).ranking  # [0, 1]: indices, best first

        Options are those of `score`, and `mode` ("pointwise" or "pairwise"; by default whichever the judge is made for)
        and `tie_margin` in log-odds. See `CompareRequest`.
        """
        return self._send(calls.compare(prompt, responses, options))

    def score_batch(self, items: Sequence[ScoreRequest]) -> list[ScoreResult | JudgeAPIError]:
        """Judge many items in one request: a list, in the order of `items`, of each one's result or error.

        An item's error is returned as an exception object, not raised, and the item is not retried. Only an error of
        the whole request (too many items, an unreachable service) is raised.
        """
        return self._send(calls.score_batch(items))

    def compare_batch(self, items: Sequence[CompareRequest]) -> list[CompareResult | JudgeAPIError]:
        """Compare many items in one request; results and errors as in `score_batch`."""
        return self._send(calls.compare_batch(items))

    def score_many(
        self,
        requests: Iterable[ScoreRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[ScoreResult | JudgeAPIError]:
        """Judge thousands of items in batches: a list, in the order of `requests`, of each one's result or error.

            results = judge.score_many(requests, progress=lambda known: print(known, "judged"))
            log_odds = [None if isinstance(r, JudgeAPIError) else r.log_odds for r in results]

        As many calls are in flight as the service bears. Refused, timed-out and interrupted calls are repeated until
        nothing has been answered for `options.patience` seconds; then the last error is raised. Errors that a retry
        cannot mend are raised at once. `max_retries` does not apply; each call has `timeout` or 330 s, whichever is
        longer. `progress` is called with the number of outcomes known so far.

        The calls are made by an event loop in a helper thread, which also reads `requests` and calls `progress`, so
        this works inside a running loop (Jupyter). Ctrl-C drops the calls. A custom `transport` must be thread-safe.
        """
        return self._many(stream_scores, requests, options, progress)

    def compare_many(
        self,
        requests: Iterable[CompareRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[CompareResult | JudgeAPIError]:
        """Compare thousands of items in batches; everything else as in `score_many`."""
        return self._many(stream_compares, requests, options, progress)

    def templates(self) -> TemplatesResult:
        """The templates and categories that requests may name."""
        return self._send(calls.templates())

    def models(self) -> ModelsResult:
        """The model that judges, its fingerprint and its limits."""
        return self._send(calls.models())

    def health(self) -> HealthResult:
        """Check that the service's process answers. Never retried."""
        return self._send(calls.health())

    def ready(self) -> ReadyResult:
        """Check that the service can judge now; raises OverloadedError with the reason if not. Never retried."""
        return self._send(calls.ready())

    def _many(
        self,
        stream: Callable[[AsyncJudge, Iterable[Q], BulkOptions], AsyncGenerator[tuple[int, T], None]],
        requests: Iterable[Q],
        options: BulkOptions,
        progress: Callable[[int], None] | None,
    ) -> list[T]:
        check_open(self._connections.closed)

        async def work() -> list[T]:
            async with self._async_twin() as judge:
                return await in_order(stream(judge, requests, options), progress)

        return run_in_thread(work)

    def _async_twin(self) -> AsyncJudge:
        judge = AsyncJudge(
            self._base_url,
            api_key=self._api_key,
            timeout=self._timeout,
            transport=InThread(self._transport) if self._transport else None,
            headers=self._headers,
        )
        judge.backoff = self.backoff
        return judge


class AsyncJudge(AsyncCaller):
    """`Judge` for asyncio: the same arguments, methods, results and errors, over up to 256 connections.

        async with AsyncJudge("http://localhost:8000") as judge:
            results = await asyncio.gather(*(judge.score("What is 2+2?", answer) for answer in ("4", "5")))

    Calls beyond the connections wait for a free one, and their timeout runs meanwhile. Each event loop that uses the
    client has its own connections; they are closed by `aclose`, or when asyncio.run ends the loop.
    """

    async def score(self, prompt: Prompt, response: str, **options: Unpack[ScoreOptions]) -> ScoreResult:
        """See `Judge.score`."""
        return await self._send(calls.score(prompt, response, options))

    async def compare(
        self, prompt: Prompt, responses: Sequence[str], **options: Unpack[CompareOptions]
    ) -> CompareResult:
        """See `Judge.compare`."""
        return await self._send(calls.compare(prompt, responses, options))

    async def score_batch(self, items: Sequence[ScoreRequest]) -> list[ScoreResult | JudgeAPIError]:
        """See `Judge.score_batch`."""
        return await self._send(calls.score_batch(items))

    async def compare_batch(self, items: Sequence[CompareRequest]) -> list[CompareResult | JudgeAPIError]:
        """See `Judge.compare_batch`."""
        return await self._send(calls.compare_batch(items))

    async def score_many(
        self,
        requests: Iterable[ScoreRequest],
        *,
        options: BulkOptions = DEFAULT_OPTIONS,
        progress: Callable[[int], None] | None = None,
    ) -> list[ScoreResult | JudgeAPIError]:
        """See `Judge.score_many`; here it runs on the caller's loop. `client.bulk.stream_scores` yields as it goes."""
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
        return await self._send(calls.templates())

    async def models(self) -> ModelsResult:
        """See `Judge.models`."""
        return await self._send(calls.models())

    async def health(self) -> HealthResult:
        """See `Judge.health`."""
        return await self._send(calls.health())

    async def ready(self) -> ReadyResult:
        """See `Judge.ready`."""
        return await self._send(calls.ready())
