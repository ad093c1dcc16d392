"""The inbox's partitions: one for each day in the event ids, made ahead, and dropped when nothing in them is inside the window.

No statement here may make the inbox wait for long: whatever needs an exclusive lock gives up soon and is tried again next time.
"""

from __future__ import annotations

import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg import errors, sql

__all__ = ["clean_default_partition", "create_first_partitions", "create_partitions", "drop_partitions", "partition_bounds"]

DAYS_AHEAD = 8

Connection = psycopg.AsyncConnection[Any]


async def create_partitions(connection: Connection) -> list[str]:
    """Create what is missing from today to 8 days ahead, by the database's clock in UTC, and finish what was begun; their names."""
    today = await _one(connection, "select (now() at time zone 'utc')::date")
    present, excluded = await _present(connection), await _excluded(connection)
    wanted = {today + datetime.timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)}.union(excluded)
    created = []
    for day in sorted(wanted.difference(present.values())):
        if day > today or day in excluded:
            await _exclude(connection, day, is_new=day not in excluded)
            await _attach(connection, day)
            created.append(_name(day))
            continue
        try:  # events of today are on their way into the default partition, which may not refuse them
            await _attach(connection, day, limit_ms=_READING_MS)
            created.append(_name(day))
        except errors.QueryCanceled:
            pass  # the default partition is too long to be read with everybody waiting: today's rows stay in it
    return created


async def create_first_partitions(connection: Connection) -> None:
    """Those of today and the days ahead, of an inbox that the same transaction has made."""
    today = await _one(connection, "select (now() at time zone 'utc')::date")
    for day in (today + datetime.timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)):
        name, bounds = sql.Identifier("orderbus", _name(day)), map(sql.Literal, map(str, partition_bounds(day)))
        await connection.execute(
            sql.SQL("create table {} partition of orderbus.inbox for values from ({}) to ({})").format(name, *bounds)
        )


async def drop_partitions(connection: Connection, window_s: float) -> list[str]:
    """Drop the past days in which nothing was handled inside the window (their names), `window_s` or the longest one in use.

    A day is emptied first: that waits only for the transactions on this old partition. To drop it waits for all on the inbox, so
    all that are empty go at once. The first lock that is not free ends it until the next time: each try stalls who comes after.
    """
    horizon = await _one(connection, _HORIZON, window_s)
    empty = []
    try:
        for name, day in sorted((await _present(connection)).items()):
            ends_at = datetime.datetime.combine(day + datetime.timedelta(days=1), datetime.time(), datetime.UTC)
            if ends_at < horizon and await _empty(connection, name, horizon):
                empty.append(name)
    except errors.LockNotAvailable:
        pass
    try:
        return await _drop(connection, empty, horizon) if empty else []
    except errors.LockNotAvailable:
        return []


async def clean_default_partition(connection: Connection, window_s: float) -> None:
    """Delete from it what was handled outside the window, as `drop_partitions` knows it."""
    horizon = await _one(connection, _HORIZON, window_s)
    while await _delete_from_default(connection, horizon) == _DELETED_AT_ONCE:
        pass


def partition_bounds(day: datetime.date) -> tuple[UUID, UUID]:
    """The first UUIDv7 prefix of a UTC day, and of the next."""
    start_s = int(datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp())
    return UUID(int=(start_s * 1000) << 80), UUID(int=((start_s + 86_400) * 1000) << 80)


_DELETED_AT_ONCE = 10_000
_BRIEFLY = "set local lock_timeout = '500ms'; set local idle_in_transaction_session_timeout = '5s'"
"""Neither waits long for a lock nor keeps one for long, should this process be stopped where it holds it."""

_READING_MS = 2000
"""So long the default partition may be read with everybody waiting."""

_HORIZON = """\
select now() - interval '1 day' - make_interval(secs => greatest(%s::double precision, (
    select max(window_s) from orderbus.consumer where seen_at >= now() - interval '1 day' - make_interval(secs => window_s)
)))"""
"""What was handled before it may be forgotten. A day more than the window: consumers compare an event's age with it by clocks of
their own. A consumer that was not seen for its own window has no rows inside it."""


async def _exclude(connection: Connection, day: datetime.date, *, is_new: bool) -> None:
    """Let a constraint say that the default partition holds nothing of that day, or ATTACH would read all of it with everybody
    waiting; to validate a constraint reads it, too, but beside all others.

    What the default partition holds of that day (ids from far ahead) moves along. Until ATTACH more of it is refused, as by a
    server that is away; where a crash comes between, until the next upkeep, which goes on from there.
    """
    first, next_first = partition_bounds(day)
    constraint = sql.Identifier(_constraint(day))
    if is_new:
        async with connection.transaction():
            await connection.execute(_BRIEFLY)
            await connection.execute(
                sql.SQL(
                    "alter table orderbus.inbox_default add constraint {} check (event_id < {} or event_id >= {}) not valid"
                ).format(constraint, sql.Literal(first), sql.Literal(next_first))
            )
            await _move(connection, day)
    async with connection.transaction():
        await connection.execute("set local statement_timeout = 0")
        await connection.execute(sql.SQL("alter table orderbus.inbox_default validate constraint {}").format(constraint))


