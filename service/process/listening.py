"""The service's sockets: taken before anything is loaded, so that a port in use is told at once, and in a sentence."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Final

BACKLOG: Final = 2048
_HIGHEST_PORT: Final = 65535
# A name may have addresses that this machine has not: localhost is ::1 too, where there is no IPv6.
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of the host, not listening yet; all have the same port, which for 0 is a free one.

    Raises OSError, which says what to do, where the host is none of this machine or the port cannot be had.
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
        for each in bound:
            each.close()
        raise bind_error((serious or errors)[0], host, port)
    return bound


def listen(sockets: Sequence[socket.socket]) -> None:
    """Take connections from now on. Raises OSError, as `bind`, where another process was faster."""
    for each in sockets:
        host, port = each.getsockname()[:2]
        try:
            each.listen(BACKLOG)
        except OSError as error:
            raise bind_error(error, host, port) from error


def bind_error(error: OSError, host: str, port: int, prefix: str = "--") -> OSError:
    """The error in a sentence; `prefix` is what the flags for host and port begin with."""
    match error.errno:
        case errno.EADDRINUSE:
            text = f"port {port} is in use; try {prefix}port {port + 1 if port < _HIGHEST_PORT else 0}"
        case errno.EACCES | errno.EPERM:
            text = f"port {port} needs more rights than this user has; try {prefix}port {port + 8000}"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            text = (
                f"{host} is no address of this machine; try {prefix}host 127.0.0.1, or 0.0.0.0 for all of its addresses"
            )
        case _:
            text = f"cannot listen on {host}, port {port}: {error.strerror or error}"
    return OSError(text)


def url_of(bound: socket.socket) -> str:
    """Where the socket is, for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _addresses(host: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OSError(
            f"--host {host} cannot be resolved ({error}); give an address of this machine, or 0.0.0.0 for all"
        ) from error
    return [(family, (str(address[0]), *address[1:])) for family, _, _, _, address in found]


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
