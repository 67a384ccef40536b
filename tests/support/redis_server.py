"""A real redis-server on a loopback port, which keeps nothing on disk and can be killed, paused and started again."""

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
    """One server, always on the same port. Its memory is gone whenever it ends."""

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
        """Where it is, password included."""
        secret = f":{self.password}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, or start again after `kill` or `stop`; returns when it answers."""
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
        """A connection for looking inside, to be closed by the caller."""
        return redis.Redis.from_url(self.url, socket_timeout=10)

    def kill(self) -> None:
        """End as a crash does: nothing is said to anybody, memory is lost."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End in good order, also while paused; nothing happens where it has ended already."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Be silent as behind a broken network: connections stay open, nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._send(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        self._send(how)
        assert self._process is not None
        self._process.wait(20)

    def _send(self, what: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(what)


@contextmanager
def running_redis(*flags: str, password: str | None = None) -> Iterator[RedisServer]:
    """A started server, stopped in the end."""
    server = RedisServer(*flags, password=password)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def leftovers(server: RedisServer, base: str = "judge:{fake}", patience: float = 10.0) -> dict[str, int]:
    """What a queue at rest should not hold: open and pending jobs, reserved tokens, keys that never expire.

    `base` is what the queue's keys begin with. Empty when nothing has leaked; it may take up to `patience` seconds for
    the last job to go. Heartbeats, the epoch, the running total and dead letters stay by design; replies and marks of
    submissions must have a time to live.
    """
    deadline = time.monotonic() + patience
    with server.client() as client:
        while (found := _found(client, base)) and time.monotonic() < deadline:
            time.sleep(0.1)
    return found


def _found(client: redis.Redis, base: str) -> dict[str, int]:
    found = {"tokens": int(client.get(f"{base}:tokens") or 0)}
    for priority in ("interactive", "bulk"):
        stream = f"{base}:jobs:{priority}"
        found[stream] = client.xlen(stream)
        found[f"{stream} pending"] = sum(group["pending"] for group in _groups(client, stream))
    for key in client.scan_iter(f"{base}:*"):
        name = key.decode().removeprefix(f"{base}:")
        found[f"{name} without expiry"] = int(name not in _KEPT and client.ttl(key) == -1)
    return {what: count for what, count in found.items() if count}


_KEPT = {"jobs:interactive", "jobs:bulk", "tokens", "done", "workers", "workers:info", "epoch", "dead"}


def _groups(client: redis.Redis, stream: str) -> list[dict[str, int]]:
    try:
        groups: list[dict[str, int]] = client.xinfo_groups(stream)
    except redis.ResponseError:
        # No such stream: nothing was ever queued in this priority.
        return []
    return groups
