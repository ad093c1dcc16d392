"""Claims in Redis: a hash a key, changed by one script a batch, each key atomically.

A hash holds `fingerprint`, `token` (who claimed it), and `answer` once it is done; its time to live is the lease, or how long the
answer is kept. Redis counts that time by its own clock, so no two processes need agree on theirs. Each script may run twice with
the same effect: a call is sent again where its connection broke, and the first may have arrived.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError, RedisError, TimeoutError as RedisTimeoutError

from orderbus.abc import ClaimAnswer, ClaimState
from orderbus.adapters.redis.address import place_of
from orderbus.errors import UnavailableError, UsageError

__all__ = ["RedisClaims", "open_claims"]

CONNECT_S = 2.0
CALL_S = 5.0
CONNECTIONS = 32

_GRANTED = ClaimAnswer(ClaimState.GRANTED)
_IN_PROGRESS = ClaimAnswer(ClaimState.IN_PROGRESS)
_MISMATCH = ClaimAnswer(ClaimState.MISMATCH)

# KEYS: the keys. ARGV: token, lease in ms, then a fingerprint for each key. The token that holds a key renews its lease.
_CLAIM = """\
local found = {}
for n, key in ipairs(KEYS) do
    local fingerprint = ARGV[n + 2]
    local held = redis.call('hmget', key, 'fingerprint', 'token', 'answer')
    if not held[1] then
        redis.call('hset', key, 'fingerprint', fingerprint, 'token', ARGV[1])
        redis.call('pexpire', key, ARGV[2])
        found[n] = 'g'
    elseif held[1] ~= fingerprint then
        found[n] = 'm'
    elseif held[3] then
        found[n] = 'd' .. held[3]
    elseif held[2] == ARGV[1] then
        redis.call('pexpire', key, ARGV[2])
        found[n] = 'g'
    else
        found[n] = 'p'
    end
end
return found"""

# ARGV: token, how long to keep in ms, then an answer for each key. The same answer again, by the same token, is no loss.
_COMPLETE = """\
local stored = {}
for n, key in ipairs(KEYS) do
    stored[n] = 0
    local held = redis.call('hmget', key, 'token', 'answer')
    if held[1] == ARGV[1] and (not held[2] or held[2] == ARGV[n + 2]) then
        redis.call('hset', key, 'answer', ARGV[n + 2])
        redis.call('pexpire', key, ARGV[2])
        stored[n] = 1
    end
end
return stored"""

# ARGV: token.
_RELEASE = """\
for _, key in ipairs(KEYS) do
    local held = redis.call('hmget', key, 'token', 'answer')
    if held[1] == ARGV[1] and not held[2] then
        redis.call('del', key)
    end
end
return 0"""


@asynccontextmanager
async def open_claims(
    url: str, *, prefix: str = "ob:", connect_s: float = CONNECT_S, call_s: float = CALL_S
) -> AsyncIterator[RedisClaims]:
    """Open claims at `redis://…`, `rediss://…` or `unix://…`; every key begins with `prefix`. asyncio only.

    Redis need not be up: calls raise UnavailableError until it is, at the latest after `call_s`, of which connecting may take
    `connect_s`. Raises UsageError for a URL that `place_of` refuses.
    """
    where = place_of(url)
    try:
        pool: Any = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=call_s,
            socket_connect_timeout=connect_s,
            socket_timeout=call_s,
            health_check_interval=30,
            retry=Retry(NoBackoff(), 1),  # one more try: a connection of the pool may have been closed while it rested
        )
    except (ValueError, TypeError):
        raise UsageError("the Redis URL can't be read; write redis://user:password@host:6379/0", code="OB105") from None
    client = Redis(connection_pool=pool)
    try:
        yield RedisClaims(client, prefix=prefix, where=where, limit_s=call_s)
    finally:
        await client.aclose()
        await pool.aclose()


class RedisClaims:
    """Implements orderbus.abc.Claims: one round trip a call, whatever the number of keys."""

    def __init__(self, client: Redis, *, prefix: str, where: str, limit_s: float) -> None:
        self._prefix = prefix
        self._where = where
        self._limit_s = limit_s
        self._claim = client.register_script(_CLAIM)
        self._complete = client.register_script(_COMPLETE)
        self._release = client.register_script(_RELEASE)

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        """Claim (key, fingerprint) pairs; the token that holds a key already renews its lease."""
        names = [self._prefix + key for key, _ in keys]
        found = await self._call(self._claim, names, [token, lease_ms, *(fingerprint for _, fingerprint in keys)])
        return [_answer(state if isinstance(state, bytes) else str(state).encode()) for state in found]

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        """Store the answer for each key that the token still holds; False where the lease had been lost."""
        names = [self._prefix + key for key, _ in answers]
        stored = await self._call(self._complete, names, [token, keep_ms, *(answer for _, answer in answers)])
        return [bool(one) for one in stored]

    async def release(self, keys: Sequence[str], token: str) -> None:
        """Give up the keys that the token still holds."""
        if keys:
            await self._call(self._release, [self._prefix + key for key in keys], [token])

    async def _call(self, script: Callable[..., Awaitable[Any]], keys: list[str], arguments: list[Any]) -> Any:
        try:
            async with asyncio.timeout(self._limit_s):
                return await script(keys=keys, args=arguments)
        except TimeoutError as error:
            raise UnavailableError(f"Redis at {self._where}: no answer within {self._limit_s:g} s") from error
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise UnavailableError(f"Redis at {self._where}: {error}") from error
        except RedisError as error:
            # Loading its data, read-only after a failover, out of memory: none is the caller's fault, all pass.
            raise UnavailableError(f"Redis at {self._where} refuses: {error}") from error


def _answer(state: bytes) -> ClaimAnswer:
    kind = state[:1]
    if kind == b"g":
        return _GRANTED
    if kind == b"p":
        return _IN_PROGRESS
    if kind == b"m":
        return _MISMATCH
    return ClaimAnswer(ClaimState.DONE, state[1:])
