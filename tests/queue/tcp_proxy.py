"""A TCP proxy in a thread of its own, between the programs under test and a server."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterable
from contextlib import suppress


class TcpProxy:
    """Forwards connections from `port`, a free loopback port, to another one."""

    def __init__(self, behind: int, tls: ssl.SSLContext | None = None) -> None:
        """`behind` is the server's loopback port. With `tls` clients speak TLS, and the server need not."""
        self._behind = behind
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        listening = asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=tls)
        self._server = self._loop.run_until_complete(listening)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break every connection."""
        self._loop.call_soon_threadsafe(lambda: _abort(self._writers))

    def close(self) -> None:
        """Stop, and break every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def passes(self) -> bool:
        """Called for each chunk of data; may wait. If it returns False the connection breaks."""
        return True

    async def _end(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        _abort(self._writers)
        await asyncio.sleep(0)  # The loop closes an aborted socket in its next pass.

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Here and not in the task: one that is cancelled before it begins never runs.
        self._writers.add(writer)
        task = self._loop.create_task(self._connect(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._behind)
            ends.add(to_server)
            self._writers.add(to_server)
            await asyncio.gather(self._forward(reader, to_server, ends), self._forward(from_server, writer, ends))
        except OSError:
            pass
        finally:
            _abort(ends)
            self._writers -= ends

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ends: set[asyncio.StreamWriter]
    ) -> None:
        with suppress(OSError):
            while (chunk := await reader.read(65536)) and await self.passes():
                writer.write(chunk)
                await writer.drain()
        _abort(ends)


def _abort(ends: Iterable[asyncio.StreamWriter]) -> None:
    for end in ends:
        end.transport.abort()
