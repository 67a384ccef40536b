"""Asynchronous work for callers that are not: an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


def run_in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work()` on an event loop in a thread of its own, so that it runs beside a loop that the caller is in.

    An exception in the calling thread, such as Ctrl-C, cancels the work and is raised when that has ended.
    """
    stop: Future[None] = Future()

    async def until_stopped() -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work())

        def cancel(_: Future[None]) -> None:
            with suppress(RuntimeError):  # The loop ended first.
                loop.call_soon_threadsafe(task.cancel)

        stop.add_done_callback(cancel)
        return await task

    with ThreadPoolExecutor(1, thread_name_prefix="judge-bulk") as executor:
        result = executor.submit(lambda: asyncio.run(until_stopped()))
        try:
            # In steps: not every platform interrupts a wait without end.
            while not wait([result], timeout=0.5).done:
                pass
        except BaseException:
            stop.set_result(None)
            raise
        return result.result()


class InThread(httpx.AsyncBaseTransport):
    """A sync transport for an async client. It is not closed: its owner does that."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send in another thread, and read the whole answer there."""
        await request.aread()
        return await asyncio.to_thread(self._send, request)

    def _send(self, request: httpx.Request) -> httpx.Response:
        response = self._transport.handle_request(request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        try:
            stream = httpx.ByteStream(b"".join(response.stream))
        finally:
            response.close()
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)
