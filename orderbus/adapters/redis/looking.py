"""What claims there are for a key, without claiming it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from redis import asyncio as redis
from redis.exceptions import RedisError

from orderbus.adapters.redis.address import place_of
from orderbus.errors import UnavailableError

__all__ = ["ClaimSeen", "claims_seen"]

ANSWER_S = 10.0

ClaimSeen = tuple[Literal["none", "in-progress", "done"], float | None]
"""The claim's state, and the seconds until it runs out."""


async def claims_seen(url: str, keys: Sequence[str]) -> list[ClaimSeen]:
    """One for each key, its prefix included. Raises UnavailableError, and UsageError for a URL that can't be read."""
    where = f"Redis at {place_of(url)}"
    client: Any = redis.Redis.from_url(url, socket_connect_timeout=ANSWER_S, socket_timeout=ANSWER_S)
    seen: list[ClaimSeen] = []
    try:
        async with asyncio.timeout(ANSWER_S):
            for key in keys:
                token, answer = await client.hmget(key, "token", "answer")
                left_ms = await client.pttl(key)
                if token is None:
                    seen.append(("none", None))
                else:
                    seen.append(("in-progress" if answer is None else "done", max(left_ms, 0) / 1000))
    except TimeoutError as error:
        raise UnavailableError(f"{where}: no answer within {ANSWER_S:g} s") from error
    except (RedisError, OSError) as error:
        raise UnavailableError(f"{where}: {error}") from error
    finally:
        await client.aclose()
    return seen
