"""What time it is for Redis."""

from __future__ import annotations

import asyncio
import time

from redis import asyncio as redis
from redis.exceptions import RedisError

from orderbus.adapters.redis.address import place_of
from orderbus.errors import UnavailableError

__all__ = ["ahead"]

ANSWER_S = 10.0


async def ahead(url: str) -> tuple[float, float]:
    """By how many seconds the server's clock is ahead of this machine's, and how far off that may be: half of the way there and back.

    Raises UnavailableError and UsageError.
    """
    where = f"Redis at {place_of(url)}"
    client = redis.Redis.from_url(url, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S)
    try:
        async with asyncio.timeout(ANSWER_S):
            await client.ping()  # connects
            before_s = time.time()
            seconds, microseconds = await client.time()
            after_s = time.time()
    except TimeoutError as error:
        raise UnavailableError(f"{where}: no answer within {ANSWER_S:g} s") from error
    except (RedisError, OSError) as error:
        raise UnavailableError(f"{where}: {error}") from error
    finally:
        await client.aclose()
    return seconds + microseconds / 1e6 - (before_s + after_s) / 2, (after_s - before_s) / 2
