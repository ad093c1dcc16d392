"""A transaction: its inbox rows, the handler's writes and its events commit together or not at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import errors

from orderbus.abc import Deferred, InboxEntry, Verdict
from orderbus.adapters.postgres import PostgresStore, open_store
from orderbus.errors import TransientError, UnavailableError, UsageError
from tests.faults.proxy import Proxy
from tests.postgres.conftest import ALL, Sql, emit, event_id, row

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

NEW, DUPLICATE, CONFLICT = Verdict.NEW, Verdict.DUPLICATE, Verdict.CONFLICT
INSERT = "insert into notes values (%s, %s)"


def entry(number: int, consumer: str = "payments.authorize", body_hash: int = 1) -> InboxEntry:
    return InboxEntry(event_id(number), consumer, body_hash)


async def handle(store: PostgresStore, *entries: InboxEntry) -> list[Verdict]:
    transaction = await store.begin(entries)
    await transaction.commit([], [])
    return list(transaction.verdicts)


async def until_somebody_waits_for_a_lock(query: Sql) -> None:
    async with asyncio.timeout(20):
        while not await asyncio.to_thread(query, "select 1 from pg_locks where not granted"):
            pass


async def test_an_event_is_new_once_for_each_consumer(store: PostgresStore) -> None:
    assert await handle(store, entry(1), entry(2)) == [NEW, NEW]
    assert await handle(store, entry(3), entry(2), entry(1, "shipping")) == [NEW, DUPLICATE, NEW]


async def test_the_same_id_with_another_body_is_a_conflict(store: PostgresStore) -> None:
    await handle(store, entry(1, body_hash=-(2**63)))
    assert await handle(store, entry(1, body_hash=2**63 - 1), entry(1, body_hash=-(2**63))) == [CONFLICT, DUPLICATE]


async def test_of_two_entries_alike_in_one_batch_the_first_is_new(store: PostgresStore) -> None:
    assert await handle(store, entry(2), entry(1), entry(2), entry(1, body_hash=9)) == [NEW, NEW, DUPLICATE, CONFLICT]


async def test_after_a_rollback_an_event_is_new_again(store: PostgresStore) -> None:
    transaction = await store.begin([entry(1)])
    await transaction.rollback()

    assert await handle(store, entry(1)) == [NEW]


async def test_a_forgotten_entry_is_new_again_and_its_neighbours_are_not(store: PostgresStore) -> None:
    transaction = await store.begin([entry(1), entry(2)])
    await transaction.commit([], [], forget=[entry(1)])

    assert await handle(store, entry(1), entry(2)) == [NEW, DUPLICATE]


async def test_a_second_handler_of_an_event_waits_for_the_first_and_finds_it_handled(store: PostgresStore, query: Sql) -> None:
    first = await store.begin([entry(1)])
    second = asyncio.create_task(handle(store, entry(0), entry(1)))
    await until_somebody_waits_for_a_lock(query)

    await first.commit([], [])

    assert await second == [NEW, DUPLICATE]


async def test_a_second_handler_that_waits_too_long_is_to_try_again(url: str, store: PostgresStore) -> None:
    first = await store.begin([entry(1)])
    async with open_store(url, name="impatient", lock_timeout_ms=1) as impatient:
        with pytest.raises(TransientError):
            await impatient.begin([entry(1)])
        await first.commit([], [])
        assert await handle(impatient, entry(1)) == [DUPLICATE]


async def test_batches_that_share_events_in_any_order_do_not_deadlock(store: PostgresStore) -> None:
    async def handle_all(order: int) -> list[Verdict]:
        numbers = [(n * order) % 101 for n in range(1, 101)]
        return await handle(store, *(entry(n) for n in numbers))

    verdicts = await asyncio.gather(*(handle_all(order) for order in (1, 7, 50, 100)))

    assert sorted(verdict.value for some in verdicts for verdict in some) == ["duplicate"] * 300 + ["new"] * 100


async def test_effects_and_events_commit_together(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin([entry(1)])
    found = await transaction.execute("insert into notes values (1, 'a'), (2, 'b') returning id", ())
    touched = await transaction.execute("update notes set text = %(text)s", {"text": "c"})
    assert query("select count(*) from notes")[0][0] == 0
    await transaction.commit([], [row(1)])

    assert found == ([(1,), (2,)], 2)
    assert touched == ((), 2)
    assert query("select text, topic, key from notes, orderbus.outbox") == [("c", "orders.placed", "k")] * 2


async def test_nothing_of_a_transaction_that_rolled_back_remains(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin([entry(1)])
    await transaction.execute(INSERT, (1, "a"))
    await transaction.rollback()
    await transaction.rollback()

    assert query("select id from notes union all select id from orderbus.outbox") == []


async def test_deferred_rows_of_one_statement_are_sent_as_its_columns(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin()
    rows = "insert into notes select * from unnest(%s::integer[], %s::text[])"
    await transaction.commit(
        [
            Deferred(rows, (1, "a"), is_row=True),
            Deferred("update notes set text = text || '!'", ()),
            Deferred(rows, (2, None), is_row=True),
        ],
        [],
    )

    assert query("select * from notes order by id") == [(1, "a!"), (2, None)]


async def test_deferred_rows_of_unequal_length_roll_all_back(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin()
    rows = "insert into notes select * from unnest(%s::integer[], %s::text[])"
    with pytest.raises(UsageError, match="not of one length"):
        await transaction.commit([Deferred(rows, (1, "a"), is_row=True), Deferred(rows, (2,), is_row=True)], [])

    assert query("select * from notes") == []


async def test_deferred_statements_run_at_commit_grouped_by_text_in_order_of_first_appearance(
    store: PostgresStore, query: Sql
) -> None:
    transaction = await store.begin()
    append = "update notes set text = text || %s where id = %s"
    await transaction.commit(
        [
            Deferred(INSERT, (1, "")),
            Deferred(append, ("a", 1)),
            Deferred(append, ("b", 2)),
            Deferred(INSERT, (2, "")),
            Deferred("update notes set text = text || %(end)s", {"end": "!"}),
            Deferred(append, ("c", 1)),
        ],
        [],
    )

    assert query("select * from notes order by id") == [(1, "ac!"), (2, "b!")]


@pytest.mark.parametrize("events", [0, 2])
async def test_a_failing_deferred_statement_says_so_itself_and_rolls_all_back(
    store: PostgresStore, query: Sql, events: int
) -> None:
    transaction = await store.begin([entry(1)])
    statements = [Deferred(INSERT, (number % 40, "")) for number in range(60)] + [
        Deferred("update notes set text = 'x'", ())
    ] * 60

    with pytest.raises(errors.UniqueViolation, match=r"Key \(id\)=\(0\) already exists"):
        await transaction.commit(statements, [row(number) for number in range(events)])

    assert query("select id from notes union all select id from orderbus.outbox") == []
    assert await handle(store, entry(1)) == [NEW]


async def test_a_constraint_that_is_checked_at_commit_rolls_all_back(store: PostgresStore, query: Sql) -> None:
    query("create table late (id integer references notes deferrable initially deferred)")
    transaction = await store.begin()
    await transaction.execute("insert into late values (1)", ())

    with pytest.raises(errors.ForeignKeyViolation):
        await transaction.commit([], [row(1)])

    assert query("select id from orderbus.outbox") == []


async def test_a_handler_that_swallowed_a_failed_statement_is_told_that_nothing_commits(store: PostgresStore) -> None:
    transaction = await store.begin()
    with pytest.raises(errors.UndefinedTable):
        await transaction.execute("select * from nowhere", ())

    with pytest.raises(errors.InFailedSqlTransaction, match=r"tx\.connection\.transaction"):
        await transaction.commit([], [])


async def test_a_savepoint_spares_the_transaction(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin()
    with pytest.raises(errors.UndefinedTable):
        async with transaction.connection.transaction():
            await transaction.execute("select * from nowhere", ())
    await transaction.commit([Deferred(INSERT, (1, "a"))], [row(1)])

    assert query("select text from notes, orderbus.outbox") == [("a",)]


async def test_a_handler_that_ended_the_transaction_itself_is_told(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin()
    await transaction.connection.commit()

    with pytest.raises(UsageError, match="ended the transaction itself"):
        await transaction.commit([], [row(1)])

    assert query("select id from orderbus.outbox") == []


async def test_a_transaction_that_has_ended_says_so(store: PostgresStore) -> None:
    transaction = await store.begin()
    await transaction.commit([], [])

    with pytest.raises(UsageError, match="has ended"):
        await transaction.execute("select 1", ())
    with pytest.raises(UsageError, match="has ended"):
        await transaction.commit([], [])


async def test_ids_follow_the_order_of_the_list_and_every_field_comes_back(store: PostgresStore) -> None:
    rows = [
        row(1, None, unrouted="drop", headers={}),
        row(2, "größe", body=bytes(range(256)), headers={"ü": '"\\\n', "": "x"}, content_type="application/msgpack", bucket=63),
        *(row(n, f"k{n}") for n in range(3, 300)),
    ]
    await emit(store, rows)

    page = await store.outbox.read(ALL, 0, 1000, 1 << 30)

    ids = [found.id for found in page.rows]
    assert ids == sorted(ids)
    assert [(found.event_id, found.topic, found.key, found.bucket, found.body) for found in page.rows] == [
        (sent.event_id, sent.topic, sent.key, sent.bucket, sent.body) for sent in rows
    ]
    assert [(found.headers, found.unrouted, found.content_type) for found in page.rows] == [
        (sent.headers, sent.unrouted, sent.content_type) for sent in rows
    ]


async def test_two_transactions_that_deadlock_are_told_to_try_again(store: PostgresStore, query: Sql) -> None:
    query("insert into notes values (1, ''), (2, '')")
    one, other = await store.begin(), await store.begin()
    touch = "update notes set text = 'x' where id = %s"
    for transaction, first in ((one, 1), (other, 2)):
        await transaction.execute("set local lock_timeout = '20s'", ())
        await transaction.execute(touch, (first,))

    waiting = asyncio.create_task(one.execute(touch, (2,)))
    await until_somebody_waits_for_a_lock(query)
    results = await asyncio.gather(waiting, other.execute(touch, (1,)), return_exceptions=True)

    assert [type(result) for result in results if isinstance(result, Exception)] == [TransientError]
    await one.rollback()
    await other.rollback()


Step = Callable[[PostgresStore], Coroutine[Any, Any, None]]


async def _begin(store: PostgresStore) -> None:
    await store.begin([entry(1)])


async def _execute(store: PostgresStore) -> None:
    transaction = await store.begin()
    try:
        await transaction.execute("insert into notes values (1, 'late')", ())
    finally:
        await transaction.rollback()


async def _commit(store: PostgresStore) -> None:
    transaction = await store.begin()
    await transaction.commit([Deferred(INSERT, (1, "late"))], [row(1)])


@pytest.mark.parametrize("step", [_begin, _execute, _commit])
async def test_a_cancelled_call_leaves_no_transaction_behind_and_no_connection_short(url: str, query: Sql, step: Step) -> None:
    async with open_store(url, name="cancelled", pool_size=2) as store:
        await store.apply_schema()
        query("create table notes (id integer primary key, text text)")
        blocker = await store.begin([entry(1)])
        await blocker.execute(INSERT, (1, "first"))
        blocked = asyncio.create_task(step(store))
        await until_somebody_waits_for_a_lock(query)

        blocked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await blocked
        await blocker.commit([], [])

        transactions = [await store.begin() for _ in range(2)]
        for transaction in transactions:
            await transaction.rollback()
        assert query("select text from notes") == [("first",)]
        assert query("select id from orderbus.outbox") == []


async def test_where_nobody_answers_a_cancelled_call_ends_and_stops_nobody_else(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the request to stop the statement is answered; libpq's older function would wait for that with Python's lock in hand."""
    monkeypatch.setattr("orderbus.adapters.postgres.transaction.CANCEL_S", 0.1)
    parts = urlsplit(postgres_url)
    with closing(Proxy(parts.port or 5432, random.Random(1))) as proxy:
        through = parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}")
        async with open_store(urlunsplit(through), name="tests", pool_size=1) as store:
            transaction = await store.begin()
            proxy.black_hole()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await transaction.execute("select pg_sleep(60)", ())
            async with asyncio.timeout(20):
                await transaction.rollback()


