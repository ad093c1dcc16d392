"""A transaction: the inbox rows it was begun with, the handler's statements, and at commit everything else in one round trip."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import msgspec
import psycopg
from psycopg import AsyncCursor, errors
from psycopg.pq import TransactionStatus

from orderbus._core.columns import Column, columns
from orderbus.abc import Deferred, InboxEntry, OutboxRow, Verdict
from orderbus.adapters.postgres import inbox
from orderbus.adapters.postgres.arrays import (
    Array,
    array_of,
    bytea_array,
    int2_array,
    int8_array,
    register,
    text_array,
    uuid_array,
)
from orderbus.adapters.postgres.errors import limited
from orderbus.adapters.postgres.pool import Pool
from orderbus.adapters.postgres.trip import Call, Connection, rows_of, trip
from orderbus.errors import UnavailableError, UsageError

__all__ = ["EnlistedTransaction", "PostgresTransaction", "check_encoding", "outbox_calls"]

CANCEL_S = 5.0


class PostgresTransaction:
    """An open transaction on a pooled connection; implements orderbus.abc.Transaction.

    Where `commit` raises, the transaction is rolled back; only after UnavailableError or a cancellation it may have taken place.
    A cancelled call never leaves the connection to others in a transaction.
    """

    def __init__(self, pool: Pool, connection: Connection, *, numbers: Mapping[str, int], limit_s: float) -> None:
        self.verdicts: Sequence[Verdict] = ()
        self._pool = pool
        self._open: Connection | None = connection
        self._numbers = numbers
        self._limit_s = limit_s
        self._may_lack_statements = False
        """psycopg drops all prepared statements, ours too, after a savepoint's rollback or a change of the schema that it has seen."""

    @property
    def connection(self) -> Connection:
        """The psycopg connection. Its `transaction()` makes savepoints; its `commit` and `rollback` are not for handlers."""
        self._may_lack_statements = True
        return self._connection()

    def _connection(self) -> Connection:
        if self._open is None:
            raise UsageError(
                "the transaction has ended; use tx only inside the handler or block that it was given to", code="OB405"
            )
        return self._open

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        connection = self._connection()
        arrays = None if self._may_lack_statements else _arrays(sql, params)
        async with limited(self._pool.where, self._limit_s):
            if arrays is not None:
                [result] = await trip(connection, [Call(sql, arrays)])
                return rows_of(connection, result) if result.nfields else (), result.command_tuples or 0
            cursor = await connection.execute(sql, params)
            if not _LEAVES_STATEMENTS(cursor.statusmessage or ""):
                self._may_lack_statements = True
            return await _rows_and_count(cursor)

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        connection = self._connection()
        try:
            _check_open(connection)
            async with limited(self._pool.where, self._limit_s):
                last = [*([inbox.forget(forget, self._numbers)] if forget else ()), Call("commit")]
                calls = None if self._may_lack_statements else _calls(deferred, emitted)
                if calls is not None:
                    await trip(connection, [*calls, *last])
                    return
                async with connection.pipeline():
                    await _insert(connection, deferred, emitted)
                    for sql, params, keeps_plan in last:
                        await connection.execute(sql, params, prepare=keeps_plan)
                    ours = next(iter(connection.prepared.values()), None) if self._may_lack_statements else None
                    there = None if ours is None else await connection.execute(_IS_PREPARED, (ours.decode(),))
                if there is not None and await there.fetchone() is None:
                    connection.prepared.clear()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.rollback()
            raise
        finally:
            self.abandon()

    async def rollback(self) -> None:
        """Also ends a transaction whose connection is gone; a second call does nothing.

        A statement that is cancelled closes its connection, and the server would run it to its end, with all its locks. So it is
        told to stop, on a connection of its own.
        """
        try:
            if self._open is not None and self._open.closed:
                async with limited(self._pool.where, CANCEL_S):
                    await self._open.stop_statement()
            elif self._open is not None and self._open.pgconn.transaction_status != TransactionStatus.IDLE:
                async with limited(self._pool.where, self._limit_s):
                    # Not through psycopg, which would then drop every prepared statement of the connection.
                    await trip(self._open, [Call("rollback")])
        except (psycopg.Error, UnavailableError):
            pass  # the connection is of no more use, so it is closed, and the server rolls back by itself
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End it at once, without a word to the server: a connection that is still in a transaction is closed. Synchronous."""
        connection, self._open = self._open, None
        if connection is not None:
            self._pool.release(connection)


class EnlistedTransaction:
    """The outbox inside a psycopg transaction that the caller's code owns: `commit` inserts, and the owner commits."""

    verdicts: Sequence[Verdict] = ()

    def __init__(self, connection: Connection, *, where: str, limit_s: float) -> None:
        if not isinstance(connection, psycopg.AsyncConnection):
            raise UsageError(f"enlist takes a psycopg.AsyncConnection, not {type(connection).__name__}", code="OB409")
        if connection.autocommit and connection.pgconn.transaction_status == TransactionStatus.IDLE:
            raise UsageError(
                "enlist takes a connection in a transaction; put `async with connection.transaction():` around it", code="OB409"
            )
        check_encoding(connection)
        register(connection)
        self.connection = connection
        self._where = where
        self._limit_s = limit_s

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        async with limited(self._where, self._limit_s):
            return await _rows_and_count(await self.connection.execute(sql, params))

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        if forget:
            raise UsageError("an enlisted transaction has no inbox entries to forget", code="OB409")
        async with limited(self._where, self._limit_s), self.connection.pipeline():
            await _insert(self.connection, deferred, emitted)

    async def rollback(self) -> None:
        """Nothing to do: nothing was inserted yet, and the transaction is its owner's."""


