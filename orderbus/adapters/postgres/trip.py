"""One round trip: our own statements, prepared once a connection, in one write, and all their answers.

psycopg's pipeline sends each statement by itself and waits through a task for every answer: a transaction of two trips took more than
twice the client's CPU that libpq alone takes for it (docs/adr/16). psycopg still does what it does best: connecting, adaptation, errors, and all that
handlers send. Protocol: https://www.postgresql.org/docs/current/libpq-pipeline-mode.html
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import psycopg
from psycopg import errors
from psycopg.adapt import Transformer
from psycopg.pq import ConnStatus, ExecStatus, Format, PollingStatus
from psycopg.pq.abc import PGcancelConn, PGconn, PGresult

from orderbus.adapters.postgres.arrays import Array
from orderbus.errors import TransientError

__all__ = ["Call", "Connection", "rows_of", "trip"]

MOST_PREPARED = 100
"""Statements kept on a connection; a program that writes SQL as it goes along has the others parsed each time."""


class Call(NamedTuple):
    """A statement with `%b` (or `%s`) for each parameter, and those, in binary. Where the plan of an earlier time may be a bad one,
    it is planned each time."""

    sql: str
    params: Sequence[Array] = ()
    keeps_plan: bool = True


Prepared = tuple[bytes, tuple[int, ...]]
"""A query and the oids of its parameters."""


class Connection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """psycopg's, which knows what was prepared on it by `trip`."""

    prepared: dict[Prepared, bytes]
    serial: int
    canceller: PGcancelConn | None
    """Made with the connection, for one that is closed gives none. None where libpq is older than 17."""

    async def stop_statement(self) -> None:
        """Have the server stop what this connection, which is closed, has left behind. Once only.

        Over a connection of its own, and never by libpq's older function, in whatever thread: it waits for the server without a limit
        and keeps Python's lock meanwhile, so that a server that does not answer would stop the whole process. Where libpq has no other,
        the server's own limits end the statement. Raises OperationalError.
        """
        if self.canceller is None:
            return
        try:
            self.canceller.start()
            while (status := self.canceller.poll()) != PollingStatus.OK:
                if status == PollingStatus.FAILED:
                    raise psycopg.OperationalError(self.canceller.get_error_message())
                await _until_ready(self.canceller.socket, or_writable=status == PollingStatus.WRITING)
        finally:
            self.canceller.finish()


async def trip(connection: Connection, calls: Sequence[Call]) -> list[PGresult]:
    """Send the statements at once and wait for all answers: one result for each.

    Raises the psycopg error of the first that failed; those after it were not run. Cancelled, or where the connection breaks, the
    connection is closed, and what the server did is unknown.
    """
    async with connection.lock:
        pgconn = connection.pgconn
        try:
            pgconn.enter_pipeline_mode()
            fresh = _send(connection, calls)
            pgconn.pipeline_sync()
            answers = await _answers(pgconn)
            pgconn.exit_pipeline_mode()
        except BaseException:
            pgconn.finish()
            raise
    results, failure = [], None
    for key in fresh:
        if key is not None and (made := answers.pop(0)).status != ExecStatus.COMMAND_OK:
            connection.prepared.pop(key, None)
            failure = failure or made
        result = answers.pop(0)
        if result.status in (ExecStatus.FATAL_ERROR, ExecStatus.PIPELINE_ABORTED):
            failure = failure or result
        results.append(result)
    if failure is not None:
        raise _error(connection, failure)
    return results


def rows_of(connection: Connection, result: PGresult) -> list[tuple[Any, ...]]:
    """A result's rows in Python's types."""
    transformer = Transformer(connection)
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple)


def _send(connection: Connection, calls: Sequence[Call]) -> list[Prepared | None]:
    """Into the buffer; for each call, what had to be prepared for it."""
    pgconn, prepared = connection.pgconn, connection.prepared
    fresh: list[Prepared | None] = []
    for sql, params, keeps_plan in calls:
        query = _numbered(sql)
        oids = tuple([param.oid for param in params])
        formats = [Format.BINARY] * len(params)
        name = prepared.get((query, oids))
        is_fresh = keeps_plan and name is None and len(prepared) < MOST_PREPARED
        fresh.append((query, oids) if is_fresh else None)
        if is_fresh:
            connection.serial += 1
            name = prepared[query, oids] = f"ob{connection.serial}".encode()
            pgconn.send_prepare(name, query, oids)
        if name is None:
            pgconn.send_query_params(query, params, oids, formats, Format.BINARY)
        else:
            pgconn.send_query_prepared(name, params, formats, Format.BINARY)
    return fresh


async def _answers(pgconn: PGconn) -> list[PGresult]:
    while pgconn.flush():
        await _until_ready(pgconn.socket, or_writable=True)  # a server that waits to be read reads nothing
        pgconn.consume_input()
    answers: list[PGresult] = []
    while True:
        if pgconn.is_busy():
            await _until_ready(pgconn.socket)
            pgconn.consume_input()
            continue
        result = pgconn.get_result()
        if result is None:  # the end of one statement's answers
            if pgconn.status == ConnStatus.BAD:
                raise psycopg.OperationalError("the connection is lost")
        elif result.status == ExecStatus.PIPELINE_SYNC:
            return answers
        else:
            answers.append(result)


async def _until_ready(descriptor: int, *, or_writable: bool = False) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def is_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, is_ready)
    if or_writable:
        loop.add_writer(descriptor, is_ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)
        if or_writable:
            loop.remove_writer(descriptor)


def _error(connection: Connection, result: PGresult) -> Exception:
    if result.status == ExecStatus.PIPELINE_ABORTED:
        return errors.PipelineAborted("pipeline aborted")
    error = errors.error_from_result(result, encoding="utf-8")
    if isinstance(error, errors.InvalidSqlStatementName):
        # psycopg deallocates everything after a rollback or a change of the schema that went through it.
        connection.prepared.clear()
        known = TransientError("a connection's prepared statements were dropped; they are made anew with the next try")
        known.__cause__ = error
        return known
    return error


@lru_cache(maxsize=1024)
def _numbered(sql: str) -> bytes:
    """`%b` (or `%s`) as PostgreSQL's `$1`, and `%%` as `%`."""
    parts = sql.split("%%")
    count = 0
    for index, part in enumerate(parts):
        head, *rest = part.replace("%s", "%b").split("%b")
        numbered = [head]
        for piece in rest:
            count += 1
            numbered.append(f"${count}{piece}")
        parts[index] = "".join(numbered)
    return "%".join(parts).encode()
