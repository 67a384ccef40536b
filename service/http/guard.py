"""Bounds on a connection, which uvicorn has none for: a head's size and time, pipelined requests, unread answers."""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from contextlib import suppress
from typing import Final

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 2**16

_BLANK_LINE: Final = b"\r\n\r\n"
_SMALL_PARTS: Final = 64
_LARGE_PART: Final = 4096
_BODY_HEADERS: Final = frozenset({b"content-length", b"transfer-encoding"})


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's protocol, given one request at a time: what follows waits, unparsed, until that one is answered.

    So a bad request takes no answer before it away, and pipelined ones are read as fast as they are answered. A head
    over MAX_HEAD_BYTES, or incomplete after `patience` seconds, ends the connection, and so does a caller who takes
    nothing of what is sent for that time, and at most twice that.
    """

    patience = 30.0
    # What has been received; the bytes before `_at` have been parsed.
    _data = b""
    _at = 0
    # Bytes parsed since a head began, or since the last byte of a body: chunks have heads too, and a trailer.
    _head_size = 0
    _in_body = False
    # Of a body whose length was declared: how many bytes are still to come.
    _body_left = 0
    # Whether that body is not the parser's, which takes it for another protocol.
    _unparsed_body = False
    # How many parts of a body have been parsed.
    _parts = 0
    _request_complete = False
    _unsent = 0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller who says nothing at all is given up too."""
        super().connection_made(transport)
        self._await_head()
        self._send_timer = self.loop.call_later(self.patience, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to be waited for."""
        self._stop_awaiting_head()
        if self._send_timer is not None:
            self._send_timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what belongs to the request in hand."""
        self._data += data
        self._parse()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        if not self._request_complete:
            # Refused, and nobody reads its body: that may not trickle in, nor the connection idle behind it, for ever.
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
        # The last bytes that were parsed stay: a blank line may be split over two reads.
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
        """Where a body of declared length ends, else the next blank line: only that ends a head, or a chunked body."""
        if self._body_left:
            return min(len(self._data), self._at + self._body_left)
        # A chunked body may be full of blank lines: it is not parsed in crumbs for ever.
        skipped = _LARGE_PART if self._in_body and self._parts > _SMALL_PARTS else 0
        found = self._data.find(_BLANK_LINE, max(0, self._at + skipped - len(_BLANK_LINE) + 1))
        return len(self._data) if found < 0 else found + len(_BLANK_LINE)

    def _refuse_large_head(self) -> bool:
        too_large = self._head_size > MAX_HEAD_BYTES and not self.transport.is_closing()
        if too_large:
            self.send_400_response("The request's head is too large.")
        return too_large

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._request_complete = False

    def on_headers_complete(self) -> None:
        """From here on the time is the body's."""
        self._stop_awaiting_head()
        if not self.url.startswith(b"/"):
            self._take_host_of(httptools.parse_url(self.url).host)
        sizes = {name: value for name, value in self.headers if name in _BODY_HEADERS}
        self._in_body, self._head_size, self._parts = True, 0, 0
        self._body_left = int(sizes.get(b"content-length", 0))
        if self.parser.should_upgrade():
            # `curl --http2` and Java's client ask for HTTP/2 with every request, and go on in HTTP/1.1.
            if b"transfer-encoding" in sizes:
                raise ValueError("a chunked body that the parser would take for another protocol")
            self._unparsed_body = self._body_left > 0
        super().on_headers_complete()

    def _take_host_of(self, target: bytes | None) -> None:
        """What an absolute target names holds, whatever the header says (RFC 9112, 3.2.2)."""
        if target:
            host = b"[%s]" % target if b":" in target else target
            self.headers[:] = [*((name, value) for name, value in self.headers if name != b"host"), (b"host", host)]

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing to warn of: the answer is HTTP/1.1, whatever else was asked for."""

    def on_body(self, body: bytes) -> None:
        """Bytes that the bound of a body is for."""
        self._head_size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What follows is another request."""
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
            # Not close(), which would wait for the caller to take what is left.
            self.transport.abort()
            return
        self._unsent = unsent
        self._send_timer = self.loop.call_later(self.patience, self._check_progress)

    def _count_unsent(self) -> int:
        """Bytes that the other side has not taken, those in the kernel too: a slow reader empties that by megabytes."""
        waiting = self.transport.get_write_buffer_size()
        connection = self.transport.get_extra_info("socket")
        if waiting and connection is not None:
            with suppress(OSError):
                (queued,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))
                waiting += queued
        return waiting


def guarded_protocol(patience: float) -> type[GuardedHttp]:
    """The protocol with this patience, in seconds, for a head that does not come and an answer that is not read."""
    return type("Guarded", (GuardedHttp,), {"patience": patience})
