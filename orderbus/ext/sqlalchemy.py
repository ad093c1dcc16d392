"""SQLAlchemy and orderbus in one transaction: `enlist` for a session of yours, `Sessions` for a session in a handler.

asyncio only, on psycopg: `create_async_engine("postgresql+psycopg://…")`. Needs `orderbus[postgres,sqlalchemy]`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

import psycopg
from sqlalchemy import NullPool
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialectAsync_psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine

from orderbus import Bus, Tx, UsageError
from orderbus.adapters.postgres import classify, where_of

__all__ = ["Sessions", "enlist"]


@asynccontextmanager
async def enlist(bus: Bus, owner: AsyncSession | AsyncConnection) -> AsyncIterator[Tx]:
    """Make the outbox part of the transaction of an AsyncSession, or of an AsyncConnection; committing stays with you.

    Leaving flushes the session, then inserts the emitted events and runs the deferred writes; on an exception nothing is
    inserted. Make it the last thing before the commit: events of one key keep their order because whoever emits holds the
    locks of what it has written. The database has to be the one whose outbox is relayed. Begins the transaction where none has
    begun. Raises UsageError for another driver than psycopg, in AUTOCOMMIT, where the transaction was ended inside, and what
    the database says. Cancelled, the transaction is left to its owner to roll back.
    """
    if not isinstance(owner, AsyncSession | AsyncConnection):
        raise UsageError(f"enlist takes SQLAlchemy's AsyncSession or AsyncConnection, not {type(owner).__name__}", code="OB409")
    connection = await owner.connection() if isinstance(owner, AsyncSession) else owner
    dialect = connection.dialect
    if isinstance(dialect, BorrowingDialect):
        raise UsageError("this session is on the transaction of a handler's tx already; emit with that", code="OB409")
    if (dialect.name, dialect.driver) != ("postgresql", "psycopg"):
        raise UsageError(
            f"enlist takes what is on the driver psycopg, not {dialect.name}+{dialect.driver}; "
            'make its engine with create_async_engine("postgresql+psycopg://…")',
            code="OB409",
        )
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, psycopg.AsyncConnection)
    if driver.autocommit:
        raise UsageError(
            "enlist takes what is in a transaction, and this connection is in AUTOCOMMIT, where each statement commits by "
            "itself; leave isolation_level out, or name another",
            code="OB409",
        )
    if not connection.in_transaction():
        await connection.begin()  # as a statement would, or SQLAlchemy would have nothing to commit
    assert connection.sync_connection is not None
    transaction = connection.sync_connection.get_transaction()
    async with bus.enlist(driver) as tx:
        yield tx
        if transaction is None or not transaction.is_active:
            raise UsageError(
                "the transaction was ended inside of enlist, so its events can't be part of it; commit after the block",
                code="OB409",
            )
        if isinstance(owner, AsyncSession):
            await owner.flush()


class Sessions:
    """AsyncSessions on the transaction of a handler's Tx. One for a program: it keeps what SQLAlchemy has compiled.

    `async with sessions(tx) as session:` works inside a savepoint of the handler's transaction: leaving flushes, an exception
    undoes what was done in the block. `session.commit()` and `session.rollback()` end no more than that savepoint; the effect,
    the inbox row and the events still commit together when the handler returns. Objects stay usable after the block.

    Deadlocks, serialization failures and a server that is away come out as TransientError and UnavailableError, as from
    `tx.execute`. Raises UsageError where the connection's own commit or rollback was called, under trio, and on the memory store.
    """

    def __init__(self) -> None:
        self._engine = create_async_engine(
            "postgresql+orderbus://",
            async_creator=_lent_connection,
            poolclass=NullPool,
            pool_reset_on_return=None,
            use_native_hstore=False,  # it would be registered on a connection that is not SQLAlchemy's
        )

    @asynccontextmanager
    async def __call__(self, tx: Tx) -> AsyncIterator[AsyncSession]:
        lent = tx.connection
        where = where_of(lent.info.dsn)
        with _errors_of_orderbus(where):
            connection = await self._connect(lent)
            try:
                whole = await connection.begin()
                session = AsyncSession(connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
                try:
                    yield session
                    if not whole.is_active:
                        raise UsageError(
                            "the connection of a handler's session was committed or rolled back, which is orderbus's to do; "
                            "use session.commit() and session.rollback(), or let an exception out",
                            code="OB410",
                        )
                    await session.commit()
                finally:
                    # Not by its `async with`, which closes in a task of its own: cancelled, that would go on in the next transaction.
                    await session.close()
            finally:
                await connection.close()

    async def _connect(self, lent: Any) -> AsyncConnection:
        token = _LENT.set(lent)
        try:
            return await self._engine.connect()
        finally:
            _LENT.reset(token)


class BorrowingDialect(PGDialectAsync_psycopg):
    """psycopg's, on a connection that is not SQLAlchemy's: its transaction, its end and its handlers are orderbus's."""

    supports_statement_cache = True

    @classmethod
    def get_async_dialect_cls(cls, url: Any) -> type[BorrowingDialect]:
        return cls

    def on_connect(self) -> None:
        """Nothing: it would add another handler of notices each time."""

    def do_commit(self, dbapi_connection: Any) -> None:
        """Nothing."""

    def do_rollback(self, dbapi_connection: Any) -> None:
        """Nothing."""

    def do_close(self, dbapi_connection: Any) -> None:
        """Nothing."""

    def do_terminate(self, dbapi_connection: Any) -> None:
        """Nothing: after a cancellation orderbus rolls back, or closes."""


registry.register("postgresql.orderbus", __name__, BorrowingDialect.__name__)

_LENT: ContextVar[Any] = ContextVar("orderbus.ext.sqlalchemy.lent")
"""Read while `_connect` runs, and only there: an engine's creator takes no argument."""


async def _lent_connection() -> Any:
    return _LENT.get()


@contextmanager
def _errors_of_orderbus(where: str) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        known = classify(error.orig, where) if isinstance(error.orig, psycopg.Error) else None
        if known is None:
            raise
        raise known from error
