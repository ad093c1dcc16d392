"""Which Redis answers."""

from __future__ import annotations

import asyncio

from redis import asyncio as redis
from redis.exceptions import RedisError

from orderbus.errors import UnavailableError, UsageError

__all__ = ["server_version"]

ANSWER_S = 10.0


async def server_version(url: str) -> str:
    """Connect, ask, and leave. Raises UnavailableError, naming host and port, and UsageError for a URL that can't be read."""
    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S)
    except ValueError:
        raise UsageError("the Redis URL can't be read; write redis://user:password@host:6379/0") from None
    given = client.connection_pool.connection_kwargs
    host, port = given.get("host", "localhost"), given.get("port", 6379)
    where = f"Redis at {given.get('path') or f'{host}:{port}'}"
    try:
        async with asyncio.timeout(ANSWER_S):
            info = await client.info("server")
    except TimeoutError as error:
        raise UnavailableError(f"{where}: no answer within {ANSWER_S:g} s") from error
    except (RedisError, OSError) as error:
        raise UnavailableError(f"{where}: {error}") from error
    finally:
        await client.aclose()
    return f"Redis {info.get('redis_version', 'of an unknown version')}"