async def test_a_transaction_more_than_the_pool_has_places_waits_and_then_says_why(url: str) -> None:
    async with open_store(url, name="small", pool_size=1, acquire_s=0.01) as store:
        transaction = await store.begin()
        with pytest.raises(UnavailableError, match="all 1 connections stayed in use"):
            await store.begin()
        await transaction.rollback()
        await (await store.begin()).rollback()


async def test_a_connection_that_the_server_ended_costs_its_transaction_and_no_other(store: PostgresStore, query: Sql) -> None:
    transaction = await store.begin()
    pid = transaction.connection.info.backend_pid
    query("select pg_terminate_backend(%s, 10000)", pid)

    with pytest.raises(UnavailableError, match=r"PostgreSQL at .+/orderbus_test_"):
        await transaction.commit([Deferred(INSERT, (1, "a"))], [row(1)])

    assert query("select id from notes") == []
    assert await handle(store, entry(1)) == [NEW]


async def test_connections_that_ended_while_they_were_idle_are_not_noticed_by_anyone(store: PostgresStore, query: Sql) -> None:
    transactions = [await store.begin() for _ in range(4)]
    pids = [transaction.connection.info.backend_pid for transaction in transactions]
    for transaction in transactions:
        await transaction.rollback()
    query("select pg_terminate_backend(pid, 10000) from unnest(%s::int[]) as pid", pids)

    assert await handle(store, *(entry(n) for n in range(4))) == [NEW] * 4


