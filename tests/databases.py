"""A database of one's own on the tests' PostgreSQL, with the schema of orderbus."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg

from orderbus import new_id
from orderbus.adapters.postgres import open_store

__all__ = ["prepared_database"]


@contextmanager
def prepared_database(postgres_url: str, purpose: str, tables: str) -> Iterator[str]:
    """Its URL; `tables` is SQL that makes the tables of the test. Deleted afterwards, with whoever is still connected."""
    name = f"orderbus_test_{purpose}_{new_id().hex[-12:]}"
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))

    async def apply() -> None:
        async with open_store(url, name="test") as store:
            await store.apply_schema()

    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f'create database "{name}"')
        asyncio.run(apply())
        with psycopg.connect(url) as database:
            database.execute(tables.encode())
        yield url
        server.execute(f'drop database "{name}" with (force)')
