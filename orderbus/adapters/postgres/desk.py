"""The outbox's tables for a person: what is in them, and trying or discarding what is stuck. Nothing here is on a message's way."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
from psycopg import errors

from orderbus._core.outbox_rows import Handled, Held, HeldRow, Holder, OutboxStats, Pace, RowsWanted, StuckFor
from orderbus._core.topology import BUCKETS
from orderbus.adapters.postgres import schema
from orderbus.adapters.postgres.embedded import is_embedded, start_embedded
from orderbus.adapters.postgres.errors import limited
from orderbus.adapters.postgres.pool import Pool, conninfo_for
from orderbus.adapters.postgres.trip import Connection
from orderbus.errors import UsageError

__all__ = ["PostgresDesk", "open_desk"]

STATEMENT_MS = 60_000
LOCK_MS = 5_000


@asynccontextmanager
async def open_desk(url: str, *, name: str, connect_s: float = 5.0) -> AsyncIterator[PostgresDesk]:
    """Raises UsageError where the schema is missing or of another version, or the role may not see it; UnavailableError."""
    conninfo = conninfo_for(
        await start_embedded(url) if is_embedded(url) else url,
        name=name,
        statement_timeout_ms=STATEMENT_MS,
        lock_timeout_ms=LOCK_MS,
        idle_in_transaction_ms=STATEMENT_MS,
    )
    pool = Pool(conninfo, size=1, acquire_s=connect_s, connect_s=connect_s)
    try:
        desk = PostgresDesk(pool)
        await desk.check()
        yield desk
    finally:
        pool.close()


class PostgresDesk:
    """Implements orderbus.abc.OutboxDesk."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def check(self) -> None:
        async with self._connection() as connection:
            await schema.check(connection)

    async def rows(self, wanted: RowsWanted, limit: int | None = None) -> Sequence[HeldRow]:
        params = {
            "states": list(wanted.states) or None,
            "topics": _likes(wanted.topics),
            "keys": _likes(wanted.keys),
            "reasons": _likes(wanted.reasons),
            "ids": list(wanted.ids) or None,
            "older_than_s": wanted.older_than_s,
            "behind": list(wanted.behind) or None,
            "limit": limit,
        }
        async with self._connection() as connection:
            cursor = await connection.execute(_ROWS, params)
            return [HeldRow(*row) for row in await cursor.fetchall()]

    async def stats(self) -> OutboxStats:
        async with self._connection() as connection, connection.transaction():
            await connection.execute("set transaction isolation level repeatable read read only")
            held = await (await connection.execute(_HELD)).fetchall()
            stuck = await (await connection.execute(_STUCK)).fetchall()
            holders = await (await connection.execute(_HOLDERS, {"buckets": BUCKETS})).fetchall()
        return OutboxStats(
            held=tuple(Held(*row) for row in held),
            stuck=tuple(StuckFor(*row) for row in stuck),
            holders=tuple(Holder(*row) for row in holders),
        )

    async def retry(self, row_ids: Sequence[int]) -> frozenset[int]:
        async with self._connection() as connection:
            cursor = await connection.execute(_RETRY, (list(row_ids),))
            return frozenset(row_id for (row_id,) in await cursor.fetchall())

    async def discard(self, rows: Sequence[HeldRow]) -> frozenset[UUID]:
        """In one transaction, with the table of stuck rows locked against the relay, which may just be moving a row behind one
        of these: its statement then sees that nothing is there to wait for. A millisecond; SHARE ROW EXCLUSIVE lets readers by.
        """
        stuck = [row.row_id for row in rows if row.state == "stuck"]
        scheduled = [row.row_id for row in rows if row.state == "scheduled"]
        async with self._connection() as connection, connection.transaction():
            await connection.execute("lock table orderbus.stuck in share row exclusive mode")
            gone = await (await connection.execute(_DELETE_STUCK, (stuck,))).fetchall()
            await connection.execute(_NEXT_IN_LINE, ([key for _, key in gone if key is not None],))
            gone += await (await connection.execute(_DELETE_SCHEDULED, (scheduled,))).fetchall()
        return frozenset(event_id for event_id, _ in gone)

    async def handled(self, event_id: UUID) -> Sequence[Handled]:
        async with self._connection() as connection:
            cursor = await connection.execute(_HANDLED, (event_id,))
            return [Handled(*row) for row in await cursor.fetchall()]

    async def paces(self, window_s: float) -> Sequence[Pace]:
        async with self._connection() as connection:
            cursor = await connection.execute(_PACES, {"window_s": window_s})
            return [Pace(*row) for row in await cursor.fetchall()]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        where = self._pool.where
        try:
            async with self._pool.connection() as connection, limited(where, STATEMENT_MS / 1000 + 5, is_ours=True):
                yield connection
        except errors.InsufficientPrivilege as error:
            raise UsageError(
                f"{where}: {_first_line(error)}; have its owner grant the role what it needs: usage on schema orderbus, select on "
                f"its tables, and for retry and discard update and delete on orderbus.stuck and orderbus.scheduled",
                code="OB504",
            ) from None


def _first_line(error: psycopg.Error) -> str:
    return str(error).strip().splitlines()[0]


