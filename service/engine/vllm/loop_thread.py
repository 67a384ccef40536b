"""An event loop in a thread, for an asyncio library in a program that is otherwise synchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from typing import Any, Final, TypeVar

ResultT = TypeVar("ResultT")

_JOIN_SECONDS: Final = 5.0
_ALIVE_CHECK_SECONDS: Final = 1.0


class LoopThread:
    """An event loop that runs in its own daemon thread until it is closed."""

    def __init__(self, name: str) -> None:
        """Start the thread under this name."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
        """The result of running it on the loop; call from another thread. Raises RuntimeError if the loop has died."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        # Waits in steps: if the loop's thread dies, the future never completes.
        while not wait([future], _ALIVE_CHECK_SECONDS).done:
            if not self._thread.is_alive():
                raise RuntimeError("the event loop's thread has died")
        return future.result()

    def cancel_all(self) -> None:
        """Cancel every task on the loop and wait until they have ended."""
        self.run(_cancel_others())

    def close(self) -> None:
        """Cancel the remaining tasks and end the thread."""
        if self._loop.is_closed():
            return
        self.cancel_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        # With a timeout, because a task may suppress its cancellation.
        done, _ = await asyncio.wait(others, timeout=_JOIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved, so that asyncio does not log it as lost
