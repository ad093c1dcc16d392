"""A trip: statements of ours, prepared once, in one write; what goes wrong in it is known, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest
from psycopg.pq import PipelineStatus, TransactionStatus

from orderbus import TransientError, new_id
from orderbus.abc import Deferred, InboxEntry
from orderbus.adapters.postgres import PostgresStore
from orderbus.adapters.postgres.arrays import int8, int8_array, text_array
from orderbus.adapters.postgres.trip import MOST_PREPARED, Call, Connection, rows_of, trip
from tests.postgres.conftest import Sql

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

ECHO = "select * from unnest(%b, %b)"


@pytest.fixture
async def connection(store: PostgresStore) -> Any:
    async with store._pool.connection() as connection:
        yield connection


def is_idle(connection: Connection) -> bool:
    pgconn = connection.pgconn
    return (pgconn.transaction_status, pgconn.pipeline_status) == (TransactionStatus.IDLE, PipelineStatus.OFF)


async def test_each_statement_has_its_answer(connection: Connection) -> None:
    for _ in range(3):
        first, second = await trip(
            connection, [Call(ECHO, (int8_array([1, 2]), text_array(["a", None]))), Call("select %b %% 4, '100%%'", (int8(7),))]
        )
        assert rows_of(connection, first) == [(1, "a"), (2, None)]
        assert rows_of(connection, second) == [(3, "100%")]
    assert is_idle(connection)
    assert [query for query, _ in connection.prepared].count(b"select * from unnest($1, $2)") == 1


async def test_more_than_the_sockets_buffers_hold_goes_out_and_comes_back(connection: Connection) -> None:
    texts = ["x" * 1_000_000] * 20
    results = await trip(connection, [Call(ECHO, (int8_array(range(20)), text_array(texts)))] * 3)
    assert [rows_of(connection, result) for result in results] == [list(zip(range(20), texts, strict=True))] * 3


async def test_the_first_failure_is_raised_and_what_follows_is_not_run(connection: Connection, query: Sql) -> None:
    note = "insert into notes select * from unnest(%b, %b)"
    one = (int8_array([1]), text_array(["a"]))
    for _ in range(2):
        with pytest.raises(psycopg.errors.UniqueViolation):
            await trip(connection, [Call("begin"), Call(note, one), Call(note, one), Call("commit")])
        assert connection.pgconn.transaction_status == TransactionStatus.INERROR
        await trip(connection, [Call("rollback")])
    assert query("select * from notes") == []


async def test_a_statement_that_can_not_be_prepared_is_not_taken_for_prepared(connection: Connection, query: Sql) -> None:
    for _ in range(2):
        with pytest.raises(psycopg.errors.UndefinedTable):
            await trip(connection, [Call("select 1"), Call("select * from nothing_here"), Call("select 2")])
    query("create table nothing_here ()")
    results = await trip(connection, [Call("select 1"), Call("select * from nothing_here"), Call("select 2")])
    assert [result.ntuples for result in results] == [1, 0, 1]


async def test_statements_beyond_those_kept_are_run_all_the_same(connection: Connection) -> None:
    for number in range(MOST_PREPARED + 20):
        [result] = await trip(connection, [Call(f"select {number}")])
        assert rows_of(connection, result) == [(number,)]
    assert len(connection.prepared) == MOST_PREPARED


async def test_a_handler_that_rolls_a_savepoint_back_commits_all_the_same(store: PostgresStore, query: Sql) -> None:
    """A savepoint that a handler rolled back makes psycopg drop every prepared statement of the connection."""
    insert = "insert into notes select * from unnest(%s::integer[], %s::text[])"

    async def write(number: int, *, rolls_back: bool) -> None:
        transaction = await store.begin()
        if rolls_back:
            async with transaction.connection.transaction():
                await transaction.connection.execute("select 1", prepare=True)
                raise psycopg.Rollback
        await transaction.commit([Deferred(insert, (number, "a"), is_row=True)], [])

    await write(1, rolls_back=False)
    for number in (2, 4, 6):
        await write(number, rolls_back=True)
        await write(number + 1, rolls_back=False)

    assert query("select id from notes order by id") == [(number,) for number in range(1, 8)]


async def test_a_handler_that_has_used_the_connection_leaves_no_statement_behind(store: PostgresStore) -> None:
    pids, kept = set(), set()
    for _ in range(30):
        transaction = await store.begin([InboxEntry(new_id(), "shop.handler", 1)])
        cursor = await transaction.connection.execute(
            "select pg_backend_pid(), count(*) from pg_prepared_statements where name like 'ob%'"
        )
        pid, count = await cursor.fetchone() or (0, 0)
        pids.add(pid)
        kept.add(count)
        await transaction.commit([], [])

    assert len(pids) == 1
    assert len(kept) == 1


async def test_statements_that_somebody_dropped_are_made_anew_with_the_next_try(connection: Connection) -> None:
    call = Call(ECHO, (int8_array([1]), text_array(["a"])))
    await trip(connection, [call])
    await connection.execute("deallocate all")
    with pytest.raises(TransientError, match="made anew with the next try"):
        await trip(connection, [call])
    [result] = await trip(connection, [call])
    assert rows_of(connection, result) == [(1, "a")]


async def test_a_cancelled_trip_closes_its_connection(store: PostgresStore) -> None:
    async with store._pool.connection() as connection:
        running = asyncio.create_task(trip(connection, [Call("select pg_sleep(60)")]))
        async with asyncio.timeout(20):
            while connection.pgconn.pipeline_status == PipelineStatus.OFF:  # noqa: ASYNC110 - nobody else could tell
                await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert connection.closed


async def test_a_server_that_ends_the_connection_is_told_by_name(connection: Connection, query: Sql) -> None:
    pid = connection.info.backend_pid
    running = asyncio.create_task(trip(connection, [Call("select pg_sleep(60)")]))
    async with asyncio.timeout(20):
        while not query(f"select 1 from pg_stat_activity where pid = {pid} and wait_event = 'PgSleep'"):  # noqa: ASYNC110
            await asyncio.sleep(0)
    query(f"select pg_terminate_backend({pid})")
    with pytest.raises(psycopg.OperationalError):
        await running
    assert connection.closed
