"""The proxy for an address, from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY; loopback never goes through one.

httpx does not read these for us, because it sends loopback to a proxy and rejects a NO_PROXY that lists `[::1]`. Names
in lower case take precedence; on macOS and Windows the system's settings apply if no variable is set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from socket import inet_aton
from typing import Final
from urllib.request import getproxies

import httpx

_LOOPBACK: Final = ("localhost", "127.0.0.0/8", "127.0.0.1", "::1")
_PORTS: Final = {"http": 80, "https": 443}
_LAST_PORT: Final = 65_535
_LONGEST_LABEL: Final = 63
_NUMBERS: Final = re.compile(r"[0-9][0-9a-fx.]*", re.IGNORECASE)


class ProxySettingError(ValueError):
    """An unusable proxy variable. The message names the variable and never contains a password."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy, and the variable that sets it."""

    variable: str
    address: httpx.Proxy

    def __str__(self) -> str:
        """For messages; without user and password."""
        return f"the proxy {self.address.url} of {self.variable}"

    @property
    def advice(self) -> str:
        """What to do if the proxy is the problem."""
        return f"check {self.variable}, or list the host in NO_PROXY"


def url_of(text: str) -> httpx.URL:
    """Parse a URL. Raises httpx.InvalidURL, also for ports and host names that httpx accepts and then fails on."""
    url = httpx.URL(text)
    if (url.port or 0) > _LAST_PORT:
        raise httpx.InvalidURL(f"there is no port {url.port}: the last is {_LAST_PORT}")
    if not all(0 < len(label) <= _LONGEST_LABEL for label in url.raw_host.removesuffix(b".").split(b".") if url.host):
        raise httpx.InvalidURL("a part of the host's name is empty or too long")
    return url


def proxy_of(url: str) -> Proxy | None:
    """The proxy for `url` (http or https); None for loopback and for hosts listed in NO_PROXY.

    Raises ProxySettingError if the variable does not hold a proxy's address, or a SOCKS one without its package.
    """
    target = httpx.URL(url)
    settings = {scheme: value.strip() for scheme, value in getproxies().items()}
    port = target.port or _PORTS.get(target.scheme)
    if is_loopback(target.host) or _is_exempt(target.host, port, settings.get("no", "")):
        return None
    scheme = next((name for name in (target.scheme, "all") if settings.get(name)), None)
    return None if scheme is None else _checked(_variable(scheme), settings[scheme])


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own: localhost, 127/8, ::1, and 0.0.0.0, which connects there too."""
    name = host.strip("[]").rstrip(".").lower()
    address = _ip_address(name)
    if address is None:
        return name == "localhost" or name.endswith(".localhost")
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified


def exempt_loopback() -> None:
    """If proxies are set, add loopback to NO_PROXY, so that this process's other libraries reach it directly too.

    `[::1]` loses its brackets, because some libraries take it for a broken port.
    """
    settings = getproxies()
    listed = [re.sub(r"^\[(.*)\](:\d+)?$", r"\1", entry) for entry in _entries(settings.get("no", ""))]
    if settings and "*" not in listed:
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys([*listed, *_LOOPBACK]))


def _variable(scheme: str) -> str:
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
    return next((name for name in names if os.environ.get(name)), "the system's settings")


def _checked(variable: str, value: str) -> Proxy:
    try:
        address = httpx.Proxy(url_of(value if "://" in value else f"http://{value}"))
    except (ValueError, httpx.InvalidURL) as error:
        raise ProxySettingError(
            f"{variable} does not hold a proxy's address: give http://HOST:PORT, unset it, or list the host in NO_PROXY"
        ) from error
    if not address.url.host:
        raise ProxySettingError(f"{variable} names no host: give http://HOST:PORT, or unset it")
    if address.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ProxySettingError(
            f"{variable} asks for a SOCKS proxy, which needs another package: pip install socksio, give an HTTP proxy, "
            "or list the host in NO_PROXY"
        )
    return Proxy(variable, address)


def _entries(no_proxy: str) -> Iterator[str]:
    return (entry for entry in re.split(r"[\s,]+", no_proxy.lower()) if entry)


def _is_exempt(host: str, port: int | None, no_proxy: str) -> bool:
    return any(_covers(entry, host.lower(), port) for entry in _entries(no_proxy))


def _covers(entry: str, host: str, port: int | None) -> bool:
    """Whether a NO_PROXY entry covers this host: a name with its subdomains, an address, a network, or `*`."""
    entry = entry.rpartition("://")[2]
    with_port = re.fullmatch(r"(\[.*\]|[^:]*):(\d+)", entry)
    if with_port:
        if int(with_port[2]) != port:
            return False
        entry = with_port[1]
    entry = entry.strip("[]")
    address = _ip_address(host)
    if address is not None and entry != "*":
        return _is_in_network(address, entry)
    name = entry.removeprefix("*").removeprefix(".")
    return entry == "*" or (bool(name) and f".{host}".endswith(f".{name}"))


def _is_in_network(address: IPv4Address | IPv6Address, network: str) -> bool:
    try:
        return address in ip_network(network, strict=False)
    except ValueError:
        return False


def _ip_address(host: str) -> IPv4Address | IPv6Address | None:
    """The host as an address, None for a name. `127.1` and `2130706433` are addresses to the system's inet_aton."""
    with suppress(ValueError):
        return ip_address(host)
    with suppress(OSError):
        return IPv4Address(inet_aton(host)) if _NUMBERS.fullmatch(host) else None
    return None
