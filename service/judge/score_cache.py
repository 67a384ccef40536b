"""Known answers: the same tokens give the same numbers, so they need not be judged twice.

A cache never fails a request and hardly delays it: an answer that it does not have in time is judged anew.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from service.engine.contract import AnyItem, Classified, LabelLogprobs, ScoreItem, TextItem, TextScoreItem

log = structlog.get_logger(__name__)

# Seconds that Redis may take to answer, and for which it is not asked again after a failure.
REDIS_LIMIT: Final = 0.1
REDIS_PAUSE: Final = 1.0
LOG_EVERY: Final = 60.0
CONNECTIONS: Final = 32

_KEY_BYTES: Final = 16
_HEAD: Final = struct.Struct("<IIB")
_BROKEN = (RedisError, OSError, asyncio.TimeoutError)

Answer = TypeVar("Answer")

Kept: TypeAlias = LabelLogprobs | Classified
"""Answers that are remembered. Generated text is not: it would take a hundred times the memory."""


class ScoreCache(Protocol):
    """Answers by `variant_key`. Lives on one event loop; its methods raise nothing."""

    async def get(self, keys: Sequence[bytes]) -> list[Kept | None]:
        """What is known for each key, in order."""

    async def put(self, found: Mapping[bytes, Kept]) -> None:
        """Remember these, and forget the oldest where there are too many.

        Left out are answers that are not finite, and floored ones: asked again, the API may return the label.
        """

    async def close(self) -> None:
        """Close its connections."""


def item_key(item: AnyItem) -> bytes:
    """16 bytes that stand for an item, whoever answers it."""
    if isinstance(item, TextItem):
        asked = json.dumps([item.labels if isinstance(item, TextScoreItem) else [], item.text]).encode()
        return blake2b(asked, digest_size=_KEY_BYTES).digest()
    labels = item.label_ids if isinstance(item, ScoreItem) else ()
    # The count keeps a label's id from being read as a token's.
    ids = array("I", (len(labels), *labels, *item.token_ids))
    return blake2b(ids.tobytes(), digest_size=_KEY_BYTES).digest()


def variant_key(variant: str, item: bytes) -> bytes:
    """16 bytes for an `item_key`; `variant` is all else that the numbers depend on: model, task, code and hardware."""
    return blake2b(item + variant.encode(), digest_size=_KEY_BYTES).digest()


class MemoryCache:
    """In this process; the least recently used answer is forgotten first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[bytes, Kept] = OrderedDict()

    async def get(self, keys: Sequence[bytes]) -> list[Kept | None]:
        found = [self._entries.get(key) for key in keys]
        for key, answer in zip(keys, found, strict=True):
            if answer is not None:
                self._entries.move_to_end(key)
        return found

    async def put(self, found: Mapping[bytes, Kept]) -> None:
        for key, answer in found.items():
            if _is_kept(answer):
                self._entries[key] = answer
                self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    async def close(self) -> None:
        """Nothing to close."""


# Each answer under a key of its own, which Redis lets expire; `index` has the keys by the time of their writing (in
# microseconds, so that the order is that of arrival), from which the oldest are taken when there are too many.
# KEYS index, answers…  ARGV ttl in ms, most entries, then a member of the index and an answer for each.
_PUT: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local ttl, most = tonumber(ARGV[1]), tonumber(ARGV[2])
for i = 2, #KEYS do
  redis.call('SET', KEYS[i], ARGV[2 * i], 'PX', ttl)
  redis.call('ZADD', KEYS[1], now, ARGV[2 * i - 1])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ttl * 1000)
