"""What the memory store does beyond the contract: its clock, its bounds, and what it says where SQL would be."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from uuid import UUID

import anyio
import pytest

from orderbus._core.outbox import Floor
from orderbus._core.topology import BUCKETS
from orderbus.abc import Deferred, InboxEntry, OutboxRow, Stuck, Verdict
from orderbus.adapters.memory import MemoryStore, open_store
from orderbus.adapters.memory.outbox import MemoryOutbox
from orderbus.errors import TransientError, UnavailableError, UsageError

pytestmark = pytest.mark.anyio

ALL = range(BUCKETS)


@pytest.fixture
async def store() -> AsyncIterator[MemoryStore]:
    async with open_store("memory://") as store:
        yield store


def _row(number: int, *, key: str | None = None, due_at_ms: int | None = None) -> OutboxRow:
    return OutboxRow(UUID(int=number), "t", key, 0, b"%d" % number, "application/json", {}, due_at_ms=due_at_ms)


def _entry(number: int) -> InboxEntry:
    return InboxEntry(UUID(int=number), "c", 1)


async def test_sql_is_refused_with_the_way_out(store: MemoryStore) -> None:
    transaction = await store.begin()

    with pytest.raises(UsageError, match="ORDERBUS_DATABASE_URL"):
        await transaction.execute("select 1", ())
    with pytest.raises(UsageError, match="ORDERBUS_DATABASE_URL"):
        _ = transaction.connection
    with pytest.raises(UsageError, match="ORDERBUS_DATABASE_URL"):
        store.enlist(object())
    with pytest.raises(UsageError, match="ORDERBUS_DATABASE_URL"):
        await transaction.commit([Deferred("insert", ())], [_row(1)])
    assert store.outbox.rows() == []


async def test_a_scheduled_row_follows_virtual_time(store: MemoryStore) -> None:
    await (await store.begin()).commit([], [_row(1, due_at_ms=int((time.time() + 86_400) * 1000))])

    await anyio.sleep(86_000)
    await store.outbox.due(ALL, 10, 1 << 30)
    assert [row.event_id.int for row in store.outbox.scheduled()] == [1]
    await anyio.sleep(500)
    await store.outbox.due(ALL, 10, 1 << 30)

    assert store.outbox.scheduled() == []
    assert [row.event_id.int for row in store.outbox.rows()] == [1]


async def test_a_stuck_row_is_due_when_its_time_has_come(store: MemoryStore) -> None:
    await (await store.begin()).commit([], [_row(1, key="k")])
    await store.outbox.set_aside([Stuck(store.outbox.rows()[0], "unroutable", 60)])

    await anyio.sleep(59)
    assert await store.outbox.due(ALL, 10, 1 << 30) == []
    await anyio.sleep(1)
    (due,) = await store.outbox.due(ALL, 10, 1 << 30)

    assert due.event_id.int == 1
    assert [(stuck.reason, stuck.retry_in_s) for stuck in store.outbox.stuck()] == [("unroutable", 0.0)]


async def test_a_relay_that_stays_away_loses_its_buckets(store: MemoryStore) -> None:
    assert await store.outbox.lease("gone", 30, None) == frozenset(ALL)

    await anyio.sleep(29)
    assert await store.outbox.lease("heir", 30, None) == frozenset()
    await anyio.sleep(2)

    assert await store.outbox.lease("heir", 30, None) == frozenset(ALL)


async def test_maintenance_forgets_what_is_older_than_the_window(store: MemoryStore) -> None:
    await (await store.begin([_entry(1)])).commit([], [])
    await anyio.sleep(100)
    await (await store.begin([_entry(2)])).commit([], [])

    await store.maintain(50)

    assert [entry.event_id.int for entry in store.handled()] == [2]
    again = await store.begin([_entry(1), _entry(2)])
    await again.rollback()
    assert list(again.verdicts) == [Verdict.NEW, Verdict.DUPLICATE]


async def test_maintenance_forgets_nothing_that_another_s_longer_window_needs(store: MemoryStore) -> None:
    await (await store.begin([_entry(1)])).commit([], [])
    await anyio.sleep(100)

    await store.maintain(500)
    await store.maintain(50)

    assert [entry.event_id.int for entry in store.handled()] == [1]


async def test_waiting_for_another_transaction_ends_after_a_time(store: MemoryStore) -> None:
    first = await store.begin([_entry(1)])

    with pytest.raises(TransientError, match="another transaction"):
        await store.begin([_entry(0), _entry(1)])
    await (await store.begin([_entry(0)])).commit([], [])
    await first.commit([], [])

    assert [entry.event_id.int for entry in store.handled()] == [0, 1]


async def test_a_full_outbox_fails_the_commit_and_leaves_nothing_of_it(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_outbox", MemoryOutbox(limit_bytes=3000))
    await (await store.begin([_entry(1)])).commit([], [_row(1), _row(2)])

    with pytest.raises(UnavailableError, match="full"):
        await (await store.begin([_entry(2)])).commit([], [_row(3)])
    await store.outbox.delete(store.outbox.rows()[:1])
    await (await store.begin([_entry(2)])).commit([], [_row(4)])

    assert [row.event_id.int for row in store.outbox.rows()] == [2, 4]


async def test_the_floor_rises_to_the_last_row_as_soon_as_all_are_deleted(store: MemoryStore) -> None:
    floor = Floor()
    await (await store.begin()).commit([], [_row(number) for number in range(10)])
    open_all_the_while = await store.begin([_entry(1)])

    for _ in range(2):
        page = await store.outbox.read(ALL, floor.value, 100, 1000)
        floor.read(xmin=page.xmin, last_id=page.last_id, lowest_id=page.rows[0].id if page.rows else None)
        if page.rows:
            floor.deleted(floor.mark(), await store.outbox.delete(page.rows))
    await open_all_the_while.commit([], [_row(10)])

    assert floor.value == page.last_id == 10
    assert [row.id for row in (await store.outbox.read(ALL, floor.value, 100, 1000)).rows] == [11]


async def test_a_row_from_before_a_stuck_one_of_its_key_is_not_stuck_for_ever(store: MemoryStore) -> None:
    await (await store.begin()).commit([], [_row(1, key="k"), _row(2, key="k")])
    await store.outbox.set_aside([Stuck(store.outbox.rows()[1], "refused", None)])

    assert (await store.outbox.read(ALL, 0, 10, 1000)).rows == []
    (due,) = await store.outbox.due(ALL, 10, 1 << 30)

    assert due.event_id.int == 1