def _likes(patterns: Sequence[str]) -> list[str] | None:
    """For `like any`: what people write as `*` and `?`."""
    escaped = str.maketrans({"\\": "\\\\", "%": "\\%", "_": "\\_", "*": "%", "?": "_"})
    return [pattern.translate(escaped) for pattern in patterns] or None


_ROWS = """\
select state, id, event_id, topic, key, bucket, size_bytes, extract(epoch from created_at)::float8,
    extract(epoch from due_at)::float8, reason, attempts, extract(epoch from first_at)::float8,
    extract(epoch from last_at)::float8, extract(epoch from next_try_at)::float8, waits_for
from (
    select 'waiting' as state, id, event_id, topic, key, bucket, octet_length(body) as size_bytes, created_at,
        null::timestamptz as due_at, null::text as reason, 0 as attempts, null::timestamptz as first_at,
        null::timestamptz as last_at, null::timestamptz as next_try_at, null::uuid as waits_for
    from orderbus.outbox
    union all
    select 'scheduled', id, event_id, topic, key, bucket, octet_length(body), created_at, due_at, null, 0, null, null, null, null
    from orderbus.scheduled
    union all
    select 'stuck', id, event_id, topic, key, bucket, octet_length(body), created_at, null, reason, attempts, first_at, last_at,
        next_try_at, (select head.event_id from orderbus.stuck head where head.key = stuck.key and head.id < stuck.id
                      order by head.id limit 1)
    from orderbus.stuck
) held
where (%(states)s::text[] is null or state = any (%(states)s))
    and (%(topics)s::text[] is null or topic like any (%(topics)s))
    and (%(keys)s::text[] is null or key like any (%(keys)s))
    and (%(reasons)s::text[] is null or reason like any (%(reasons)s))
    and (%(ids)s::uuid[] is null or event_id = any (%(ids)s))
    and (%(older_than_s)s::float8 is null or created_at < now() - make_interval(secs => %(older_than_s)s))
    and (%(behind)s::bigint[] is null or (state = 'stuck' and id <> all (%(behind)s) and exists (
        select from orderbus.stuck head where head.id = any (%(behind)s) and head.key = held.key and head.id < held.id)))
order by created_at, state, id
limit %(limit)s"""

_HELD = """\
select state, topic, count(*), sum(size_bytes)::bigint, extract(epoch from now() - min(created_at))::float8,
    case when min(due_at) < now() then extract(epoch from now() - min(due_at))::float8 end
from (
    select 'waiting' as state, topic, octet_length(body) as size_bytes, created_at, null::timestamptz as due_at from orderbus.outbox
    union all select 'scheduled', topic, octet_length(body), created_at, due_at from orderbus.scheduled
    union all select 'stuck', topic, octet_length(body), created_at, null from orderbus.stuck
) held
group by state, topic order by state desc, min(created_at)"""

_STUCK = """\
select reason, count(*), extract(epoch from now() - min(first_at))::float8, max(attempts),
    extract(epoch from min(next_try_at) - now())::float8
from orderbus.stuck group by reason order by count(*) desc"""

_HOLDERS = """\
select owner, count(*), sum(waiting)::bigint, extract(epoch from min(until) - now())::float8,
    extract(epoch from now() - min(seen_at))::float8
from generate_series(0, %(buckets)s - 1) as every (bucket)
left join (select bucket, owner, until from orderbus.lease where until > now()) lease using (bucket)
left join orderbus.relay using (owner)
left join lateral (select count(*) as waiting from orderbus.outbox where outbox.bucket = every.bucket) counted on true
group by owner order by owner nulls last"""

# The first 48 bits of a UUIDv7 are milliseconds; its 13th digit is a 7.
_PACES = """\
select name, count(*) / %(window_s)s::float8,
    percentile_cont(0.5) within group (order by lag_s), percentile_cont(0.99) within group (order by lag_s)
from (
    select consumer, case when substr(event_id::text, 15, 1) = '7' then greatest(extract(epoch from handled_at)::float8
        - ('x' || substr(event_id::text, 1, 8) || substr(event_id::text, 10, 4))::bit(48)::bigint / 1000.0, 0) end as lag_s
    from orderbus.inbox where handled_at > now() - make_interval(secs => %(window_s)s)
) lately join orderbus.consumer on consumer.id = lately.consumer
group by name order by name"""

_RETRY = """\
update orderbus.stuck set next_try_at = now(), is_behind = false
where id = any (%s) and not exists (select from orderbus.stuck earlier where earlier.key = stuck.key and earlier.id < stuck.id)
returning id"""

_DELETE_STUCK = "delete from orderbus.stuck where id = any (%s) returning event_id, key"

_DELETE_SCHEDULED = "delete from orderbus.scheduled where id = any (%s) returning event_id, key"

_NEXT_IN_LINE = """\
update orderbus.stuck set is_behind = false, next_try_at = now()
where is_behind and key = any (%s)
    and not exists (select from orderbus.stuck earlier where earlier.key = stuck.key and earlier.id < stuck.id)"""

_HANDLED = """\
select consumer.name, extract(epoch from handled_at)::float8
from orderbus.inbox join orderbus.consumer on consumer.id = inbox.consumer
where event_id = %s order by handled_at, consumer.name"""
