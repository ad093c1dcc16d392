"""The API on a database of its own, the memory broker, and whatever keeper of claims a test asks for."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator

import pytest

from services.orders_api import bus
from tests.servers import free_port
from tests.services.orders_api.served import Served, served


@pytest.fixture
def environment(shop_database_url: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What the bus is told; without Redis, claims are kept in the process. The events stay in the outbox."""
    monkeypatch.setenv("ORDERBUS_BROKER_URL", "memory://")
    monkeypatch.setenv("ORDERBUS_DATABASE_URL", shop_database_url)
    monkeypatch.setenv("ORDERBUS_RELAY", "false")
    return monkeypatch


@pytest.fixture
def redis(environment: pytest.MonkeyPatch, redis_url: str) -> str:
    """Claims are kept in Redis; the prefix of their keys."""
    prefix = f"orderbus-test-{secrets.token_hex(6)}:"
    environment.setenv("ORDERBUS_REDIS_URL", redis_url)
    environment.setenv("ORDERBUS_REDIS_PREFIX", prefix)
    return prefix


@pytest.fixture
def no_redis(environment: pytest.MonkeyPatch) -> None:
    """Claims should be in a Redis that is away."""
    environment.setenv("ORDERBUS_REDIS_URL", f"redis://127.0.0.1:{free_port()}/")


@pytest.fixture
async def api(environment: pytest.MonkeyPatch, shop_database_url: str) -> AsyncIterator[Served]:
    """The API, served. Ask for `redis` or `no_redis` before it."""
    async with bus, served(shop_database_url) as api:
        yield api
