"""A shop for each test: a database with the services' tables, a broker inside the process, and everything that was ever said."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit, urlunsplit

import anyio
import psycopg
import pytest
from psycopg import sql
from redis.asyncio import Redis

from orderbus.adapters import memory
from services.shared import database
from tests.servers import Rabbit
from tests.services.shop import Shop

STOCK = database.Stock(articles=5, pieces=100)


@pytest.fixture(scope="session")
def prepared_database_url(postgres_url: str) -> Iterator[str]:
    """A database with all tables and five articles of 100 pieces each."""
    name = f"orderbus_test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        anyio.run(database.prepare, url, STOCK)
        yield url
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def shop_database_url(prepared_database_url: str) -> str:
    """The same, as new: emptying it takes a hundredth of the time of another one."""
    with psycopg.connect(prepared_database_url) as connection:
        for table in ("orders", "idempotency_key", "payment", "reservation"):
            connection.execute(sql.SQL("delete from {}").format(sql.Identifier(table)))
        for table in ("inbox", "outbox", "scheduled", "stuck"):
            connection.execute(sql.SQL("delete from {}").format(sql.Identifier("orderbus", table)))
        connection.execute("update stock set available = initial")
    return prepared_database_url


@pytest.fixture
async def shop(shop_database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    """On the memory broker, whose dead letters can be looked at."""
    broker_url = f"memory://{secrets.token_hex(6)}"
    _set_environment(monkeypatch, broker_url, shop_database_url)
    async with memory.open_broker(broker_url, name="tests") as broker, Shop.open(shop_database_url) as shop:
        shop.broker = broker
        yield shop


@pytest.fixture
def shop_vhost_url(rabbit: Rabbit) -> Iterator[str]:
    """A vhost of the test's own: the services' queues have the same names in every test, and an order left in one would be the next's."""
    with rabbit.vhost(f"orderbus-test-{secrets.token_hex(4)}") as url:
        yield url


@pytest.fixture
async def servers_shop(
    shop_database_url: str, shop_vhost_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shop]:
    """On RabbitMQ and Redis."""
    prefix = f"orderbus-test:{secrets.token_hex(6)}:"
    _set_environment(monkeypatch, shop_vhost_url, shop_database_url)
    monkeypatch.setenv("ORDERBUS_REDIS_URL", redis_url)
    monkeypatch.setenv("ORDERBUS_REDIS_PREFIX", prefix)
    async with Shop.open(shop_database_url) as shop:
        yield shop
    async with Redis.from_url(redis_url) as redis:
        keys = [key async for key in redis.scan_iter(f"{prefix}*", count=1_000)]
        if keys:
            await redis.delete(*keys)


def _set_environment(monkeypatch: pytest.MonkeyPatch, broker_url: str, database_url: str) -> None:
    monkeypatch.setenv("ORDERBUS_BROKER_URL", broker_url)
    monkeypatch.setenv("ORDERBUS_DATABASE_URL", database_url)
    monkeypatch.setenv("ORDERBUS_RELAY", "false")
