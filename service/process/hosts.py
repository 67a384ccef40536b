"""Which `Host` a request may name: the defence of a service without keys against DNS rebinding.

A malicious web page can point a name of its own at this machine's address, and its visitor's browser then treats the
service as part of that page. The `Host` header still carries the page's name, so unknown names are refused.
"""

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
    """Decides by a request's `Host` whether to answer it.

    Always allowed: loopback's names, the host that the service listens on, and `named` (`*.example.com` covers all
    subdomains). Off loopback, also IP addresses, which cannot be a page's own name, and this machine's name. `*` allows
    every host, and so do keys with nothing named: a rebinding page has no key.
    """

    def __init__(self, listens_on: str, named: Sequence[str] = (), *, has_keys: bool = False) -> None:
        self._any = "*" in named or (has_keys and not named)
        self._names = {"localhost", "127.0.0.1", "::1", *map(_normalized, (listens_on, *named))}
        self._suffixes = tuple(name[1:] for name in map(_normalized, named) if name.startswith("*."))
        self._addresses = not is_loopback(_normalized(listens_on))
        if self._addresses:
            self._names.add(_normalized(socket.gethostname()))

    def allows(self, host: str) -> bool:
        """Whether to answer a request with this `Host`: a name or an address, with or without a port."""
        match = _HOST_HEADER.fullmatch(host)
        if self._any or match is None:
            return self._any
        name = _normalized(match[1])
        return (
            name in self._names
            or is_loopback(name)
            or name.endswith(self._suffixes)
            or (self._addresses and _is_address(name))
        )


def require_known_host(app: WSGIApplication, hosts: AllowedHosts) -> WSGIApplication:
    """Wrap a WSGI application: a `Host` that is not allowed gets 400. HTTP/1.0 may omit it."""

    def checked(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if hosts.allows(environ.get("HTTP_HOST", "localhost")):
            return app(environ, start_response)
        start_response("400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"metrics are not served under the name in the Host header\n"]

    return checked


def parse_host_pattern(name: str) -> str:
    """An entry of --allowed-hosts in lower case. Raises ValueError unless it is a host, *.name or *."""
    plain = _normalized(name)
    if name != "*" and not _HOST_NAME.fullmatch(name) and not _is_address(plain):
        raise ValueError(
            "expected host names or addresses, separated by commas, without scheme, port or path; *.example.com covers "
            "all subdomains, * any host"
        )
    return plain


def is_loopback(host: str) -> bool:
    """Whether this name or address is reachable from this machine only."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _normalized(host: str) -> str:
    """In lower case, without a trailing dot or brackets."""
    return host.lower().removesuffix(".").removeprefix("[").removesuffix("]")
