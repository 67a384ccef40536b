"""The service's sockets, bound before anything is loaded: a port in use is reported at once, and in a sentence."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Final

BACKLOG: Final = 2048
_HIGHEST_PORT: Final = 65535
# A name may resolve to addresses that this machine lacks: localhost is also ::1 on machines without IPv6.
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class ListenError(OSError):
    """The service cannot listen where it should; the message says what to do."""


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind one socket per address of the host, not listening yet, all on the same port; 0 picks a free one.

    Raises ListenError if the host is not this machine's or the port is unavailable.
    """
    bound: list[socket.socket] = []
    errors: list[OSError] = []
    for family, address in _addresses(host):
        try:
            bound.append(_bound(family, address, bound[0].getsockname()[1] if bound else port))
        except OSError as error:
            errors.append(error)
    serious = [error for error in errors if error.errno not in _ABSENT]
    if serious or not bound:
        for taken in bound:
            taken.close()
        raise bind_error((serious or errors)[0], host, port)
    return bound


def listen(sockets: Sequence[socket.socket]) -> None:
    """Start accepting connections. Raises ListenError if another process took the port first."""
    for bound in sockets:
        host, port = bound.getsockname()[:2]
        try:
            bound.listen(BACKLOG)
        except OSError as error:
            raise bind_error(error, host, port) from error


def bind_error(error: OSError, host: str, port: int, prefix: str = "--") -> ListenError:
    """The error as a sentence that says what to do; the flags it names are `{prefix}host` and `{prefix}port`."""
    match error.errno:
        case errno.EADDRINUSE:
            text = f"port {port} is in use; try {prefix}port {port + 1 if port < _HIGHEST_PORT else 0}"
        case errno.EACCES | errno.EPERM:
            text = f"this user may not listen on port {port}; try {prefix}port {port + 8000}"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            text = f"{host} is not an address of this machine; try {prefix}host 127.0.0.1, or 0.0.0.0 for all"
        case _:
            text = f"cannot listen on {host}, port {port}: {error.strerror or error}"
    return ListenError(text)


def url_of(bound: socket.socket) -> str:
    """The socket's address as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _addresses(host: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        infos = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ListenError(
            f"--host {host} cannot be resolved ({error}); give an address of this machine, or 0.0.0.0 for all"
        ) from error
    return [(family, (str(address[0]), *address[1:])) for family, _, _, _, address in infos]


def _bound(family: socket.AddressFamily, address: tuple[str, int], port: int) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((address[0], port, *address[2:]))
    except OSError:
        bound.close()
        raise
    return bound
