"""What an API process knows of the queue on Redis as a whole: its fill, its speed, its workers, and Redis' time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from service.queue import redis_scripts as scripts
from service.queue.contract import DrainRate, QueueStats, WorkerInfo
from service.queue.redis_clock import RedisClock
from service.queue.redis_messages import decode_counter, decode_info
from service.queue.redis_protocol import HEARTBEAT_TTL, Keys


class QueueStatus:
    """The state of the queue as of the last poll. `epoch` is the mark of Redis' memory, empty before the first poll."""

    def __init__(self, redis: Redis, keys: Keys, on_lost: Callable[[], None]) -> None:
        """`on_lost` is called when Redis turns out to have lost its memory."""
        self._redis = redis
        self._keys = keys
        self._on_lost = on_lost
        self._alive = redis.register_script(scripts.ALIVE)
        self.clock = RedisClock()
        self.epoch = b""
        self.stats = QueueStats(0, 0)
        self.drain_rate = DrainRate()
        self.workers: list[WorkerInfo] = []
        self._tokens_done: int | None = None

    async def poll(self) -> None:
        """Bring everything up to date; raises REDIS_FAILURES. Writes, so that a Redis which only reads is noticed."""
        keys = self._keys
        pipe = self._redis.pipeline(transaction=False)
        pipe.set(keys.epoch, uuid.uuid4().hex, nx=True)
        pipe.get(keys.epoch)
        for stream in keys.streams:
            pipe.xlen(stream)
        pipe.mget(keys.tokens, keys.done)
        pipe.time()
        asked = time.monotonic()
        _, epoch, interactive, bulk, (tokens, done), redis_time = await pipe.execute()
        self.clock.learn(redis_time, asked)
        self._adopt(epoch)
        self.stats = QueueStats(interactive + bulk, decode_counter(tokens))
        self._measure(decode_counter(done))
        alive: Any = await self._alive(keys=keys.registry, args=[HEARTBEAT_TTL])
        infos = [decode_info(info, variant) for info, variant in zip(alive[::2], alive[1::2], strict=True)]
        self.workers = [info for info in infos if info is not None]

    def _adopt(self, epoch: bytes | None) -> None:
        if epoch is None:
            return  # Deleted at this very moment: the next poll sets a new one.
        if self.epoch and epoch != self.epoch:
            self._on_lost()
        self.epoch = epoch

    def _measure(self, tokens_done: int) -> None:
        if self._tokens_done is not None and tokens_done >= self._tokens_done:
            self.drain_rate.record(tokens_done - self._tokens_done, self.stats.jobs)
        self._tokens_done = tokens_done
