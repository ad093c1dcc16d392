"""Every test of a store runs on a server of the machine and on the embedded one, each time in an empty database."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orderbus._core.ids import uuid7
from orderbus.abc import OutboxRow
from orderbus.adapters.postgres import PostgresStore, open_store
from orderbus.adapters.postgres.embedded import start_in

NOW_MS = 1_790_000_000_000
Sql = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="session")
def embedded_url(server_stack: ExitStack) -> str:
    """The embedded server, started once for the session."""
    folder = server_stack.enter_context(tempfile.TemporaryDirectory(prefix="ob-pg-", ignore_cleanup_errors=True))
    return start_in(Path(folder) / "data")


@pytest.fixture(scope="session")
def databases(server_stack: ExitStack) -> Callable[[str], str]:
    """A database of this session's own on a server, made at the first call."""
    made: dict[str, str] = {}

    def database(server: str) -> str:
        if server not in made:
            name = f"orderbus_test_{secrets.token_hex(6)}"
            connection = server_stack.enter_context(psycopg.connect(server, autocommit=True))
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
            server_stack.callback(connection.execute, sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
            made[server] = make_conninfo(server, dbname=name)
        return made[server]

    return database


@pytest.fixture(params=["server", "embedded"])
def url(request: pytest.FixtureRequest, databases: Callable[[str], str]) -> str:
    """An empty database. Emptying it fails where the test before left a transaction open."""
    url = databases(request.getfixturevalue("postgres_url" if request.param == "server" else "embedded_url"))
    with psycopg.connect(url, autocommit=True, options="-c lock_timeout=5000 -c client_min_messages=warning") as connection:
        connection.execute("drop schema if exists orderbus cascade; drop schema public cascade; create schema public")
    return url


@pytest.fixture
async def store(url: str) -> AsyncIterator[PostgresStore]:
    """A store with its schema, and a table `notes (id, text)` for handlers to write to."""
    async with open_store(url, name="tests", lock_timeout_ms=2_000) as store:
        await store.apply_schema()
        transaction = await store.begin()
        await transaction.execute("create table notes (id integer primary key, text text)", ())
        await transaction.commit([], [])
        yield store


@pytest.fixture
def query(url: str) -> Iterator[Sql]:
    """A connection beside the store: runs a statement, each in a transaction of its own, and returns its rows."""
    with psycopg.connect(url, autocommit=True) as connection:

        def run(statement: str, *params: Any) -> list[tuple[Any, ...]]:
            cursor = connection.execute(statement, params)
            return cursor.fetchall() if cursor.description else []

        yield run


def event_id(number: int, time_ms: int = NOW_MS) -> UUID:
    return uuid7(time_ms + number, number)


def row(number: int, key: str | None = "k", **changes: Any) -> OutboxRow:
    settings: dict[str, Any] = {
        "event_id": event_id(number),
        "topic": "orders.placed",
        "key": key,
        "bucket": number % 64 if key is None else sum(key.encode()) % 64,
        "body": b'{"n":%d}' % number,
        "content_type": "application/json",
        "headers": {"ob-version": "2"},
    }
    return OutboxRow(**{**settings, **changes})


async def emit(store: PostgresStore, rows: Sequence[OutboxRow]) -> None:
    transaction = await store.begin()
    await transaction.commit([], rows)


ALL = tuple(range(64))
