"""Asynchronous work for synchronous callers: an event loop in a helper thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import httpx

T = TypeVar("T")


def run_in_thread(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `work()` on an event loop in a new thread, so that the caller may itself be inside a running loop.

    An exception in the calling thread, such as Ctrl-C, cancels the work, and is raised once the work has ended.
    """
    stop: Future[None] = Future()

    async def until_stopped() -> T:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work())

        def cancel(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop has ended already
                loop.call_soon_threadsafe(task.cancel)

        stop.add_done_callback(cancel)
        return await task

    with ThreadPoolExecutor(1, thread_name_prefix="judge-bulk") as executor:
        result = executor.submit(lambda: asyncio.run(until_stopped()))
        try:
            # In steps, because Ctrl-C does not interrupt an endless wait on every platform.
            while not wait([result], timeout=0.5).done:
                pass
        except BaseException:
            stop.set_result(None)
            raise
        return result.result()


class InThread(httpx.AsyncBaseTransport):
    """Makes a sync transport usable by an async client. Its owner closes it, not this class."""

    def __init__(self, transport: httpx.BaseTransport) -> None:
        self._transport = transport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and read the whole answer in a worker thread."""
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