_INSERT_OUTBOX = """\
with me as materialized (select pg_current_xact_id() as xid)
insert into orderbus.outbox (event_id, bucket, topic, key, body, content_type, headers, unrouted)
select event_id, bucket, topic, key, body, content_type, headers::json, unrouted
from me, unnest(%b, %b, %b, %b, %b, %b, %b, %b)
    with ordinality as r (event_id, bucket, topic, key, body, content_type, headers, unrouted, position)
where me.xid is not null
order by position"""
# The xid comes before the ids: the relay's floor rests on it (orderbus/_core/outbox.py). nextval runs after the sort.

_IS_PREPARED = "select from pg_prepared_statements where name = %s"
"""All of ours are there, or none. To forget them while they are there would leave them to the connection for ever."""

_INSERT_SCHEDULED = """\
insert into orderbus.scheduled (event_id, bucket, topic, key, body, content_type, headers, unrouted, due_at)
select event_id, bucket, topic, key, body, content_type, headers::json, unrouted, to_timestamp(due_at_ms / 1000.0)
from unnest(%b, %b, %b, %b, %b, %b, %b, %b, %b)
    with ordinality as r (event_id, bucket, topic, key, body, content_type, headers, unrouted, due_at_ms, position)
order by position"""


def _calls(deferred: Sequence[Deferred], emitted: Sequence[OutboxRow]) -> list[Call] | None:
    """What `_insert` does, as calls of one trip; None where a deferred statement needs psycopg to say how its values are sent."""
    calls: list[Call] = []
    for (sql, are_rows), params in _grouped(deferred).items():
        arrays = _arrays(sql, columns(params)) if are_rows else None
        if arrays is None:
            return None
        calls.append(Call(sql, arrays))
    return calls + outbox_calls(emitted)


async def _insert(connection: Connection, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow]) -> None:
    """Everything that was put off until commit; the outbox last, after the locks of the business writes are taken."""
    for (sql, are_rows), params in _grouped(deferred).items():
        if are_rows:
            await connection.execute(sql, columns(params))
        else:
            await connection.cursor().executemany(sql, params)
    for call in outbox_calls(emitted):
        await connection.execute(call.sql, call.params, prepare=True)


def _grouped(deferred: Sequence[Deferred]) -> dict[tuple[str, bool], list[Any]]:
    """The parameters by their statement, in the order of its first appearance."""
    grouped: dict[tuple[str, bool], list[Any]] = {}
    for statement in deferred:
        grouped.setdefault((statement.sql, statement.is_row), []).append(statement.params)
    return grouped


def _arrays(sql: str, params: Any) -> list[Array] | None:
    """The parameters in binary where all are Columns of a known type, one for each `%s`; None where psycopg must look at them."""
    if not params or not isinstance(params, Sequence) or sql.count("%") != len(params):
        return None
    arrays = [array for column in params if type(column) is Column and (array := array_of(column)) is not None]
    return arrays if len(arrays) == len(params) else None


def outbox_calls(emitted: Sequence[OutboxRow]) -> list[Call]:
    """What inserts rows into the outbox, and those with a time into what is scheduled; in binary, as `register` teaches a connection."""
    later = [row for row in emitted if row.due_at_ms is not None]
    now = [row for row in emitted if row.due_at_ms is None] if later else emitted
    calls = []
    if later:
        calls.append(Call(_INSERT_SCHEDULED, (*_columns(later), int8_array([row.due_at_ms or 0 for row in later]))))
    if now:
        calls.append(Call(_INSERT_OUTBOX, _columns(now)))
    return calls


def check_encoding(connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any]) -> None:
    """Of a connection that is not ours: we send text as UTF-8, which the server would take for what the connection says."""
    if connection.info.encoding not in ("utf-8", "ascii"):  # psycopg's name for SQL_ASCII, where nothing is converted
        encoding = connection.info.parameter_status("client_encoding")
        raise UsageError(
            f"the connection's client_encoding is {encoding}, in which keys would be garbled; set it to UTF8", code="OB409"
        )


def _columns(rows: Sequence[OutboxRow]) -> tuple[Array, ...]:
    return (
        uuid_array([row.event_id for row in rows]),
        int2_array([row.bucket for row in rows]),
        text_array([row.topic for row in rows]),
        text_array([row.key for row in rows]),
        bytea_array([row.body for row in rows]),
        text_array([row.content_type for row in rows]),
        text_array([msgspec.json.encode(row.headers).decode() for row in rows]),
        text_array([row.unrouted for row in rows]),
    )


def _check_open(connection: Connection) -> None:
    """COMMIT of a failed transaction rolls back and reports success; outside one it commits nothing."""
    status = connection.pgconn.transaction_status
    if status == TransactionStatus.INERROR:
        raise errors.InFailedSqlTransaction(
            "a statement of this transaction failed and the handler went on; let the error out, "
            "or run what may fail inside `async with tx.connection.transaction():`"
        )
    if status == TransactionStatus.IDLE:
        raise UsageError("the handler ended the transaction itself; leave commit and rollback to orderbus", code="OB410")


_LEAVES_STATEMENTS = re.compile("SELECT|INSERT|UPDATE|DELETE|MERGE|LOCK|SET|COPY").match


async def _rows_and_count(cursor: AsyncCursor[tuple[Any, ...]]) -> tuple[Sequence[tuple[Any, ...]], int]:
    return (await cursor.fetchall() if cursor.description else ()), cursor.rowcount
