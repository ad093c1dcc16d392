"""Which Redis answers."""

from __future__ import annotations

import asyncio

from redis import asyncio as redis
from redis.exceptions import RedisError

from orderbus.adapters.redis.address import place_of
from orderbus.errors import UnavailableError

__all__ = ["server_version"]

ANSWER_S = 10.0


async def server_version(url: str) -> str:
    """Connect, ask, and leave. Raises UnavailableError, naming host and port, and UsageError for a URL that can't be read."""
    where = f"Redis at {place_of(url)}"
    client = redis.Redis.from_url(url, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S)
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
