"""The demo's database made ready: the tables of orderbus, those of the services, and goods on the shelves.

`python -m services.shared.database` does it for ORDERBUS_DATABASE_URL; doing it again changes nothing but what is out of date.
"""

from __future__ import annotations

import asyncio
import os
import sys
from importlib import resources
from typing import Annotated

import msgspec
import psycopg

from orderbus import Bus, Settings
from orderbus.adapters.postgres import apply
from services.shared.settings import from_environment

CONNECT_S = 10
APPLY_S = 60.0


class Stock(msgspec.Struct, frozen=True):
    """The goods that a new database begins with: STOCK_ARTICLES and STOCK_PIECES."""

    articles: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 100
    pieces: Annotated[int, msgspec.Meta(ge=0, le=2_000_000_000)] = 1_000_000
    """Of each article."""


def sku(number: int) -> str:
    """The name of an article; numbers begin at 1."""
    return f"article-{number:05d}"


async def prepare(database_url: str, stock: Stock | None = None) -> None:
    """Create what is missing and change what is out of date, in a `postgresql://…` or an `embedded` database.

    Stock that is there already stays as it is.
    Two that do it at the same time take turns. Raises UnavailableError (or psycopg's error) when the server is away.
    """
    stock = stock or from_environment(Stock, "STOCK_")
    if not database_url.startswith("embedded"):  # an embedded database gets orderbus's tables when a bus opens it
        async with asyncio.timeout(APPLY_S):
            async with await psycopg.AsyncConnection.connect(
                database_url, autocommit=True, connect_timeout=CONNECT_S
            ) as connection:
                await apply(connection)
    settings = Settings(broker_url="memory://", database_url=database_url, relay=False)
    async with Bus("database", settings=settings) as bus, bus.transaction() as tx:
        await tx.execute("select pg_advisory_xact_lock(hashtextextended('services.schema', 0))")
        await tx.connection.execute(schema_sql())
        await tx.execute(_SHELVE, (stock.pieces, stock.pieces, [sku(number) for number in range(1, stock.articles + 1)]))


def schema_sql() -> str:
    """The tables of the services."""
    return (resources.files("services.shared") / "schema.sql").read_text(encoding="utf-8")


_SHELVE = """\
insert into stock (sku, initial, available)
select sku, %s::int, %s::int from unnest(%s::text[]) as sku
on conflict (sku) do nothing"""


if __name__ == "__main__":
    if not os.environ.get("ORDERBUS_DATABASE_URL"):
        sys.exit("ORDERBUS_DATABASE_URL is not set: postgresql://user:password@host:5432/dbname, or embedded")
    asyncio.run(prepare(os.environ["ORDERBUS_DATABASE_URL"]))
