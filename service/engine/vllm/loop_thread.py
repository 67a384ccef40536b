"""An event loop for a library that wants one, in a program whose own code has none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import wait
from typing import Any, Final, TypeVar

Result = TypeVar("Result")

_JOIN_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 1.0


class LoopThread:
    """An event loop that runs in a thread of its own until it is closed."""

    def __init__(self, name: str) -> None:
        """Started at once; `name` is the thread's."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Its result, from another thread."""
        asked = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        # Looked at besides: of a loop that has died nobody would ever hear.
        while not wait([asked], _LOOK_SECONDS).done:
            if not self._thread.is_alive():
                raise RuntimeError("the event loop's thread has died")
        return asked.result()

    def cancel_all(self) -> None:
        """Cancel all that runs on it, and wait for that."""
        self.run(_cancel_the_rest())

    def close(self) -> None:
        """Cancel what is left, and end the thread."""
        if self._loop.is_closed():
            return
        self.cancel_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_JOIN_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()


async def _cancel_the_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        # What does not let itself be cancelled must not hold up the end.
        done, _ = await asyncio.wait(rest, timeout=_JOIN_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()  # nobody is left to be told
