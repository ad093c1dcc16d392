"""What the relay rests on: ids in commit order, reads that leave nothing behind, a floor that loses nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from orderbus._core.outbox import plan_lease
from orderbus.abc import OutboxRow, Stuck
from orderbus.adapters.postgres import PostgresStore, open_store
from orderbus.adapters.postgres.outbox import promote_orphans
from orderbus.errors import UnavailableError
from tests.postgres.conftest import ALL, Sql, emit, event_id, row

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

PLENTY = 1 << 30
OURS = "database = (select oid from pg_database where datname = current_database())"


async def read(store: PostgresStore, limit: int = 1000, limit_bytes: int = PLENTY) -> list[int]:
    """The numbers of the events that a read from the start finds."""
    page = await store.outbox.read(ALL, 0, limit, limit_bytes)
    return numbers(page.rows)


def numbers(rows: Sequence[OutboxRow]) -> list[int]:
    return [int(found.event_id.int >> 80) - int(event_id(0).int >> 80) for found in rows]


async def test_the_xid_of_a_transaction_is_assigned_before_its_first_id(store: PostgresStore, query: Sql) -> None:
    """Seen from outside: while the insert waits for the sequence, the transaction has its xid."""
    with_lock = await store.begin()
    await with_lock.execute("alter sequence orderbus.outbox_id_seq increment 1", ())
    waiting = asyncio.create_task(emit(store, [row(1)]))
    waits = """select backend_xid is not null from pg_locks join pg_stat_activity using (pid)
        where not granted and relation = 'orderbus.outbox_id_seq'::regclass"""

    async with asyncio.timeout(20):
        while not (found := await asyncio.to_thread(query, waits)):
            pass

    assert found == [(True,)]
    await with_lock.rollback()
    await waiting


async def test_a_fresh_outbox_has_handed_out_no_id(store: PostgresStore) -> None:
    page = await store.outbox.read(ALL, 0, 10, PLENTY)
    assert (page.rows, page.last_id) == ([], 0)


async def test_a_page_ends_before_its_bytes_are_too_many_but_has_one_row(store: PostgresStore) -> None:
    await emit(store, [row(n, f"k{n}", body=b"x" * 100) for n in range(5)])

    assert await read(store, limit_bytes=1) == [0]
    assert await read(store, limit_bytes=200) == [0, 1]
    assert await read(store, limit_bytes=201) == [0, 1, 2]


async def test_xmin_tells_of_a_transaction_that_may_still_bring_lower_ids(store: PostgresStore, query: Sql) -> None:
    writer = await store.begin()
    await writer.execute("select nextval('orderbus.outbox_id_seq'), pg_current_xact_id()", ())
    await emit(store, [row(1)])
    page = await store.outbox.read(ALL, 0, 10, PLENTY)
    xid = await store.outbox.delete(page.rows)
    assert (await store.outbox.read(ALL, 0, 10, PLENTY)).xmin < xid

    await writer.commit([], [])

    query("select 1")
    async with asyncio.timeout(20):
        while (await store.outbox.read(ALL, 0, 10, PLENTY)).xmin <= xid:
            pass  # other databases of this server have transactions, too


async def test_a_read_that_meets_only_held_back_rows_moves_them_and_reads_on(store: PostgresStore, query: Sql) -> None:
    await emit(store, [row(n, "stuck") for n in range(10)] + [row(10, "other")])
    first = (await store.outbox.read(ALL, 0, 1, PLENTY)).rows
    await store.outbox.set_aside([Stuck(first[0], "unroutable", None)])

    assert await read(store, limit=2) == [10]
    assert query("select count(*) from orderbus.stuck where is_behind") == [(9,)]


async def test_held_back_rows_come_out_in_their_order_behind_the_first(store: PostgresStore) -> None:
    await emit(store, [row(n, "stuck") for n in range(5)])
    first = (await store.outbox.read(ALL, 0, 1, PLENTY)).rows
    await store.outbox.set_aside([Stuck(first[0], "unroutable", 0.0)])
    assert await read(store) == []

    seen = []
    while due := await store.outbox.due(ALL, 2, 1 << 30):
        seen.append(numbers(due))
        await store.outbox.delete(due)

    assert seen == [[0, 1], [2, 3], [4]]


async def test_a_row_whose_predecessor_vanished_by_hand_is_tried_after_maintenance(store: PostgresStore, query: Sql) -> None:
    await emit(store, [row(1), row(2), row(3)])
    first = (await store.outbox.read(ALL, 0, 1, PLENTY)).rows
    await store.outbox.set_aside([Stuck(first[0], "unroutable", None)])
    assert await read(store) == []
    query("delete from orderbus.stuck where id = %s", first[0].id)
    assert await store.outbox.due(ALL, 100, 1 << 30) == []

    await store.maintain(7 * 86_400)

    assert numbers(await store.outbox.due(ALL, 100, 1 << 30)) == [2, 3]


async def test_a_lease_that_ran_out_is_taken_over(store: PostgresStore, query: Sql) -> None:
    assert await store.outbox.lease("dead", 60, None) == frozenset(ALL)
    assert await store.outbox.lease("alive", 60, None) == frozenset()
    query("update orderbus.lease set until = now() - interval '1 s'")
    query("update orderbus.relay set seen_at = now() - interval '61 s' where owner = 'dead'")

    assert await store.outbox.lease("alive", 60, None) == frozenset(ALL)
    assert await store.outbox.lease("dead", 60, None) == frozenset()


async def test_relays_that_lease_at_the_same_time_never_share_a_bucket(store: PostgresStore) -> None:
    held: dict[str, frozenset[int]] = {}

    async def lease(owner: str) -> None:
        for _ in range(10):
            held[owner] = frozenset()
            held[owner] = await store.outbox.lease(owner, 60, None)
            others = [bucket for other, buckets in held.items() if other != owner for bucket in buckets]
            assert not held[owner].intersection(others)

    await asyncio.gather(*(lease(f"r{n}") for n in range(4)))
    for owner in sorted(held):
        held[owner] = await store.outbox.lease(owner, 60, None)

    assert sorted(len(buckets) for buckets in held.values()) == [16, 16, 16, 16]


async def test_a_relay_that_is_frozen_while_it_plans_holds_no_lock_and_gets_nothing_that_others_took_meanwhile(
    store: PostgresStore, query: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks: list[int] = []

    def frozen(*given: Any, **options: Any) -> frozenset[int]:
        locks.append(query(f"select count(*) from pg_locks where locktype = 'advisory' and {OURS}")[0][0])
        query("insert into orderbus.lease (owner, until, bucket) values ('other', now() + interval '60 s', 7)")
        query("insert into orderbus.lease (owner, until, bucket) values ('dead', now() - interval '1 s', 8)")
        return plan_lease(*given, **options)

    monkeypatch.setattr("orderbus.adapters.postgres.outbox.plan_lease", frozen)

    assert await store.outbox.lease("slow", 60, None) == frozenset(ALL) - {7}
    assert locks == [0]


async def test_two_relays_move_each_scheduled_row_once(store: PostgresStore) -> None:
    await emit(store, [row(n, f"k{n}", due_at_ms=1000 - n) for n in range(100)])

    await asyncio.gather(*(store.outbox.due(ALL, 60, 1 << 30) for _ in range(4)))

    assert sorted(await read(store)) == list(range(100))


async def test_orphans_are_not_promoted_while_their_predecessor_is_there(store: PostgresStore) -> None:
    await emit(store, [row(1), row(2)])
    first = (await store.outbox.read(ALL, 0, 1, PLENTY)).rows
    await store.outbox.set_aside([Stuck(first[0], "unroutable", None)])
    assert await read(store) == []

    transaction = await store.begin()
    await promote_orphans(transaction.connection)
    await transaction.commit([], [])

    assert await store.outbox.due(ALL, 100, 1 << 30) == []


async def test_a_plan_made_while_the_outbox_was_short_uses_the_index_when_it_is_long(store: PostgresStore, query: Sql) -> None:
    """Counted by PostgreSQL itself: how often the table was read as a whole."""
    await emit(store, [row(n, f"k{n}") for n in range(30)])
    query("vacuum analyze orderbus.outbox")
    for _ in range(10):
        page = await store.outbox.read(ALL, 0, 1, PLENTY)
        await store.outbox.delete(page.rows)
    scans = "select seq_scan from pg_stat_xact_user_tables where relid = 'orderbus.outbox'::regclass"

    async with store.outbox._connection() as connection, connection.transaction():
        await connection.execute("prepare del (bigint[]) as delete from orderbus.outbox where id = any ($1)")
        for _ in range(10):
            await connection.execute("execute del (array[1])")
        found = await (await connection.execute(scans)).fetchone()

    assert found == (0,)


async def test_a_statement_of_ours_that_the_server_cancels_is_a_server_to_wait_for(
    store: PostgresStore, url: str, query: Sql
) -> None:
    """Raised as it is, it would end the relay, and with it the bus."""
    query("create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(5); return old; end'")
    query("create trigger slow before delete on orderbus.outbox for each row execute function slow()")
    await emit(store, [row(1)])
    page = await store.outbox.read(ALL, 0, 10, PLENTY)
    async with open_store(url, name="slow", statement_timeout_ms=200) as slow:
        with pytest.raises(UnavailableError, match="canceling statement due to statement timeout"):
            await slow.outbox.delete(page.rows)
