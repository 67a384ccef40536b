"""A TCP server that treats its callers as proxies and dying services do."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

# Bytes to send before closing, a function that talks to the caller, or None to stay silent until the server ends.
Script: TypeAlias = bytes | Callable[[socket.socket], None] | None


def drip(connection: socket.socket) -> None:
    """Send headers, then a byte every 20 ms until the caller hangs up."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b" ")
            time.sleep(0.02)


@contextmanager
def tcp_server(scripts: Sequence[Script]) -> Iterator[tuple[str, list[bytes]]]:
    """Play one script per connection, in turn. Yields the URL, and the list that the requests are added to."""
    requests: list[bytes] = []
    over = threading.Event()

    def serve() -> None:
        for script in scripts:
            connection, _ = listener.accept()
            with connection:
                requests.append(_read_request(connection))
                _play(script, connection, over)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
        over.set()
        thread.join(10)


def _play(script: Script, connection: socket.socket, over: threading.Event) -> None:
    if script is None:
        over.wait(60)
    elif callable(script):
        script(connection)
    else:
        connection.sendall(script)


def _read_request(connection: socket.socket) -> bytes:
    """Read headers and body: closing a socket with unread bytes resets it, and the answer is lost."""
    request = b""
    while not _is_whole(request):
        chunk = connection.recv(65536)
        if not chunk:
            break
        request += chunk
    return request


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(end) and len(body) >= int(length[1] if length else 0)
