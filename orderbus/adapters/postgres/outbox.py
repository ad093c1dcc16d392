"""What the relay does in the database: leases, reads above the floor, deletes, and the tables of scheduled and stuck rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from psycopg import AsyncCursor

from orderbus._core.outbox import plan_lease
from orderbus._core.topology import BUCKETS
from orderbus.abc import MOST_COUNTED, Backlog, OutboxPage, OutboxRow, Stuck
from orderbus.adapters.postgres.arrays import float8, int2_array, int8, int8_array, text
from orderbus.adapters.postgres.errors import limited
from orderbus.adapters.postgres.pool import Pool
from orderbus.adapters.postgres.trip import Call, Connection, rows_of, trip

__all__ = ["PostgresOutbox", "promote_orphans"]


class PostgresOutbox:
    """Implements orderbus.abc.OutboxStore. All times are by the database's clock."""

    def __init__(self, pool: Pool, *, limit_s: float) -> None:
        self._pool = pool
        self._limit_s = limit_s

    async def lease(self, owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        """With `keep=None` the fair share; with a list, at most those, and none new. `keep=[]` also signs this relay off.

        In two transactions of one trip each: a relay that is frozen between them holds no lock that the others would wait for.
        """
        me, seconds = text(owner), float8(lease_s)
        is_leaving = keep is not None and not keep
        async with self._connection() as connection:
            *_, relays, leases = await trip(
                connection,
                [
                    Call(_LOCK_LEASES),
                    Call(_SIGN_OFF if is_leaving else _SEEN, (me,)),
                    Call(_FORGET_DEAD, (seconds,)),
                    Call("select owner from orderbus.relay"),
                    Call(_LEASES, (me,)),
                ],
            )
            live = [name for (name,) in rows_of(connection, relays)]
            plan = plan_lease(owner, live, dict(rows_of(connection, leases)), keep=keep, buckets=BUCKETS)
            wanted = int2_array(sorted(plan))
            *_, taken = await trip(
                connection, [Call(_LOCK_LEASES), Call(_GIVE_BACK, (me, wanted)), Call(_TAKE, (me, seconds, wanted))]
            )
            return frozenset(bucket for (bucket,) in rows_of(connection, taken))

    async def read(
        self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None
    ) -> OutboxPage:
        """Rows whose key has a stuck row are moved there too, behind it: the floor would pass what a read leaves out.

        For the same reason it reads on where a whole page had to be moved: an empty page says that nothing is left.
        """
        highest = _HIGHEST_ID if up_to is None else up_to
        async with self._connection() as connection:
            while True:
                read = Call(_READ, (int2_array(buckets), int8(floor), int8(limit), int8(limit_bytes), int8(highest)))
                [result] = await trip(connection, [read])
                found = rows_of(connection, result)
                held = [row[2] for row in found if row[-1]]
                if held:
                    await _cursor(connection).execute(_MOVE_BEHIND, (int8_array(held),), prepare=True)
                if len(held) < len(found) or not held:
                    break
        rows = [_row(row[2:]) for row in found if row[2] is not None and not row[-1]]
        return OutboxPage(rows=rows, xmin=found[0][0], last_id=found[0][1])

    async def backlog(self, buckets: Sequence[int], floor: int) -> Backlog:
        async with self._connection() as connection:
            cursor = await _cursor(connection).execute(
                _BACKLOG,
                (int2_array(buckets), floor, MOST_COUNTED, int2_array(buckets), floor, int2_array(buckets), MOST_COUNTED),
                prepare=True,
            )
            [(waiting, oldest_s, stuck)] = await cursor.fetchall()
        return Backlog(waiting, max(oldest_s or 0.0, 0.0), stuck)

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        """From the outbox or the stuck table, wherever each is; of a key that was stuck, the next row may then be tried."""
        async with self._connection() as connection:
            ids = int8_array([row.id for row in rows])
            [result] = await trip(connection, [Call(_DELETE, (ids, ids, ids))])
            [(xid,)] = rows_of(connection, result)
        return int(xid)

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        ids = [entry.row.id for entry in stuck]
        reasons = [entry.reason for entry in stuck]
        retries = [entry.retry_in_s for entry in stuck]
        async with self._connection() as connection:
            await connection.execute(_SET_ASIDE, {"ids": ids, "reasons": reasons, "retries": retries}, prepare=True)

    async def due(self, buckets: Sequence[int], limit: int, limit_bytes: int) -> Sequence[OutboxRow]:
        async with self._connection() as connection:
            mine, most = int2_array(buckets), int8(limit)
            _, found = await trip(
                connection, [Call(_MOVE_DUE, (mine, most)), Call(_READ_STUCK, (mine, most, most, int8(limit_bytes), most))]
            )
            return [_row(row) for row in rows_of(connection, found)]

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        async with self._pool.connection() as connection, limited(self._pool.where, self._limit_s, is_ours=True):
            yield connection


async def promote_orphans(connection: Connection) -> None:
    """Let rows be tried whose predecessor was deleted just while they were moved behind it (a person did, or another relay)."""
    await connection.execute(_PROMOTE_ORPHANS)


_HIGHEST_ID = 2**63 - 1
_ROW = "id, event_id, bucket, topic, key, body, content_type, headers, unrouted, created_at"

_READ = """\
select m.xmin, m.last_id, r.id, r.event_id, r.bucket, r.topic, r.key, r.body, r.content_type, r.headers, r.unrouted, 0, r.is_held
from (
    select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as xmin,
        (select case when is_called then last_value else 0 end from orderbus.outbox_id_seq) as last_id
) m
left join lateral (
    select sized.*, stuck.is_held
    from (
        select page.*, sum(octet_length(body)) over (order by id) - octet_length(body) as bytes_before
        from (
            select id, event_id, bucket, topic, key, body, content_type, headers::text, unrouted
            from orderbus.outbox where bucket = any (%b) and id > %b order by id limit %b
        ) page
    ) sized
    left join lateral (select true as is_held from orderbus.stuck where stuck.key = sized.key limit 1) stuck on true
    where sized.bytes_before < %b and sized.id <= %b
) r on true
order by r.id"""

_MOVE_BEHIND = f"""\
with gone as (delete from orderbus.outbox where id = any (%b) returning *)
insert into orderbus.stuck ({_ROW}, reason, attempts, first_at, last_at, next_try_at, is_behind)
select {_ROW}, 'behind', 0, now(), now(), case when head.is_there then null else now() end, head.is_there
from gone, lateral (
    select exists (select from orderbus.stuck where stuck.key = gone.key and stuck.id < gone.id) as is_there
) head"""  # noqa: S608 - of constants alone

_BACKLOG = """\
select
    (select count(*) from (select from orderbus.outbox where bucket = any (%b) and id > %b order by id limit %b) waiting),
    (select extract(epoch from clock_timestamp() - created_at)::float8 from orderbus.outbox where bucket = any (%b) and id > %b
     order by id limit 1),
    (select count(*) from (select from orderbus.stuck where bucket = any (%b) order by id limit %b) stuck)"""

_DELETE = """\
with published as (
    delete from orderbus.outbox where id = any (%b)
), unstuck as (
    delete from orderbus.stuck where id = any (%b) returning key
), next_in_line as (
    update orderbus.stuck set is_behind = false, next_try_at = now()
    where is_behind and id in (
        select (select min(id) from orderbus.stuck where stuck.key = keys.key and id <> all (%b))
        from (select distinct key from unstuck where key is not null) keys
    )
)
select pg_current_xact_id()::text::bigint"""

_SET_ASIDE = f"""\
with given as (
    select * from unnest(%(ids)s::bigint[], %(reasons)s::text[], %(retries)s::float8[]) as g (id, reason, retry_in_s)
), renewed as (
    update orderbus.stuck
    set reason = given.reason, attempts = attempts + 1, last_at = now(), is_behind = false,
        next_try_at = now() + make_interval(secs => given.retry_in_s)
    from given where stuck.id = given.id
), gone as (
    delete from orderbus.outbox using given where outbox.id = given.id returning outbox.*, given.reason, given.retry_in_s
)
insert into orderbus.stuck ({_ROW}, reason, attempts, first_at, last_at, next_try_at, is_behind)
select {_ROW}, reason, 1, now(), now(), now() + make_interval(secs => retry_in_s), false from gone"""  # noqa: S608 - of constants alone

_MOVE_DUE = """\
with gone as (
    delete from orderbus.scheduled where id in (
        select id from orderbus.scheduled where bucket = any (%b) and due_at <= now()
        order by due_at, id limit %b for update skip locked
    ) returning *
)
insert into orderbus.outbox (event_id, bucket, topic, key, body, content_type, headers, unrouted)
select event_id, bucket, topic, key, body, content_type, headers, unrouted from gone order by due_at, gone.id"""
# The delete has assigned this transaction's xid before the insert takes ids: see _INSERT_OUTBOX in transaction.py.

_READ_STUCK = """\
with head as materialized (
    select id, key from orderbus.stuck
    where bucket = any (%b) and next_try_at <= now()
        and not exists (select from orderbus.stuck earlier where earlier.key = stuck.key and earlier.id < stuck.id)
    order by next_try_at, id limit %b
), wanted as (
    select id, false as is_behind from head
    union all
    select behind.id, true from head, lateral (
        select id, bool_and(is_behind) over (order by id) as is_only_behind
        from (
            select id, is_behind from orderbus.stuck where stuck.key = head.key and stuck.id > head.id
            order by id limit (select 1 + %b / greatest(count(*), 1) from head)
        ) following
    ) behind where is_only_behind
)
select id, event_id, bucket, topic, key, body, content_type, headers::text, unrouted, attempts
from (
    select stuck.*, wanted.is_behind as comes_later,
        sum(octet_length(body)) over (order by wanted.is_behind, id) - octet_length(body) as bytes_before
    from wanted join orderbus.stuck using (id)
) sized
where bytes_before < %b
order by comes_later, id limit %b"""

_PROMOTE_ORPHANS = """\
update orderbus.stuck set is_behind = false, next_try_at = now()
where is_behind and not exists (select from orderbus.stuck earlier where earlier.key = stuck.key and earlier.id < stuck.id)"""

_LOCK_LEASES = "select pg_advisory_xact_lock(hashtextextended('orderbus.lease', 0))"

_SEEN = """\
insert into orderbus.relay (owner, seen_at) values (%b, now())
on conflict (owner) do update set seen_at = excluded.seen_at"""

_SIGN_OFF = "delete from orderbus.relay where owner = %b"

_FORGET_DEAD = "delete from orderbus.relay where seen_at < now() - make_interval(secs => %b)"

_LEASES = "select bucket, owner from orderbus.lease where until > now() or owner = %b"

_GIVE_BACK = "delete from orderbus.lease where owner = %b and bucket <> all (%b)"

_TAKE = """\
insert into orderbus.lease (owner, until, bucket) select %b, now() + make_interval(secs => %b), unnest(%b)
on conflict (bucket) do update set owner = excluded.owner, until = excluded.until
where lease.owner = excluded.owner or lease.until <= now()
returning bucket"""
# Since the plan was made, another relay may have taken what was free.


def _row(columns: tuple[Any, ...]) -> OutboxRow:
    row_id, event_id, bucket, topic, key, body, content_type, headers, unrouted, attempts, *_ = columns
    return OutboxRow(
        event_id=event_id,
        topic=topic,
        key=key,
        bucket=bucket,
        body=body,
        content_type=content_type,
        headers=_decode_headers(headers),
        unrouted=unrouted,
        id=row_id,
        attempts=attempts,
    )


_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


def _cursor(connection: Connection) -> AsyncCursor[Any]:
    return connection.cursor(binary=True)
