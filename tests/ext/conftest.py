"""A database with the tables of orderbus and one of a user's, for the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from orderbus import new_id
from orderbus.adapters.postgres import open_store


@pytest.fixture(scope="module")
def module_url(postgres_url: str) -> Iterator[str]:
    name = "orderbus_test_ext_" + new_id().hex[-12:]
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))

    async def apply() -> None:
        async with open_store(url, name="test") as store:
            await store.apply_schema()

    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f'create database "{name}"')
        asyncio.run(apply())
        with psycopg.connect(url) as database:
            database.execute("create table payment (number int primary key, cents int not null check (cents >= 0))")
        yield url
        server.execute(f'drop database "{name}" with (force)')


@pytest.fixture
def db(module_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to look at what is there; everything is empty at first."""
    with psycopg.connect(module_url, autocommit=True) as connection:
        for table in ("payment", "orderbus.inbox", "orderbus.outbox", "orderbus.stuck", "orderbus.scheduled", "orderbus.lease"):
            connection.execute(f"delete from {table}")  # to truncate the inbox with its partitions takes half a second
        yield connection