redis.call('PEXPIRE', KEYS[1], ttl)
local excess = redis.call('ZCARD', KEYS[1]) - most
if excess > 0 then
  local oldest = redis.call('ZPOPMIN', KEYS[1], excess)
  local base = string.sub(KEYS[2], 1, #KEYS[2] - #ARGV[3])
  for i = 1, #oldest, 2 do
    redis.call('UNLINK', base .. oldest[i])
  end
end
"""


class RedisCache:
    """Shared by all processes that use the same Redis; an answer is kept for `ttl` seconds after it was written.

    At most `max_entries` are kept, those written last. After a failure Redis is not asked for a second, so that a
    hanging one does not cost every request the time limit.
    """

    def __init__(self, redis: Redis, prefix: str, ttl: float, max_entries: int) -> None:
        self._redis = redis
        # The braces keep all keys in one slot of a cluster, where a script's keys must be.
        self.base = f"{prefix}:cache:{{scores}}:".encode()
        """All of its keys in Redis begin like this."""
        self._ttl_ms = max(1, int(ttl * 1000))
        self._max_entries = max_entries
        self._put = redis.register_script(_PUT)
        self._ask_again = -math.inf
        self._log_again = -math.inf

    async def get(self, keys: Sequence[bytes]) -> list[Kept | None]:
        found: list[Any] | None = None
        if keys:
            found = await self._ask(lambda: self._redis.mget([self.base + key for key in keys]))
        return [_unpacked(value) for value in found] if found else [None] * len(keys)

    async def put(self, found: Mapping[bytes, Kept]) -> None:
        packed = {key: _packed(answer) for key, answer in found.items() if _is_kept(answer)}
        if packed:
            names = [self.base + b"index", *(self.base + key for key in packed)]
            pairs = [part for pair in packed.items() for part in pair]
            await self._ask(lambda: self._put(keys=names, args=[self._ttl_ms, self._max_entries, *pairs]))

    async def close(self) -> None:
        """Close the connections, without waiting long for a silent Redis."""
        with suppress(*_BROKEN):
            async with asyncio.timeout(REDIS_LIMIT):
                await self._redis.aclose(close_connection_pool=True)

    async def _ask(self, ask: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """Redis' answer, or None if it fails or is late."""
        if time.monotonic() < self._ask_again:
            return None
        try:
            async with asyncio.timeout(REDIS_LIMIT):
                return await ask()
        except Exception as exc:
            now = time.monotonic()
            self._ask_again = now + REDIS_PAUSE
            if now >= self._log_again:
                self._log_again = now + LOG_EVERY
                log.warning("the score cache cannot be asked", reason=type(exc).__name__)
            return None


def redis_cache(url: str, prefix: str, ttl: float, max_entries: int) -> RedisCache:
    """A cache with connections of its own, so that nothing else waits for them. Raises ValueError for a bad URL."""
    pool: Any = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=REDIS_LIMIT,
        socket_timeout=REDIS_LIMIT,
        socket_connect_timeout=REDIS_LIMIT,
        retry=None,
    )
    return RedisCache(Redis.from_pool(pool), prefix, ttl, max_entries)


def _is_kept(answer: Kept) -> bool:
    if isinstance(answer, Classified):
        return math.isfinite(answer.logit)
    return not answer.floored and all(map(math.isfinite, answer.logprobs))


def _packed(answer: Kept) -> bytes:
    """The number of labels and their log-probabilities; or 0, which no judge of labels has, and a head's logit."""
    if isinstance(answer, Classified):
        return _HEAD.pack(0, answer.cached_tokens, 0) + struct.pack("<d", answer.logit)
    count = len(answer.logprobs)
    return _HEAD.pack(answer.argmax_id, answer.cached_tokens, count) + struct.pack(f"<{count}d", *answer.logprobs)


def _unpacked(value: bytes | None) -> Kept | None:
    """None also for bytes that are not an answer: another version may have written them."""
    if value is None or len(value) < _HEAD.size:
        return None
    argmax_id, cached_tokens, count = _HEAD.unpack_from(value)
    if len(value) != _HEAD.size + 8 * (count or 1):
        return None
    if not count:
        answer: Kept = Classified(struct.unpack_from("<d", value, _HEAD.size)[0], cached_tokens)
    else:
        answer = LabelLogprobs(struct.unpack_from(f"<{count}d", value, _HEAD.size), argmax_id, cached_tokens)
    return answer if _is_kept(answer) else None
