"""A fixed number of connections, opened when needed, and given back without waiting.

psycopg_pool is not used: while the server is down each of its callers waits out the whole time limit and learns no cause; after
an outage its connections come back on a back-off of their own; giving one back is a coroutine that a cancellation can interrupt.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from psycopg import capabilities
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import ConnStatus, PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from orderbus._runtime.metrics import meters
from orderbus.adapters.postgres.arrays import register
from orderbus.adapters.postgres.errors import limited
from orderbus.adapters.postgres.trip import Connection
from orderbus.errors import UnavailableError, UsageError

__all__ = ["Connection", "Pool", "conninfo_for", "where_of", "with_options"]


class Pool:
    """At most `size` connections in autocommit mode. `acquire` waits for a free place up to `acquire_s`, in order of arrival."""

    def __init__(self, conninfo: str, *, size: int, acquire_s: float, connect_s: float) -> None:
        self.where = where_of(conninfo)
        self._name = str(conninfo_to_dict(conninfo).get("application_name") or "")
        self._conninfo = conninfo
        self._size = size
        self._acquire_s = acquire_s
        self._connect_s = connect_s
        self._places = asyncio.Semaphore(size)
        self._free: list[Connection] = []
        self._is_closed = False
        self._metrics = meters()

    async def acquire(self) -> Connection:
        """An idle connection. Raises UnavailableError when the server can't be reached, or all places stay taken."""
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._acquire_s):
                await self._places.acquire()
        except TimeoutError as error:
            self._waited(began)
            raise UnavailableError(
                f"{self.where}: all {self._size} connections stayed in use for {self._acquire_s:g} s; raise pool_size, "
                "or shorten what handlers do inside their transactions"
            ) from error
        self._waited(began)
        try:
            if self._is_closed:
                raise UnavailableError(f"{self.where}: the store is closed")
            while self._free:
                connection = self._free.pop()
                if _is_alive(connection):
                    return connection
                connection.pgconn.finish()
            return await self._connect()
        except BaseException:
            self._places.release()
            raise

    def _waited(self, since: float) -> None:
        if self._metrics.records:
            self._metrics.connection_wait.record(time.perf_counter() - since, {"db.client.connection.pool.name": self._name})

    def release(self, connection: Connection) -> None:
        """Take a connection back. One that is not idle is closed, so that the server rolls back what was open on it.

        Synchronous, so that no cancellation can come between.
        """
        if not self._is_closed and connection.autocommit and _is_idle(connection):
            connection.row_factory = tuple_row
            self._free.append(connection)
        else:
            connection.pgconn.finish()
        self._places.release()

    @asynccontextmanager
    async def connection(self, *, is_kept: bool = True) -> AsyncIterator[Connection]:
        """A connection for the length of a block, each statement in it a transaction of its own.

        One whose block changes the schema is not kept: psycopg would drop all that is prepared on it, some time later.
        """
        connection = await self.acquire()
        try:
            yield connection
        finally:
            if not is_kept:
                connection.pgconn.finish()
            self.release(connection)

    def close(self) -> None:
        """Close what is free; what is in use is closed when it is released."""
        self._is_closed = True
        while self._free:
            connection = self._free.pop()  # named, or it would be deleted, with a warning, before it is finished
            connection.pgconn.finish()

    async def _connect(self) -> Connection:
        async with limited(self.where, self._connect_s):
            connection = await Connection.connect(self._conninfo, autocommit=True)
        connection.prepared, connection.serial = {}, 0
        connection.canceller = connection.pgconn.cancel_conn() if capabilities.has_cancel_safe() else None
        register(connection)
        return connection


def conninfo_for(url: str, *, name: str, statement_timeout_ms: int, lock_timeout_ms: int, idle_in_transaction_ms: int) -> str:
    """The connection string for a `postgresql://` URL, with time limits for the server and for a network that swallows packets.

    What the URL sets itself stands. Raises UsageError where the URL can't be read, without repeating it: it may hold a password.
    """
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise UsageError(
            "the database URL can't be read; write postgresql://user:password@host:port/dbname", code="OB104"
        ) from None
    options = (
        f"-c statement_timeout={statement_timeout_ms} -c lock_timeout={lock_timeout_ms} "
        f"-c idle_in_transaction_session_timeout={idle_in_transaction_ms}"
    )
    settings: dict[str, Any] = {
        "application_name": name,
        "client_encoding": "UTF8",  # or text would come as bytes from a database in SQL_ASCII, as one made without a locale is
        "keepalives_idle": 15,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
        **given,
        "options": f"{options} {given.get('options') or ''}".strip(),
    }
    return make_conninfo("", **settings)


def with_options(conninfo: str, **options: str) -> str:
    """The same with more of the server's settings, which go before those it has."""
    before = str(conninfo_to_dict(conninfo).get("options") or "")
    return make_conninfo(conninfo, options=" ".join([before, *(f"-c {name}={value}" for name, value in options.items())]).strip())


def where_of(conninfo: str) -> str:
    """`PostgreSQL at host:port/dbname`, for error texts; never the password."""
    given = conninfo_to_dict(conninfo)
    host = given.get("host") or given.get("hostaddr") or "local socket"
    user = given.get("user") or "postgres"
    return f"PostgreSQL at {host}:{given.get('port') or 5432}/{given.get('dbname') or user}"


def _is_idle(connection: Connection) -> bool:
    pgconn = connection.pgconn
    return (
        pgconn.status == ConnStatus.OK
        and pgconn.transaction_status == TransactionStatus.IDLE
        and pgconn.pipeline_status == PipelineStatus.OFF
    )


def _is_alive(connection: Connection) -> bool:
    """Whether an idle connection still stands, without a round trip.

    A server that ends it leaves its last words or an end of file to read. What else a server may say unasked (a notice, a
    changed parameter) is rare enough to open a new connection for.
    """
    poll = select.poll()
    poll.register(connection.pgconn.socket, select.POLLIN)
    return _is_idle(connection) and not poll.poll(0)
