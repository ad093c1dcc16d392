"""What the services share: the database made ready, and settings read from the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated, Any

import anyio
import msgspec
import psycopg
import pytest

from orderbus import SettingsError
from services.shared import database
from services.shared.settings import from_environment

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


class Oven(msgspec.Struct, frozen=True):
    degrees: Annotated[int, msgspec.Meta(le=300)] = 180
    fan: bool = False
    dish: str | None = None


async def test_a_database_is_made_ready_once_also_by_several_at_a_time(database_url: str) -> None:
    stock = database.Stock(articles=3, pieces=7)
    async with anyio.create_task_group() as appliers:
        for _ in range(3):
            appliers.start_soon(database.prepare, database_url, stock)

    with psycopg.connect(database_url) as connection:
        assert connection.execute("select sku, initial, available from stock order by sku").fetchall() == [
            (database.sku(number), 7, 7) for number in (1, 2, 3)
        ]
        assert connection.execute("select count(*) from orders").fetchone() == (0,)


async def test_making_it_ready_again_leaves_what_is_there_as_it_is(database_url: str) -> None:
    await database.prepare(database_url, database.Stock(articles=2, pieces=7))
    with psycopg.connect(database_url) as connection:
        connection.execute("update stock set available = 3 where sku = %s", (database.sku(1),))

    await database.prepare(database_url, database.Stock(articles=3, pieces=9))

    with psycopg.connect(database_url) as connection:
        assert connection.execute("select available from stock order by sku").fetchall() == [(3,), (7,), (9,)]


async def test_an_older_database_is_brought_up_to_date(database_url: str) -> None:
    await database.prepare(database_url, database.Stock(articles=1))
    with psycopg.connect(database_url) as connection:
        new = tables(connection)
        connection.execute(OLDER)

    await database.prepare(database_url, database.Stock(articles=1))

    with psycopg.connect(database_url) as connection:
        assert tables(connection) == new


def test_it_can_be_made_ready_from_the_command_line(database_url: str) -> None:
    environment = {**os.environ, "ORDERBUS_DATABASE_URL": database_url, "STOCK_ARTICLES": "4"}

    subprocess.run([sys.executable, "-m", "services.shared.database"], env=environment, check=True, timeout=60)

    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from stock").fetchone() == (4,)


def test_settings_are_read_by_their_prefix_and_default_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_DEGREES", " 200 ")
    monkeypatch.setenv("OVEN_FAN", "true")
    monkeypatch.setenv("OVEN_DISH", "")

    assert from_environment(Oven, "OVEN_") == Oven(degrees=200, fan=True, dish=None)


def test_all_wrong_settings_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVEN_DEGREES", "301")
    monkeypatch.setenv("OVEN_FAN", "perhaps")

    with pytest.raises(SettingsError) as raised:
        from_environment(Oven, "OVEN_")

    assert [mistake.split(":")[0] for mistake in raised.value.mistakes] == ["OVEN_DEGREES", "OVEN_FAN"]


OLDER = """\
drop index idempotency_key_created_at;
create index idempotency_key_by_age on idempotency_key using brin (created_at) with (autosummarize = on);
alter table orders reset (autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold,
    autovacuum_vacuum_insert_scale_factor, autovacuum_vacuum_insert_threshold);
alter table orders drop column stored_at;
create index orders_pending on orders (placed_at) where status = 'pending';"""
"""What the tables were before."""


def tables(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """Their indexes, and how they are stored."""
    return connection.execute(
        "select relname::text, (select array_agg(option order by option) from unnest(reloptions) option),"
        " case when relkind = 'i' then pg_get_indexdef(oid) end"
        " from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'i') order by relname"
    ).fetchall()
