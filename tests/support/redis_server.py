"""A real redis-server on a loopback port. It keeps nothing on disk, and can be killed, paused and restarted."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import redis

from bench.support.process import free_port
from deploy.processes import find_redis


class RedisServer:
    """A server that always uses the same port, and loses its memory whenever it ends."""

    def __init__(self, *flags: str, password: str | None = None) -> None:
        self.port = free_port()
        self.password = password
        secret = ["--requirepass", password] if password else []
        where = ["--bind", "127.0.0.1", "--port", str(self.port)]
        nothing_kept = ["--save", "", "--appendonly", "no"]
        self._command = [find_redis("redis-server"), *where, *nothing_kept, *secret, *flags]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Its address, including the password."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, or restart after `kill` or `stop`, and wait until it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd="/")
        deadline = time.monotonic() + 20
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"redis-server does not start: {' '.join(self._command)}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def client(self) -> redis.Redis:
        """A connection for inspection; the caller closes it."""
        return redis.Redis.from_url(self.url, socket_timeout=10)

    def kill(self) -> None:
        """End it as a crash does, without a word to its clients."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it in an orderly way, even while paused; does nothing if it has ended."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Freeze it, which looks like a broken network: connections stay open, nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        self._send(signal.SIGCONT)

    def _end(self, with_signal: signal.Signals) -> None:
        self._send(with_signal)
        assert self._process is not None
        self._process.wait(20)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@contextmanager
def running_redis(*flags: str, password: str | None = None) -> Iterator[RedisServer]:
    """Run a server."""
    server = RedisServer(*flags, password=password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def leftovers(server: RedisServer, base: str = "judge:{fake}", patience: float = 10.0) -> dict[str, int]:
    """What an idle queue must not hold: open and pending jobs, reserved tokens, keys that never expire.

    Empty if nothing has leaked. `base` is the prefix of the queue's keys; the last job has up to `patience` seconds to
    go. Heartbeats, the epoch, the running total and dead letters stay by design; replies and submission marks must have
    a time to live.
    """
    deadline = time.monotonic() + patience
    with server.client() as client:
        while (counts := _leftover_counts(client, base)) and time.monotonic() < deadline:
            time.sleep(0.1)
    return counts


def _leftover_counts(client: redis.Redis, base: str) -> dict[str, int]:
    counts = {"tokens": int(client.get(f"{base}:tokens") or 0)}
    for priority in ("interactive", "bulk"):
        stream = f"{base}:jobs:{priority}"
        counts[stream] = client.xlen(stream)
        counts[f"{stream} pending"] = sum(group["pending"] for group in _groups(client, stream))
    for key in client.scan_iter(f"{base}:*"):
        name = key.decode().removeprefix(f"{base}:")
        counts[f"{name} without expiry"] = int(name not in _KEPT and client.ttl(key) == -1)
    return {what: count for what, count in counts.items() if count}


_KEPT = {"jobs:interactive", "jobs:bulk", "tokens", "done", "workers", "workers:info", "epoch", "dead"}


def _groups(client: redis.Redis, stream: str) -> list[dict[str, int]]:
    try:
        groups: list[dict[str, int]] = client.xinfo_groups(stream)
    except redis.ResponseError:
        # No such stream: nothing was ever queued with this priority.
        return []
    return groups
