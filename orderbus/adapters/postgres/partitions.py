"""The inbox's partitions: one for each day in the event ids, made ahead, and dropped when nothing in them is inside the window.

No statement here may make the inbox wait for long: whatever needs an exclusive lock gives up soon and is tried again next time.
"""

from __future__ import annotations

import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg import errors, sql

__all__ = ["create_partitions", "drop_partitions", "partition_bounds"]

DAYS_AHEAD = 8

Connection = psycopg.AsyncConnection[Any]


async def create_partitions(connection: Connection) -> list[str]:
    """Create what is missing from today to 8 days ahead, by the database's clock in UTC; their names."""
    today = await _one(connection, "select (now() at time zone 'utc')::date")
    present = await _present(connection)
    wanted = [today + datetime.timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)]
    missing = [day for day in wanted if _name(day) not in present]
    for day in missing:
        await _create(connection, day)
    return [_name(day) for day in missing]


async def drop_partitions(connection: Connection, window_s: float) -> list[str]:
    """Drop the past days in which nothing was handled inside the window (their names), and old rows of the default partition."""
    horizon = await _one(connection, "select now() - make_interval(secs => %s)", window_s)
    dropped = []
    for name, day in sorted((await _present(connection)).items()):
        ends_at = datetime.datetime.combine(day + datetime.timedelta(days=1), datetime.time(), datetime.UTC)
        if ends_at < horizon and await _drop(connection, name, horizon):
            dropped.append(name)
    while await _delete_from_default(connection, horizon) == _DELETED_AT_ONCE:
        pass
    return dropped


def partition_bounds(day: datetime.date) -> tuple[UUID, UUID]:
    """The first UUIDv7 prefix of a UTC day, and of the next."""
    start_s = int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())
    return UUID(int=(start_s * 1000) << 80), UUID(int=((start_s + 86_400) * 1000) << 80)


_DELETED_AT_ONCE = 10_000
_BRIEFLY = "set local lock_timeout = '500ms'; set local idle_in_transaction_session_timeout = '5s'"
"""Neither waits long for a lock nor keeps one for long, should this process be stopped where it holds it."""


async def _create(connection: Connection, day: datetime.date) -> None:
    """Create by ATTACH, which lets the inbox go on meanwhile, unlike CREATE TABLE … PARTITION OF. The default partition may hold
    rows of that day (if nobody made partitions for a week); they move along, or ATTACH would refuse."""
    name = sql.Identifier("orderbus", _name(day))
    first, next_first = partition_bounds(day)
    async with connection.transaction():
        await connection.execute(_BRIEFLY)
        await connection.execute(sql.SQL("create table {} (like orderbus.inbox including all)").format(name))
        await connection.execute("lock table orderbus.inbox_default in access exclusive mode")
        await connection.execute(
            sql.SQL(
                "with moved as (delete from orderbus.inbox_default where event_id >= %s and event_id < %s returning *) "
                "insert into {} select * from moved"
            ).format(name),
            (first, next_first),
        )
        await connection.execute(
            sql.SQL("alter table orderbus.inbox attach partition {} for values from ({}) to ({})").format(
                name, sql.Literal(str(first)), sql.Literal(str(next_first))
            )
        )


async def _drop(connection: Connection, name: str, horizon: datetime.datetime) -> bool:
    """Empty it, then drop it: dropping waits for all transactions on the inbox, emptying only for those on this old partition."""
    table = sql.Identifier("orderbus", name)
    is_used = sql.SQL("select exists (select from {} where handled_at >= %s)").format(table)
    try:
        async with connection.transaction():
            await connection.execute(_BRIEFLY)
            await connection.execute(sql.SQL("lock table {} in access exclusive mode").format(table))
            if await _one(connection, is_used, horizon):
                return False
            await connection.execute(sql.SQL("truncate {}").format(table))
        async with connection.transaction():
            await connection.execute(_BRIEFLY)
            await connection.execute("lock table orderbus.inbox in access exclusive mode")
            if await _one(connection, is_used, horizon):
                return False
            await connection.execute(sql.SQL("drop table {}").format(table))
    except errors.LockNotAvailable:
        return False
    return True


async def _delete_from_default(connection: Connection, horizon: datetime.datetime) -> int:
    cursor = await connection.execute(
        "delete from orderbus.inbox_default where ctid = any (array ("
        "select ctid from orderbus.inbox_default where handled_at < %s limit %s))",
        (horizon, _DELETED_AT_ONCE),
    )
    return cursor.rowcount


async def _present(connection: Connection) -> dict[str, datetime.date]:
    cursor = await connection.execute(
        "select relname from pg_inherits join pg_class on pg_class.oid = inhrelid where inhparent = 'orderbus.inbox'::regclass"
    )
    names = [name for (name,) in await cursor.fetchall() if name != "inbox_default"]
    return {name: datetime.datetime.strptime(name, _PATTERN).date() for name in names}


_PATTERN = "inbox_%Y%m%d"


def _name(day: datetime.date) -> str:
    return day.strftime(_PATTERN)


async def _one(connection: Connection, query: Any, *params: Any) -> Any:
    cursor = await connection.execute(query, params)
    row = await cursor.fetchone()
    assert row is not None
    return row[0]
