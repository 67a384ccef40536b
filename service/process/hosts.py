"""Which hosts a request may name: no page shall reach a service without keys by a name of its own (DNS rebinding)."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_HOST_HEADER: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@\[\]\\]+)(?::\d{0,5})?", re.IGNORECASE)
_HOST_NAME: Final = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE | re.ASCII)


class AllowedHosts:
    """Decides by the `Host` of a request.

    Loopback's names, the host that is listened on, and those in `named` (`*.example.com` for all below a name) are
    answered. A service that listens elsewhere than on loopback also answers to IP addresses, which no page can take for
    its name, and to this machine's name. With `*`, or with keys and nothing named, every host is answered: a page that
    comes by another name has no key.
    """

    def __init__(self, listens_on: str, named: Sequence[str] = (), *, has_keys: bool = False) -> None:
        self._any = "*" in named or (has_keys and not named)
        self._names = {"localhost", "127.0.0.1", "::1", *map(_normalized, (listens_on, *named))}
        self._suffixes = tuple(name[1:] for name in map(_normalized, named) if name.startswith("*."))
        self._addresses = not is_loopback(_normalized(listens_on))
        if self._addresses:
            self._names.add(_normalized(socket.gethostname()))

    def allows(self, host: str) -> bool:
        """Whether a request with this `Host`, a name or an address with a port or none, is answered."""
        found = _HOST_HEADER.fullmatch(host)
        if self._any or found is None:
            return self._any
        name = _normalized(found[1])
        return (
            name in self._names
            or is_loopback(name)
            or name.endswith(self._suffixes)
            or (self._addresses and _is_address(name))
        )


def require_known_host(app: WSGIApplication, hosts: AllowedHosts) -> WSGIApplication:
    """The WSGI application, for requests alone that name an allowed host, or as HTTP/1.0 may, none."""

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if hosts.allows(environ.get("HTTP_HOST", "localhost")):
            return app(environ, start_response)
        start_response("400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"these metrics do not answer to the name in the Host header\n"]

    return guarded


def parse_host_pattern(name: str) -> str:
    """A host as `--allowed-hosts` takes it, in lower case; raises ValueError for anything else."""
    plain = _normalized(name)
    if name != "*" and not _HOST_NAME.fullmatch(name) and not _is_address(plain):
        raise ValueError(
            "hosts are names or addresses, separated by commas, without scheme, port or path; *.example.com is all "
            "below that name, * any host"
        )
    return plain


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine's own, which no other machine can reach."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _normalized(host: str) -> str:
    """In lower case, without a dot at its end and without brackets."""
    return host.lower().removesuffix(".").removeprefix("[").removesuffix("]")
