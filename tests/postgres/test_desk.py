"""What a person sees of the outbox, and what becomes of a key when some of its rows are tried or discarded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit, urlunsplit

import anyio
import psycopg
import pytest

from orderbus._core.outbox_rows import HeldRow, RowsWanted
from orderbus.abc import InboxEntry, OutboxRow, Stuck
from orderbus.adapters.postgres import PostgresStore, open_desk
from orderbus.errors import UsageError
from tests.postgres.conftest import ALL, Sql, emit, event_id, row

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

EVERYTHING = RowsWanted()
MEBI = 1 << 20


@pytest.fixture(params=["server"])
def url(request: pytest.FixtureRequest, databases: object, postgres_url: str) -> str:
    """An empty database on the server: nothing here depends on whose server it is."""
    url: str = databases(postgres_url)  # type: ignore[operator]
    with psycopg.connect(url, autocommit=True, options="-c lock_timeout=5000 -c client_min_messages=warning") as connection:
        connection.execute("drop schema if exists orderbus cascade; drop schema public cascade; create schema public")
    return url


async def stuck(store: PostgresStore, *rows: OutboxRow, reason: str = "unroutable", retry_in_s: float | None = 60.0) -> None:
    """Emit the rows, and set the first of them aside, as the relay does; those of its key move behind it at the next read."""
    await emit(store, rows)
    page = await store.outbox.read(ALL, 0, 500, MEBI)
    await store.outbox.set_aside([Stuck(page.rows[0], reason, retry_in_s)])
    await store.outbox.read(ALL, 0, 500, MEBI)


def numbers(rows: Sequence[HeldRow | OutboxRow]) -> list[int]:
    return [next(n for n in range(100) if event_id(n) == one.event_id) for one in rows]


async def test_waiting_scheduled_and_stuck_are_seen_with_what_is_known_of_them(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2))
    await emit(store, [row(3, "other"), row(4, due_at_ms=int(time.time() * 1000) + 60_000)])
    async with open_desk(url, name="tests") as desk:
        one, two, three, four = await desk.rows(EVERYTHING)
    assert (one.state, one.reason, one.attempts, one.waits_for) == ("stuck", "unroutable", 1, None)
    assert (two.state, two.reason, two.waits_for, two.next_try_at_s) == ("stuck", "behind", event_id(1), None)
    assert sorted([three.state, four.state]) == ["scheduled", "waiting"]
    assert (one.topic, one.key, one.size_bytes) == ("orders.placed", "k", 7)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (RowsWanted(states=("waiting",)), [3]),
        (RowsWanted(topics=("orders.*",)), [1, 2, 3]),
        (RowsWanted(topics=("orders_placed", "%")), []),
        (RowsWanted(keys=("k",)), [1, 2]),
        (RowsWanted(keys=("oth?r",)), [3]),
        (RowsWanted(ids=(event_id(2), event_id(9))), [2]),
        (RowsWanted(reasons=("unrout*",)), [1]),
        (RowsWanted(older_than_s=3600.0), []),
        (RowsWanted(older_than_s=0.0), [1, 2, 3]),
    ],
)
async def test_filters(store: PostgresStore, url: str, wanted: RowsWanted, found: list[int]) -> None:
    await stuck(store, row(1), row(2))
    await emit(store, [row(3, "other")])
    async with open_desk(url, name="tests") as desk:
        assert numbers(await desk.rows(wanted)) == found


async def test_only_the_first_of_a_key_is_retried_and_those_behind_follow_it(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2), row(3))
    assert await store.outbox.due(ALL, 10, MEBI) == []
    async with open_desk(url, name="tests") as desk:
        rows = await desk.rows(EVERYTHING)
        assert await desk.retry([one.row_id for one in rows]) == {rows[0].row_id}
    assert numbers(await store.outbox.due(ALL, 10, MEBI)) == [1, 2, 3]


async def test_when_the_first_of_a_key_is_discarded_the_next_goes_on_in_order(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2), row(3))
    async with open_desk(url, name="tests") as desk:
        assert await desk.discard((await desk.rows(EVERYTHING))[:1]) == {event_id(1)}
        assert [one.waits_for for one in await desk.rows(EVERYTHING)] == [None, event_id(2)]
    assert numbers(await store.outbox.due(ALL, 10, MEBI)) == [2, 3]


async def test_a_discarded_follower_changes_nothing_for_the_others(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2), row(3))
    async with open_desk(url, name="tests") as desk:
        before = await desk.rows(EVERYTHING)
        assert await desk.discard([before[1]]) == {event_id(2)}
        assert await desk.rows(EVERYTHING) == [before[0], before[2]]
    assert await store.outbox.due(ALL, 10, MEBI) == []


async def test_the_followers_of_a_key_are_those_behind_the_chosen(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2), row(3))
    async with open_desk(url, name="tests") as desk:
        rows = await desk.rows(EVERYTHING)
        assert numbers(await desk.rows(RowsWanted(behind=(rows[1].row_id,)))) == [3]
        assert numbers(await desk.rows(RowsWanted(behind=(rows[0].row_id, rows[1].row_id)))) == [3]
        assert await desk.discard(rows) == {event_id(1), event_id(2), event_id(3)}
        assert await desk.rows(EVERYTHING) == []


async def test_a_scheduled_event_is_discarded_and_a_stuck_one_of_the_same_number_stays(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1))
    await emit(store, [row(2, due_at_ms=int(time.time() * 1000) + 60_000)])
    async with open_desk(url, name="tests") as desk:
        [kept, gone] = await desk.rows(EVERYTHING)
        assert (kept.row_id, gone.row_id, gone.state) == (1, 1, "scheduled")
        assert await desk.discard([gone]) == {event_id(2)}
        assert await desk.rows(EVERYTHING) == [kept]


async def test_what_is_waiting_or_gone_is_not_discarded(store: PostgresStore, url: str) -> None:
    await emit(store, [row(1)])
    async with open_desk(url, name="tests") as desk:
        rows = await desk.rows(EVERYTHING)
        assert await desk.discard(rows) == frozenset()
        assert await desk.rows(EVERYTHING) == rows


async def test_no_row_is_left_behind_what_was_discarded_while_it_moved(store: PostgresStore, url: str, query: Sql) -> None:
    """Were it, it would wait for nothing until the hourly upkeep."""
    async with open_desk(url, name="tests") as desk:
        for n in range(30):
            await stuck(store, row(3 * n, f"k{n}"))
            await emit(store, [row(3 * n + 1, f"k{n}"), row(3 * n + 2, f"k{n}")])
            [head] = await desk.rows(RowsWanted(states=("stuck",), keys=(f"k{n}",)))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(desk.discard, [head])
                tasks.start_soon(store.outbox.read, ALL, 0, 500, MEBI)
    orphans = """select count(*) from orderbus.stuck where is_behind and not exists
        (select from orderbus.stuck earlier where earlier.key = stuck.key and earlier.id < stuck.id)"""
    assert query(orphans) == [(0,)]
    assert query("select count(*) from (select from orderbus.stuck union all select from orderbus.outbox) rows") == [(60,)]


async def test_stats_count_by_state_and_topic_reason_and_relay(store: PostgresStore, url: str) -> None:
    await stuck(store, row(1), row(2))
    await emit(store, [row(3, "other", topic="orders.paid"), row(4, due_at_ms=1_000)])
    held = await store.outbox.lease("relay-1", 30.0, None)
    assert len(held) == 64
    await store.outbox.lease("relay-1", 30.0, [0, 1])
    async with open_desk(url, name="tests") as desk:
        stats = await desk.stats()
    assert [(one.state, one.topic, one.count, one.size_bytes) for one in stats.held] == [
        ("waiting", "orders.paid", 1, 7),
        ("stuck", "orders.placed", 2, 14),
        ("scheduled", "orders.placed", 1, 7),
    ]
    assert [one.overdue_s is not None for one in stats.held] == [False, False, True]
    assert sorted((one.reason, one.count, one.most_attempts) for one in stats.stuck) == [("behind", 1, 0), ("unroutable", 1, 1)]
    assert [(one.owner, one.buckets, one.waiting) for one in stats.holders] == [("relay-1", 2, 0), (None, 62, 1)]


async def test_who_has_handled_an_event(store: PostgresStore, url: str) -> None:
    transaction = await store.begin([InboxEntry(event_id(1), "shop.pay", 1), InboxEntry(event_id(1), "shop.count", 1)])
    await transaction.commit([], [])
    async with open_desk(url, name="tests") as desk:
        assert sorted(one.consumer for one in await desk.handled(event_id(1))) == ["shop.count", "shop.pay"]
        assert await desk.handled(event_id(2)) == []


@pytest.fixture
def stranger_url(url: str, query: Sql) -> Iterator[str]:
    """A role that may do nothing but connect."""
    name = f"stranger_{time.time_ns()}"
    query(f"create role {name} login")
    parts = urlsplit(url) if url.startswith("postgres") else None
    yield (
        urlunsplit(parts._replace(netloc=f"{name}@{parts.netloc.rpartition('@')[2]}"))
        if parts
        else psycopg.conninfo.make_conninfo(url, user=name)
    )
    query(f"drop owned by {name}")
    query(f"drop role {name}")


async def test_a_role_without_rights_is_told_which_are_missing(
    store: PostgresStore, url: str, stranger_url: str, query: Sql
) -> None:
    with pytest.raises(UsageError, match=r"permission denied for schema orderbus; have its owner grant"):
        async with open_desk(stranger_url, name="tests"):
            pass
    name = psycopg.conninfo.conninfo_to_dict(stranger_url)["user"]
    query(f"grant usage on schema orderbus to {name}")
    query(f"grant select on all tables in schema orderbus to {name}")
    await stuck(store, row(1))
    async with open_desk(stranger_url, name="tests") as desk:
        rows = await desk.rows(EVERYTHING)
        assert numbers(rows) == [1]
        await desk.stats()
        for change in (desk.retry([rows[0].row_id]), desk.discard(rows)):
            with pytest.raises(UsageError, match=r"permission denied for table stuck"):
                await change
        assert await desk.rows(EVERYTHING) == rows
