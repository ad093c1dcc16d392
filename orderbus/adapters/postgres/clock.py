"""What time it is for PostgreSQL."""

from __future__ import annotations

import time

from orderbus.adapters.postgres.store import open_store

__all__ = ["ahead"]


async def ahead(url: str) -> tuple[float, float]:
    """By how many seconds the server's clock is ahead of this machine's, and how far off that may be: half of the way there and back.

    Raises UnavailableError and UsageError.
    """
    async with open_store(url, name="orderbus check", pool_size=1) as store:
        transaction = await store.begin()
        try:
            before_s = time.time()
            rows, _ = await transaction.execute("select extract(epoch from clock_timestamp())::float8", ())
            after_s = time.time()
        finally:
            await transaction.rollback()
    return rows[0][0] - (before_s + after_s) / 2, (after_s - before_s) / 2
