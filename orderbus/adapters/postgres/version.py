"""Which PostgreSQL answers."""

from __future__ import annotations

from orderbus.adapters.postgres.store import open_store

__all__ = ["server_version"]


async def server_version(url: str) -> str:
    """Connect, ask, and leave. Raises UnavailableError, naming host, port and database, and UsageError for a wrong URL."""
    async with open_store(url, name="orderbus check", pool_size=1) as store:
        transaction = await store.begin()
        try:
            rows, _ = await transaction.execute("select current_setting('server_version')", ())
        finally:
            await transaction.rollback()
    return f"PostgreSQL {rows[0][0]}"
