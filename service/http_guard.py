"""Bounds on the head of a request, which uvicorn has none for: how large it may be, and how long it may take."""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 2**16


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's protocol; a head over MAX_HEAD_BYTES, or incomplete after `head_timeout` seconds, ends it."""

    head_timeout = 30.0
    _head_size = 0
    _in_head = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller who says nothing at all is given up too."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to be waited for."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete."""
        super().data_received(data)
        self._head_size = self._head_size + len(data) if self._in_head else 0
        if self._head_size > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = True
        self._watch()

    def on_headers_complete(self) -> None:
        """From here on the time is the body's."""
        self._in_head = False
        self._unwatch()
        super().on_headers_complete()

    def _watch(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_timeout, self._too_late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._watch()  # the one before is still being answered
        elif not self.transport.is_closing():
            self.transport.close()


def guarded(timeout: float) -> type[GuardedHttp]:
    """The protocol with this time for a head, in seconds."""
    return type("Guarded", (GuardedHttp,), {"head_timeout": timeout})
