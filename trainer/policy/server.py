"""Responses of a server with OpenAI's API that has the policy: vLLM, SGLang, llama.cpp, or one further away.

    requests ── one HTTP request for each response, with its own seed ──> replies ── all of an instruction ──> caller

One response each, not `n` of them: a seed then means the same to every server (SGLang gives n equal ones for it, OpenAI
has one for all), and servers with a prefix cache compute the prompt once all the same. What goes wrong:

    no answer, 429, 502, 503, 504      retried until nothing was answered for `patience` seconds, then StageError
    other 5xx, 408, an unusable answer retried, ATTEMPTS tries in all; then the instruction failed
    400, 413, 422                      the instruction failed
    any other status                   StageError

A failed instruction gets no samples and is counted; more than MOST_FAILED of them are a StageError.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx
from pydantic import SecretStr

from client.transport.pacing import Patience
from client.transport.proxies import proxy_of
from client.transport.retries import wait_after
from service.engine.upstream.errors import RefusalError, check_response
from trainer.errors import InputError, StageError
from trainer.policy.completions import WAYS, Asking, BadAnswerError, Reply, parse_reply
from trainer.policy.requests import IN_FLIGHT, SAMPLER_KEY_VARIABLE, SamplerServer, SampleSettings, SamplingRequest
from trainer.policy.served import Served, choose_served, parse_models
from trainer.run.progress import echo

ATTEMPTS: Final = 4
MOST_FAILED: Final = 0.02

# Sampling a batch takes a busy CPU minutes; this only ends requests whose server hangs.
_READ_SECONDS: Final = 3600.0
_CONNECT_SECONDS: Final = 10.0
_FIRST_WAIT: Final = 0.5
_BUSY: Final = frozenset({429, 502, 503, 504, 529})
_REFUSES_REQUEST: Final = frozenset({400, 413, 422})
_REFUSES_WAY: Final = frozenset({400, 404, 405, 415, 422, 501})
_NO_LIST: Final = frozenset({404, 405, 501})

OnResponses: TypeAlias = Callable[[SamplingRequest, list[Reply]], None]


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy as the user names it, its folder, and the tokens that end its responses.

    `renders`: whether it has a chat template of its own, which a server could apply.
    """

    name: str
    folder: Path
    stops: tuple[int, ...]
    renders: bool


@dataclass(slots=True)
class _Failures:
    """Instructions that got no samples; `first` says why the first of them did not."""

    allowed: float
    count: int = 0
    first: str = ""

    def add(self, request: SamplingRequest, error: Exception) -> bool:
        """Count one; whether that is too many."""
        self.first = self.first or f"{request.id}: {error}"
        self.count += 1
        return self.count > self.allowed


def sample_from_server(
    server: SamplerServer,
    policy: Policy,
    requests: Sequence[SamplingRequest],
    settings: SampleSettings,
    on_responses: OnResponses,
) -> int:
    """Call `on_responses` with each request and all of its responses, in any order; how many requests failed.

    Raises InputError for an unusable address or key, and StageError.
    """
    return asyncio.run(_sample_all(server, policy, requests, settings, on_responses))


