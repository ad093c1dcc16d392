"""The API as the tests see it: served at a port of its own, with a client, and a look at its database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import psycopg

from services.orders_api import bus
from services.orders_api.http import Limits
from services.orders_api.serve import serve
from tests.servers import free_port
from tests.services.shop import until

CUSTOMER = "00000000-0000-0000-0000-000000000001"
LINE = {"sku": "article-00001", "quantity": 2, "unit_cents": 995}
ORDER: dict[str, Any] = {"customer_id": CUSTOMER, "lines": [LINE]}
LIMIT_S = 30.0


class Served:
    """One server of the API."""

    def __init__(self, port: int, client: httpx.AsyncClient, database: psycopg.AsyncConnection[Any]) -> None:
        self.port = port
        self.client = client
        self.stop = anyio.Event()
        self.stopped = anyio.Event()
        self._database = database

    async def place(self, order: object = ORDER, key: str | None = None) -> httpx.Response:
        return await self.client.post("/orders", json=order, headers={} if key is None else {"Idempotency-Key": key})

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        return await (await self._database.execute(query)).fetchall()

    async def change(self, statement: str) -> None:
        await self._database.execute(statement)

    async def until_blocked(self, count: int) -> None:
        """Wait until so many transactions wait for a lock."""

        async def look() -> tuple[bool, object]:
            blocked = await self.rows(_BLOCKED)
            return len(blocked) == count, blocked

        await until(look)

    async def say(self, *parts: bytes) -> bytes:
        """Send bytes on a connection of one's own; everything that comes back until it is closed by the server."""
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                for part in parts:
                    writer.write(part)
                return await reader.read()
            finally:
                writer.close()


@asynccontextmanager
async def served(database_url: str, limits: Limits | None = None) -> AsyncIterator[Served]:
    """Serve the open bus for the length of a block."""
    port = free_port()
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as database,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client,
        anyio.create_task_group() as tasks,
    ):
        api = Served(port, client, database)

        async def run(*, task_status: Any) -> None:
            try:
                await serve(bus, "127.0.0.1", port, limits=limits or QUICK, stop=api.stop, task_status=task_status)
            finally:
                api.stopped.set()

        await tasks.start(run)
        yield api
        api.stop.set()


@asynccontextmanager
async def holding(database_url: str, table: str) -> AsyncIterator[None]:
    """Nobody writes to a table inside the block."""
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute(f"lock table {table} in share mode")
        yield
        await connection.rollback()


QUICK = Limits(notice_seconds=0.0)

_BLOCKED = "select query from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
