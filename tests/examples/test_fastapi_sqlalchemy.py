"""The example on FastAPI and SQLAlchemy takes orders and pays them, on the memory broker and a real PostgreSQL."""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator

import httpx
import psycopg
import pytest

from orderbus.adapters.postgres import apply
from tests.programs import ROOT
from tests.runtime.world import until

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

FOLDER = ROOT / "examples" / "08_fastapi_sqlalchemy"


@pytest.fixture
async def shop(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await apply(connection)
    monkeypatch.setenv("ORDERBUS_DATABASE_URL", database_url)
    monkeypatch.setenv("ORDERBUS_BROKER_URL", "memory://")
    monkeypatch.syspath_prepend(FOLDER)
    database, program = importlib.import_module("database"), importlib.import_module("shop")
    app = program.app
    await database.create_tables()
    async with app.router.lifespan_context(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            yield client
    await database.engine.dispose()
    del sys.modules["database"], sys.modules["shop"]


async def test_an_order_is_placed_and_paid_and_refused_the_second_time(shop: httpx.AsyncClient) -> None:
    order = {"number": 7, "cents": 500}

    placed = await shop.post("/orders", json=order)
    await until(lambda: sys.modules["shop"].bus.stats.handled == 1)
    looked = await shop.get("/orders/7")
    again = await shop.post("/orders", json=order)
    wrong = await shop.post("/orders", json={"number": 0})

    assert (placed.status_code, placed.json()) == (201, order)
    assert looked.json() == {"is_paid": True}
    assert (again.status_code, again.json()) == (409, {"detail": "there is an order 7 already"})
    assert wrong.headers["content-type"] == "application/problem+json"
    assert (await shop.get("/orders/8")).status_code == 404