async def _sample_all(
    server: SamplerServer,
    policy: Policy,
    requests: Sequence[SamplingRequest],
    settings: SampleSettings,
    on_responses: OnResponses,
) -> int:
    async with _connected(server) as connection:
        sampler = await _Sampler.prepared(connection, policy, requests[0], settings)
        failures = _Failures(MOST_FAILED * len(requests))
        # An iterator that all workers take from: a finished one goes on with the next request.
        pending = iter(requests)
        count = max(1, (settings.rows or IN_FLIGHT) // settings.samples)
        workers = [asyncio.create_task(sampler.work(pending, on_responses, failures)) for _ in range(count)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return failures.count


class _Connection:
    """Sends single requests and translates what goes wrong with them."""

    def __init__(self, server: SamplerServer, http: httpx.AsyncClient, key: SecretStr | None) -> None:
        self.server = server
        self._http, self._key = http, key

    async def get_models(self) -> list[Served]:
        """What the server says it serves; [] if it does not say. Raises StageError."""
        try:
            response = await self._http.get("models")
            if response.status_code in _NO_LIST:
                return []
            check_response(response, self._key)
            return parse_models(response.content)
        except (httpx.HTTPError, BadAnswerError) as error:
            raise self.stopped(f"{error or type(error).__name__}: is it running, and is this its base URL?") from error
        except RefusalError as refusal:
            raise self.refused(refusal) from refusal

    async def post(self, path: str, body: dict[str, Any]) -> Reply:
        """Raises httpx.HTTPError, RefusalError and BadAnswerError."""
        response = await self._http.post(path.removeprefix("/"), json=body)
        check_response(response, self._key)
        return parse_reply(response.content)

    def refused(self, refusal: RefusalError) -> StageError:
        """The error for a refusal that no retry will change."""
        said = f" and says: {refusal.said}" if refusal.said else ""
        key = f" (its key: {SAMPLER_KEY_VARIABLE}, or --sampler-key)" if refusal.status in (401, 403) else ""
        return self.stopped(f"it answers {refusal.status}{said}{key}")

    def stopped(self, problem: str) -> StageError:
        """The error for a server that gives no more responses."""
        return StageError(
            f"no responses from {self.server.url}: {problem}. What it gave so far is kept: the same command goes on "
            "from there"
        )


@asynccontextmanager
async def _connected(server: SamplerServer) -> AsyncIterator[_Connection]:
    given = server.key or os.environ.get(SAMPLER_KEY_VARIABLE) or None
    try:
        url = httpx.URL(server.url)
        if url.scheme not in {"http", "https"} or not url.host or url.userinfo:
            raise ValueError("it must be like http://host:8000/v1, without a user")
        base = url.copy_with(path=f"{url.path.rstrip('/') or '/v1'}/")
        proxy = proxy_of(str(base))
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"--sampler-url {server.url}: {error}") from error
    # Checked here because httpx would refuse such a key with a message that quotes it.
    if given is not None and not re.fullmatch(r"[!-~]+", given):
        raise InputError(f"{SAMPLER_KEY_VARIABLE} holds a character that no key has")
    headers = {} if given is None else {"Authorization": f"Bearer {given}"}
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=base,
        headers=headers,
        timeout=httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        transport=httpx.AsyncHTTPTransport(limits=unlimited, proxy=proxy.address if proxy else None),
    ) as http:
        yield _Connection(server, http, None if given is None else SecretStr(given))


class _FailedError(Exception):
    """This instruction gets no samples."""