async def _attach(connection: Connection, day: datetime.date, *, limit_ms: int | None = None) -> None:
    """Create by ATTACH, which lets the inbox go on meanwhile, unlike CREATE TABLE … PARTITION OF. The default partition may hold
    rows of that day (if nobody made partitions for a week); they move along, or ATTACH would refuse."""
    first, next_first = partition_bounds(day)
    async with connection.transaction():
        await connection.execute(_BRIEFLY)
        if limit_ms is not None:
            await connection.execute(f"set local statement_timeout = {limit_ms:d}")
        await connection.execute("lock table orderbus.inbox_default in access exclusive mode")
        await _move(connection, day)
        await connection.execute(
            sql.SQL("alter table orderbus.inbox attach partition {} for values from ({}) to ({})").format(
                sql.Identifier("orderbus", _name(day)), sql.Literal(str(first)), sql.Literal(str(next_first))
            )
        )
        await connection.execute(
            sql.SQL("alter table orderbus.inbox_default drop constraint if exists {}").format(sql.Identifier(_constraint(day)))
        )


async def _move(connection: Connection, day: datetime.date) -> None:
    """What the default partition holds of that day, into a table that may become its partition."""
    name = sql.Identifier("orderbus", _name(day))
    await connection.execute(sql.SQL("create table if not exists {} (like orderbus.inbox including all)").format(name))
    await connection.execute(
        sql.SQL(
            "with moved as (delete from orderbus.inbox_default where event_id >= %s and event_id < %s returning *) "
            "insert into {} select * from moved"
        ).format(name),
        partition_bounds(day),
    )


async def _empty(connection: Connection, name: str, horizon: datetime.datetime) -> bool:
    """Whether the partition is empty now. One that is already is not locked for it."""
    table = sql.Identifier("orderbus", name)
    if not await _one(connection, "select pg_relation_size(%s::regclass)", f"orderbus.{name}"):
        return True
    async with connection.transaction():
        await connection.execute(_BRIEFLY)
        await connection.execute(sql.SQL("lock table {} in access exclusive mode").format(table))
        if await _is_used(connection, name, horizon):
            return False
        await connection.execute(sql.SQL("truncate {}").format(table))
    return True


async def _drop(connection: Connection, names: list[str], horizon: datetime.datetime) -> list[str]:
    async with connection.transaction():
        await connection.execute(_BRIEFLY)
        await connection.execute("lock table only orderbus.inbox in access exclusive mode")
        dropped = [name for name in names if not await _is_used(connection, name, horizon)]
        for name in dropped:
            await connection.execute(sql.SQL("drop table {}").format(sql.Identifier("orderbus", name)))
    return dropped


async def _is_used(connection: Connection, name: str, horizon: datetime.datetime) -> Any:
    table = sql.Identifier("orderbus", name)
    return await _one(connection, sql.SQL("select exists (select from {} where handled_at >= %s)").format(table), horizon)


async def _delete_from_default(connection: Connection, horizon: datetime.datetime) -> int:
    cursor = await connection.execute(
        "delete from orderbus.inbox_default where ctid = any (array ("
        "select ctid from orderbus.inbox_default where handled_at < %s order by handled_at limit %s))",
        (horizon, _DELETED_AT_ONCE),
    )
    return cursor.rowcount


async def _present(connection: Connection) -> dict[str, datetime.date]:
    cursor = await connection.execute(
        "select relname from pg_inherits join pg_class on pg_class.oid = inhrelid where inhparent = 'orderbus.inbox'::regclass"
    )
    names = [name for (name,) in await cursor.fetchall() if name != "inbox_default"]
    return {name: datetime.datetime.strptime(name, _PATTERN).date() for name in names}


async def _excluded(connection: Connection) -> set[datetime.date]:
    """The days of which the default partition takes nothing any more, though they have no partition yet."""
    cursor = await connection.execute(
        "select conname from pg_constraint where conrelid = 'orderbus.inbox_default'::regclass "
        "and starts_with(conname, 'inbox_default_without_')"
    )
    return {datetime.datetime.strptime(name, _EXCLUDED).date() for (name,) in await cursor.fetchall()}


_PATTERN = "inbox_%Y%m%d"
_EXCLUDED = "inbox_default_without_%Y%m%d"


def _name(day: datetime.date) -> str:
    return day.strftime(_PATTERN)


def _constraint(day: datetime.date) -> str:
    return day.strftime(_EXCLUDED)


async def _one(connection: Connection, query: Any, *params: Any) -> Any:
    cursor = await connection.execute(query, params)
    row = await cursor.fetchone()
    assert row is not None
    return row[0]
