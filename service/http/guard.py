"""Connection limits that uvicorn lacks: size and time of a head, pipelined requests, unread answers."""

from __future__ import annotations

import asyncio
import struct
import sys
from contextlib import suppress
from typing import Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if sys.platform != "win32":  # there only the process's own buffer is counted
    import fcntl
    import termios

MAX_HEAD_BYTES: Final = 2**16

_BLANK_LINE: Final = b"\r\n\r\n"
_SMALL_PARTS: Final = 64
_LARGE_PART: Final = 4096
_BODY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's protocol, fed one request at a time: later bytes wait, unparsed, until it is answered.

    So a malformed request cannot discard the answers before it, and pipelined requests are read no faster than they are
    answered. The connection ends if a head exceeds MAX_HEAD_BYTES or is incomplete after `patience` seconds, and if the
    caller reads nothing of an answer for `patience` to twice `patience` seconds.
    """

    patience = 30.0
    # Received bytes; those before `_at` have been parsed.
    _data = b""
    _at = 0
    # Bytes parsed since the head began, or since the last byte of a body: chunks have heads too, and a trailer.
    _head_size = 0
    _in_body = False
    # Bytes still to come of a body with Content-Length.
    _body_left = 0
    # Whether to bypass the parser for this body, because it expects an upgraded protocol there.
    _unparsed_body = False
    # How many parts of the body have been parsed.
    _parts = 0
    _request_complete = False
    _unsent = 0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start both timers: a caller who sends nothing at all is dropped too."""
        super().connection_made(transport)
        self._await_head()
        self._send_timer = self.loop.call_later(self.patience, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        self._stop_awaiting_head()
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that belong to the current request."""
        self._data += data
        self._parse()

    def on_response_complete(self) -> None:
        """Continue with the next request."""
        super().on_response_complete()
        if not self._request_complete:
            # Refused before its body was read. Neither a trickling body nor an idle connection may go on forever.
            self._await_head()
        self._parse()

    def _parse(self) -> None:
        while self._at < len(self._data) and not self.transport.is_closing() and not self._is_answering():
            start, self._at = self._at, self._end_of_part()
            self._head_size += self._at - start
            self._parts += 1
            if self._in_body:
                self._body_left -= min(self._body_left, self._at - start)
            elif self._refuse_large_head():
                return
            else:
                self._await_head()
            self._feed(self._data[start : self._at])
            if self._refuse_large_head():
                return
        # Keep the last parsed bytes: a blank line may be split across two reads.
        kept = min(self._at, len(_BLANK_LINE) - 1)
        self._data, self._at = self._data[self._at - kept :], kept
        if len(self._data) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def _feed(self, part: bytes) -> None:
        if not self._unparsed_body:
            super().data_received(part)
            return
        self.on_body(part)
        if not self._body_left:
            self._unparsed_body = False
            self.on_message_complete()

    def _is_answering(self) -> bool:
        return self._request_complete and self.cycle is not None and not self.cycle.response_complete

    def _end_of_part(self) -> int:
        """The end of a body with Content-Length, else the next blank line: every head and chunked body ends in one."""
        if self._body_left:
            return min(len(self._data), self._at + self._body_left)
        # A chunked body may be full of blank lines: after some, parse larger parts at a time.
        skipped = _LARGE_PART if self._in_body and self._parts > _SMALL_PARTS else 0
        blank_line = self._data.find(_BLANK_LINE, max(0, self._at + skipped - len(_BLANK_LINE) + 1))
        return len(self._data) if blank_line < 0 else blank_line + len(_BLANK_LINE)

    def _refuse_large_head(self) -> bool:
        too_large = self._head_size > MAX_HEAD_BYTES and not self.transport.is_closing()
        if too_large:
            self.send_400_response("The request's head is too large.")
        return too_large

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._request_complete = False

    def on_headers_complete(self) -> None:
        """The head is complete: stop its timer, and note how the body will be delimited."""
        self._stop_awaiting_head()
        if not self.url.startswith(b"/"):
            self._take_host_of(httptools.parse_url(self.url).host)
        sizes = {name: value for name, value in self.headers if name in _BODY_HEADERS}
        self._in_body, self._head_size, self._parts = True, 0, 0
        self._body_left = int(sizes.get(b"content-length", 0))
        if self.parser.should_upgrade():
            # `curl --http2` and Java's client offer HTTP/2 with every request, then send the body in HTTP/1.1.
            if b"transfer-encoding" in sizes:
                raise ValueError("a chunked body, which the parser would take for the upgraded protocol")
            self._unparsed_body = self._body_left > 0
        super().on_headers_complete()

    def _take_host_of(self, target: bytes | None) -> None:
        """An absolute request target overrides the Host header (RFC 9112, 3.2.2)."""
        if target:
            host = b"[%s]" % target if b":" in target else target
            self.headers[:] = [*((name, value) for name, value in self.headers if name != b"host"), (b"host", host)]

    def _unsupported_upgrade_warning(self) -> None:
        """Silenced: answering an upgrade request in HTTP/1.1 is allowed."""

    def on_body(self, body: bytes) -> None:
        """Body bytes count against the body's own limit, not the head's."""
        self._head_size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete: the next bytes belong to another one."""
        if self._unparsed_body:
            return
        self._in_body, self._head_size, self._body_left = False, 0, 0
        self._request_complete = True
        super().on_message_complete()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.patience, self._give_up_head)

    def _stop_awaiting_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_head(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _check_progress(self) -> None:
        unsent = self._count_unsent()
        if unsent and unsent == self._unsent:
            # Not close(): it would wait for the caller to read the rest.
            self.transport.abort()
            return
        self._unsent = unsent
        self._send_timer = self.loop.call_later(self.patience, self._check_progress)

    def _count_unsent(self) -> int:
        """Bytes that the caller has not read. Those in the kernel count: draining only them is progress, if slow."""
        waiting = self.transport.get_write_buffer_size()
        connection = self.transport.get_extra_info("socket")
        if waiting and connection is not None and sys.platform != "win32":
            with suppress(OSError):
                (queued,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))
                waiting += queued
        return waiting


def guarded_protocol(patience: float) -> type[GuardedHttp]:
    """GuardedHttp with this patience, in seconds, for an incomplete head or an unread answer."""
    return type("Guarded", (GuardedHttp,), {"patience": patience})