async def test_what_a_handler_changed_on_the_connection_is_gone_with_the_next(url: str) -> None:
    async with open_store(url, name="one", pool_size=1) as store:
        transaction = await store.begin()
        transaction.connection.row_factory = psycopg.rows.dict_row  # type: ignore[assignment]
        await transaction.rollback()

        transaction = await store.begin()
        assert await transaction.execute("select 1", ()) == ([(1,)], 1)
        await transaction.rollback()


async def test_an_enlisted_transaction_inserts_and_leaves_the_commit_to_its_owner(
    url: str, store: PostgresStore, query: Sql
) -> None:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        async with connection.transaction(force_rollback=True):
            await store.enlist(connection).commit([], [row(1)])
        async with connection.transaction():
            enlisted = store.enlist(connection)
            assert await enlisted.execute("select 1", ()) == ([(1,)], 1)
            await enlisted.commit([Deferred(INSERT, (1, "a"))], [row(2)])
            assert query("select id from orderbus.outbox") == []

    assert query("select event_id, text from orderbus.outbox, notes") == [(event_id(2), "a")]


async def test_enlist_refuses_what_has_no_transaction(url: str, store: PostgresStore) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        with pytest.raises(UsageError, match="connection in a transaction"):
            store.enlist(connection)
    with psycopg.connect(url) as blocking, pytest.raises(UsageError, match=r"psycopg\.AsyncConnection, not Connection"):
        store.enlist(blocking)


async def test_enlist_refuses_a_connection_that_would_garble_keys(url: str, store: PostgresStore) -> None:
    async with await psycopg.AsyncConnection.connect(url, client_encoding="LATIN1") as connection:
        with pytest.raises(UsageError, match=r"client_encoding is LATIN1.*set it to UTF8"):
            store.enlist(connection)