class _Sampler:
    """Asks for responses in the way that the server takes, and decides what is tried again."""

    def __init__(
        self, connection: _Connection, model: str, way: Asking, stops: Sequence[int], settings: SampleSettings
    ) -> None:
        self._connection, self._model, self._way, self._stops = connection, model, way, stops
        self._settings = settings
        self._patience = Patience(connection.server.patience)

    @classmethod
    async def prepared(
        cls, connection: _Connection, policy: Policy, first: SamplingRequest, settings: SampleSettings
    ) -> _Sampler:
        """Find the model and the way of asking, and say on stderr what was found. Raises StageError."""
        server = connection.server
        served = choose_served(await connection.get_models(), server, policy.name, policy.folder)
        if served.max_tokens is not None and served.max_tokens < len(first.token_ids) + settings.max_new_tokens:
            raise connection.stopped(
                f"its model reads {served.max_tokens} tokens, and a prompt has {len(first.token_ids)} beside "
                f"{settings.max_new_tokens} new ones: start it with a longer context, or lower --max-new-tokens"
            )
        refusal: RefusalError | None = None
        for way in WAYS if policy.renders else [way for way in WAYS if way.token_ids]:
            sampler = cls(connection, served.name, way, policy.stops, settings)
            try:
                reply = await sampler._probe(first)
            except RefusalError as error:
                if error.status not in _REFUSES_WAY:
                    raise connection.refused(error) from error
                refusal = error
                continue
            except BadAnswerError as error:
                raise connection.stopped(f"its answer {error}") from error
            counted, wanted = reply.prompt_tokens, len(first.token_ids)
            if way.token_ids and counted not in (None, wanted):
                continue  # it does not take the ids for what they are
            echo(f"sampling from {server.url}: {served.claim}; {_said_of(way, counted, wanted)}")
            return sampler
        assert refusal is not None
        raise connection.refused(refusal) from refusal

    async def work(self, pending: Iterator[SamplingRequest], on_responses: OnResponses, failures: _Failures) -> None:
        """Sample one request after the other. Raises StageError, at the latest once too many failed."""
        for request in pending:
            answers = await asyncio.gather(
                *(self._respond(request, seed) for seed in request.seeds), return_exceptions=True
            )
            errors = [answer for answer in answers if isinstance(answer, BaseException)]
            other = next((error for error in errors if not isinstance(error, _FailedError)), None)
            if other is not None:
                raise other
            if not errors:
                on_responses(request, [answer for answer in answers if isinstance(answer, Reply)])
            elif failures.add(request, errors[0]):  # type: ignore[arg-type]  # all are _FailedErrors here
                raise self._connection.stopped(f"{failures.count} instructions failed, the first {failures.first}")

    async def _respond(self, request: SamplingRequest, seed: int) -> Reply:
        body = self._body(request, seed)
        failed = waits = 0
        while True:
            began = time.monotonic()
            try:
                reply = await self._connection.post(self._way.path, body)
            except (httpx.HTTPError, RefusalError, BadAnswerError) as error:
                if isinstance(error, httpx.HTTPError) or getattr(error, "status", 0) in _BUSY:
                    self._wait_on(error, began)
                else:
                    failed += 1
                    self._give_up_on(error, failed)
                waits += 1
                await asyncio.sleep(wait_after(error, waits, _FIRST_WAIT))
            else:
                self._patience.answered(time.monotonic())
                return reply

    def _wait_on(self, error: Exception, began: float) -> None:
        """Raise StageError if the server has been silent for too long."""
        self._patience.failed(began)
        if self._patience.left(time.monotonic()) <= 0:
            problem = self._connection.refused(error) if isinstance(error, RefusalError) else None
            raise problem or self._connection.stopped(str(error) or type(error).__name__) from error

    def _give_up_on(self, error: RefusalError | BadAnswerError, tries: int) -> None:
        """Raise _FailedError or StageError unless another try makes sense."""
        if isinstance(error, RefusalError):
            if error.status in _REFUSES_REQUEST or (error.retriable and tries >= ATTEMPTS):
                raise _FailedError(f"the server answers {error.status} {error.said}".rstrip()) from error
            if not error.retriable:
                raise self._connection.refused(error) from error
        elif tries >= ATTEMPTS:
            raise _FailedError(f"the server's answer {error}") from error

    async def _probe(self, request: SamplingRequest) -> Reply:
        """One token. Raises RefusalError and BadAnswerError, and StageError for a server that does not answer."""
        body = {**self._body(request, request.seeds[0]), "max_tokens": 1}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._connection.post(self._way.path, body)
            except (httpx.HTTPError, RefusalError) as error:
                if isinstance(error, RefusalError) and not error.retriable:
                    raise
                if attempt == ATTEMPTS:
                    raise self._connection.stopped(str(error) or type(error).__name__) from error
                await asyncio.sleep(wait_after(error, attempt, _FIRST_WAIT))
        raise AssertionError("unreachable")

    def _body(self, request: SamplingRequest, seed: int) -> dict[str, Any]:
        return self._way.body(self._model, request, seed, self._settings, self._stops)


def _said_of(way: Asking, counted: int | None, wanted: int) -> str:
    """How the server is asked, and what differs from the policy in this process."""
    words = "asked with token ids" if way.token_ids else "asked with messages, in the server's own chat template"
    if not way.extended:
        words += "; it takes no fields beyond OpenAI's, so its own top_k or repetition penalty may apply"
    if not way.token_ids and counted is not None and counted != wanted:
        words += (
            f". Warning: it counts {counted} tokens in a prompt that has {wanted} in the policy's chat template: its "
            "template or tokenizer is another one"
        )
    return words
