"""Store contract: an effect once, an event for each commit and for nothing else, and the order of a key."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import anyio
import pytest

from orderbus._core.ids import uuid7
from orderbus._core.topology import BUCKETS
from orderbus.abc import Backlog, InboxEntry, OutboxRow, Store, Stuck, Verdict
from orderbus.errors import UsageError
from tests.contract.talk import LIMIT_S

pytestmark = pytest.mark.anyio

ALL = range(BUCKETS)
NEW, DUPLICATE, CONFLICT = Verdict.NEW, Verdict.DUPLICATE, Verdict.CONFLICT


@pytest.fixture(
    params=[
        pytest.param(("memory", "asyncio"), id="memory-asyncio"),
        pytest.param(("memory", "trio"), id="memory-trio"),
        pytest.param(("postgres", "asyncio"), id="postgres", marks=pytest.mark.servers),
    ]
)
def store_flavour(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def store(store_flavour: tuple[str, Any], request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if store_flavour[0] == "memory":
        from orderbus.adapters import memory

        async with memory.open_store("memory://") as store:
            yield store
    else:
        from orderbus.adapters import postgres

        async with postgres.open_store(request.getfixturevalue("database_url"), name="contract") as database:
            await database.apply_schema()
            yield database


def entry(event_id: UUID, consumer: str = "c", body_hash: int = 1) -> InboxEntry:
    return InboxEntry(event_id, consumer, body_hash)


def row(text: str, *, key: str | None = None, bucket: int = 0, **more: Any) -> OutboxRow:
    return OutboxRow(_new_id(), "topic", key, bucket, text.encode(), "application/json", {"h": "v"}, **more)


async def emit(store: Store, *rows: OutboxRow) -> None:
    transaction = await store.begin()
    await transaction.commit([], rows)


async def waiting(
    store: Store, *, buckets: Any = ALL, floor: int = 0, limit: int = 100, limit_bytes: int = 1 << 20
) -> list[OutboxRow]:
    return list((await store.outbox.read(list(buckets), floor, limit, limit_bytes)).rows)


def texts(rows: Any) -> list[str]:
    return [found.body.decode() for found in rows]


async def test_an_event_is_new_once_for_each_consumer(store: Store) -> None:
    event = _new_id()

    first = await store.begin([entry(event, "a"), entry(event, "b")])
    await first.commit([], [])
    second = await store.begin([entry(event, "b"), entry(event, "c"), entry(event, "a")])
    await second.commit([], [])

    assert list(first.verdicts) == [NEW, NEW]
    assert list(second.verdicts) == [DUPLICATE, NEW, DUPLICATE]


async def test_the_same_id_with_another_body_is_a_conflict(store: Store) -> None:
    event = _new_id()
    await (await store.begin([entry(event, body_hash=-5)])).commit([], [])

    again = await store.begin([entry(event, body_hash=7)])
    await again.rollback()

    assert list(again.verdicts) == [CONFLICT]


async def test_an_event_that_stands_twice_in_a_batch_is_new_once(store: Store) -> None:
    event = _new_id()

    transaction = await store.begin([entry(event), entry(event), entry(event, body_hash=2)])
    await transaction.rollback()

    assert list(transaction.verdicts) == [NEW, DUPLICATE, CONFLICT]


async def test_a_rollback_leaves_nothing(store: Store) -> None:
    event = _new_id()
    transaction = await store.begin([entry(event)])
    await transaction.rollback()
    await transaction.rollback()

    again = await store.begin([entry(event)])
    await again.rollback()

    assert list(again.verdicts) == [NEW]
    assert await waiting(store) == []


async def test_what_a_commit_forgets_is_new_again(store: Store) -> None:
    kept, forgotten = entry(_new_id()), entry(_new_id())
    transaction = await store.begin([kept, forgotten])
    await transaction.commit([], [], forget=[forgotten])

    again = await store.begin([kept, forgotten])
    await again.rollback()

    assert list(again.verdicts) == [DUPLICATE, NEW]


@pytest.mark.parametrize("ending", ["commit", "rollback"])
async def test_a_second_handler_of_an_event_waits_for_the_end_of_the_first(store: Store, ending: str) -> None:
    event, other = _new_id(), _new_id()
    first = await store.begin([entry(event)])
    order: list[str] = []
    verdicts: list[Verdict] = []

    async def handle_too() -> None:
        second = await store.begin([entry(other), entry(event)])
        order.append("second began")
        verdicts.extend(second.verdicts)
        await second.rollback()

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle_too)
            await (await store.begin([entry(_new_id())])).rollback()
            order.append("first ends")
            await (first.commit([], []) if ending == "commit" else first.rollback())

    assert order == ["first ends", "second began"]
    assert verdicts == [NEW, DUPLICATE if ending == "commit" else NEW]


async def test_two_batches_that_share_events_in_other_orders_do_not_deadlock(store: Store) -> None:
    entries = [entry(_new_id()) for _ in range(20)]
    found: list[Verdict] = []

    async def handle(batch: list[InboxEntry]) -> None:
        transaction = await store.begin(batch)
        found.extend(transaction.verdicts)
        await transaction.commit([], [])

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(handle, entries)
            tasks.start_soon(handle, entries[::-1])
            tasks.start_soon(handle, entries[10:] + entries[:10])

    assert sorted(verdict.value for verdict in found) == ["duplicate"] * 40 + ["new"] * 20


async def test_a_begin_that_is_cancelled_while_it_waits_holds_nothing(store: Store) -> None:
    event, other = _new_id(), _new_id()
    first = await store.begin([entry(event)])

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(store.begin, [entry(other), entry(event)])
            await (await store.begin([entry(_new_id())])).rollback()
            scope.cancel()
    with anyio.fail_after(LIMIT_S):
        free = await store.begin([entry(other)])
        await free.commit([], [])
    await first.commit([], [])

    assert list(free.verdicts) == [NEW]


async def test_an_ended_transaction_commits_no_more(store: Store) -> None:
    transaction = await store.begin()
    await transaction.commit([], [row("1")])

    with pytest.raises(UsageError):
        await transaction.commit([], [row("2")])
    await transaction.rollback()

    assert texts(await waiting(store)) == ["1"]


async def test_emitted_rows_are_read_back_whole_in_the_order_of_their_commits(store: Store) -> None:
    rows = [
        OutboxRow(_new_id(), "a.b", "key-ü", 7, b"\x00\xff", "application/msgpack", {"h": "v", "ü": "ö"}, "drop"),
        OutboxRow(_new_id(), "c", None, 7, b"", "application/json", {}),
    ]
    first = await store.begin()
    second = await store.begin()
    await second.commit([], rows[:1])
    await first.commit([], rows[1:])

    page = await store.outbox.read([7], 0, 10, 1000)

    ids = [found.id for found in page.rows]
    assert ids == sorted(ids)
    assert page.last_id >= ids[-1] > 0
    for found, emitted in zip(page.rows, rows, strict=True):
        for field in ("event_id", "topic", "key", "bucket", "body", "content_type", "headers", "unrouted", "due_at_ms"):
            assert getattr(found, field) == getattr(emitted, field)


async def test_a_read_is_bounded_by_bucket_floor_rows_and_bytes(store: Store) -> None:
    await emit(store, *(row(str(i) * 10, bucket=i % 2) for i in range(6)))
    every = await waiting(store)

    assert texts(await waiting(store, buckets=[1])) == ["1" * 10, "3" * 10, "5" * 10]
    assert await waiting(store, buckets=[2]) == []
    assert texts((await store.outbox.read(list(ALL), every[0].id, 10, 1000, up_to=every[2].id)).rows) == ["1" * 10, "2" * 10]
    assert await waiting(store, buckets=[]) == []
    assert await waiting(store, floor=every[3].id) == every[4:]
    assert await waiting(store, limit=2) == every[:2]
    assert await waiting(store, limit_bytes=1) == every[:1]


async def test_a_backlog_is_what_waits_and_what_is_stuck_in_some_buckets(store: Store) -> None:
    assert await store.outbox.backlog(list(ALL), 0) == Backlog(0, 0.0, 0)
    await emit(store, *(row(str(i), key=str(i), bucket=i % 2) for i in range(6)))
    every = await waiting(store)
    await store.outbox.set_aside([Stuck(every[0], "unroutable", 3600)])

    whole = await store.outbox.backlog(list(ALL), 0)
    assert (whole.waiting, whole.stuck) == (5, 1)
    assert 0 <= whole.oldest_s < 60
    odd = await store.outbox.backlog([1], every[1].id)
    assert odd.waiting in (2, 3)  # a store in memory has no use for the floor
    assert odd.stuck == 0
    await store.outbox.delete(await waiting(store))
    assert (await store.outbox.backlog(list(ALL), 0)) == Backlog(0, 0.0, 1)


async def test_deleted_rows_are_gone_and_deleting_again_harms_nothing(store: Store) -> None:
    await emit(store, row("1"), row("2"), row("3"))
    one, two, three = await waiting(store)

    await store.outbox.delete([two])
    await store.outbox.delete([two, three])

    assert await waiting(store) == [one]


async def test_a_stuck_row_holds_back_its_key_and_nobody_else(store: Store) -> None:
    await emit(store, row("a1", key="a"), row("b1", key="b"), row("none"))
    a1 = (await waiting(store))[0]
    await store.outbox.set_aside([Stuck(a1, "unroutable", 3600)])
    await emit(store, row("a2", key="a"), row("b2", key="b"))

    assert texts(await waiting(store)) == ["b1", "none", "b2"]
    assert list(await store.outbox.due(list(ALL), 10, 1 << 30)) == []


async def test_a_stuck_row_is_tried_when_due_and_its_followers_come_after_it(store: Store) -> None:
    await emit(store, row("a1", key="a"), row("a2", key="a"), row("a3", key="a"))
    await store.outbox.set_aside([Stuck((await waiting(store))[0], "unroutable", 0)])
    assert await waiting(store) == []
    tried: list[str] = []
    attempts: list[int] = []

    for _ in range(3):
        due, *behind = await store.outbox.due(list(ALL), 10, 1 << 30)
        assert texts(behind) == ["a1", "a2", "a3"][len(tried) + 1 :]
        tried.append(due.body.decode())
        attempts.append(due.attempts)
        await store.outbox.delete([due])

    assert tried == ["a1", "a2", "a3"]
    assert attempts == [1, 0, 0]
    await emit(store, row("a4", key="a"))
    assert texts(await waiting(store)) == ["a4"]


async def test_a_row_that_is_set_aside_again_counts_its_attempts(store: Store) -> None:
    await emit(store, row("x", key="a"))
    (found,) = await waiting(store)
    attempts = []

    for _ in range(3):
        await store.outbox.set_aside([Stuck(found, "refused", 0)])
        (found,) = await store.outbox.due(list(ALL), 10, 1 << 30)
        attempts.append(found.attempts)

    assert attempts == [1, 2, 3]


async def test_a_row_that_only_a_person_can_help_is_never_due(store: Store) -> None:
    await emit(store, row("x"))
    await store.outbox.set_aside([Stuck((await waiting(store))[0], "too large", None)])

    assert list(await store.outbox.due(list(ALL), 10, 1 << 30)) == []
    assert await waiting(store) == []


async def test_stuck_rows_without_a_key_do_not_wait_for_each_other(store: Store) -> None:
    await emit(store, row("1"), row("2", bucket=1))
    await store.outbox.set_aside([Stuck(found, "unroutable", 0) for found in await waiting(store)])

    assert texts(await store.outbox.due([1], 10, 1 << 30)) == ["2"]
    assert sorted(texts(await store.outbox.due(list(ALL), 10, 1 << 30))) == ["1", "2"]
    assert len(await store.outbox.due(list(ALL), 1, 1 << 30)) == 1
    assert len(await store.outbox.due(list(ALL), 10, 1)) == 1


async def test_a_row_that_was_deleted_meanwhile_is_not_set_aside(store: Store) -> None:
    await emit(store, row("x", key="a"))
    (found,) = await waiting(store)
    await store.outbox.delete([found])

    await store.outbox.set_aside([Stuck(found, "unroutable", 0)])

    assert list(await store.outbox.due(list(ALL), 10, 1 << 30)) == []


async def test_scheduled_rows_come_out_when_due_and_no_sooner(store: Store) -> None:
    now_ms = int(time.time() * 1000)
    await emit(store, row("future", due_at_ms=now_ms + 3_600_000), row("past", due_at_ms=now_ms - 1000), row("now"))
    assert texts(await waiting(store)) == ["now"]

    await store.outbox.due(list(ALL), 10, 1 << 30)

    assert texts(await waiting(store)) == ["now", "past"]


async def test_relays_share_the_buckets_and_a_leaver_leaves_them_all(store: Store) -> None:
    outbox = store.outbox

    assert await outbox.lease("a", 60, None) == frozenset(ALL)
    assert await outbox.lease("b", 60, None) == frozenset()
    a = await outbox.lease("a", 60, None)
    b = await outbox.lease("b", 60, None)
    assert (len(a), len(b), a | b) == (32, 32, frozenset(ALL))

    assert await outbox.lease("a", 60, sorted(a)[:5]) == frozenset(sorted(a)[:5])
    assert await outbox.lease("a", 60, []) == frozenset()
    assert await outbox.lease("b", 60, None) == frozenset(ALL)


async def test_the_schema_is_there_and_maintenance_keeps_what_is_inside_the_window(store: Store) -> None:
    event = _new_id()
    await (await store.begin([entry(event)])).commit([], [])

    await store.check()
    await store.maintain(7 * 86_400)

    again = await store.begin([entry(event)])
    await again.rollback()
    assert list(again.verdicts) == [DUPLICATE]


def _new_id() -> UUID:
    return uuid7(int(time.time() * 1000), secrets.randbits(80))
