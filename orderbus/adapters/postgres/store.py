"""A PostgreSQL database as the store of a bus: its transactions, inbox and outbox."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from orderbus.abc import InboxEntry
from orderbus.adapters.postgres import inbox as inbox_table, schema
from orderbus.adapters.postgres.embedded import is_embedded, start_embedded
from orderbus.adapters.postgres.errors import limited
from orderbus.adapters.postgres.outbox import PostgresOutbox, promote_orphans
from orderbus.adapters.postgres.partitions import clean_default_partition, create_partitions, drop_partitions
from orderbus.adapters.postgres.pool import Connection, Pool, conninfo_for, with_options
from orderbus.adapters.postgres.transaction import EnlistedTransaction, PostgresTransaction
from orderbus.errors import UnavailableError, UsageError

__all__ = ["PostgresStore", "open_store"]

log = logging.getLogger("orderbus")


@asynccontextmanager
async def open_store(
    url: str,
    *,
    name: str,
    pool_size: int = 4,
    statement_timeout_ms: int = 30_000,
    lock_timeout_ms: int = 5_000,
    idle_in_transaction_ms: int = 300_000,
    acquire_s: float = 10.0,
    connect_s: float = 5.0,
    dedupe_window_s: float | None = None,
) -> AsyncIterator[PostgresStore]:
    """Open a store at `postgresql://…`, or `embedded` (see embedded.py); `name` shows in pg_stat_activity. asyncio only.

    `pool_size` (≥ 1) is how many transactions may be open at once; `acquire_s` how long one more waits. The outbox has up to
    two connections of its own, opened at its first use, so that handlers can't keep the relay waiting. The server ends a
    statement, a wait for a lock and an idle transaction after the given times; what the URL's `options` say goes before.
    `dedupe_window_s` is how long the consumers need the inbox that begin transactions here: no upkeep forgets sooner.
    Raises UnavailableError, naming host, port and database, when the server can't be reached within `connect_s`.
    """
    if pool_size < 1:
        raise UsageError(f"pool_size={pool_size}: at least 1", code="OB113")
    conninfo = conninfo_for(
        await start_embedded(url) if is_embedded(url) else url,
        name=name,
        statement_timeout_ms=statement_timeout_ms,
        lock_timeout_ms=lock_timeout_ms,
        idle_in_transaction_ms=idle_in_transaction_ms,
    )
    pool = Pool(conninfo, size=pool_size, acquire_s=acquire_s, connect_s=connect_s)
    relay_conninfo = with_options(conninfo, **_ALWAYS_BY_INDEX)
    relay_pool = Pool(relay_conninfo, size=RELAY_CONNECTIONS, acquire_s=acquire_s, connect_s=connect_s)
    try:
        async with pool.connection():
            pass
        yield PostgresStore(pool, relay_pool, limit_s=statement_timeout_ms / 1000 + 5, window_s=dedupe_window_s)
    finally:
        pool.close()
        relay_pool.close()


RELAY_CONNECTIONS = 2
VALIDATION_S = 1800.0
"""To read the inbox's default partition may take long, where it is. Nobody waits for it."""

_ALWAYS_BY_INDEX = {"enable_seqscan": "off", "jit": "off"}
"""A plan that was cached while the outbox was short reads the whole table: with a backlog of 100,000 rows, a delete of 500 took
100 ms instead of 1. Where no index exists the planner still scans, at a cost so high that it would set off the compiler."""


class PostgresStore:
    """Implements orderbus.abc.Store. `limit_s` bounds every conversation with the server, should the server's own limits fail."""

    def __init__(self, pool: Pool, relay_pool: Pool, *, limit_s: float, window_s: float | None = None) -> None:
        self._pool = pool
        self._limit_s = limit_s
        self._window_s = window_s
        self._numbers: dict[str, int] = {}
        self.outbox = PostgresOutbox(relay_pool, limit_s=limit_s)

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> PostgresTransaction:
        """Raises TransientError where a transaction that handles the same event held its row for longer than lock_timeout."""
        await self._know(inbox)
        connection = await self._pool.acquire()
        transaction = PostgresTransaction(self._pool, connection, numbers=self._numbers, limit_s=self._limit_s)
        try:
            async with limited(self._pool.where, self._limit_s):
                transaction.verdicts = await inbox_table.begin(connection, inbox, self._numbers)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await transaction.rollback()
            raise
        return transaction

    def enlist(self, connection: Any) -> EnlistedTransaction:
        """The outbox inside the caller's own transaction. Raises UsageError for what is not a psycopg AsyncConnection in one."""
        return EnlistedTransaction(connection, where=self._pool.where, limit_s=self._limit_s)

    async def check(self) -> None:
        needs = "usage on schema orderbus and select on orderbus.schema_version"
        async with (
            self._pool.connection() as connection,
            _permitted(self._pool.where, needs),
            limited(self._pool.where, self._limit_s),
        ):
            await schema.check(connection)

    async def apply_schema(self) -> list[int]:
        """Bring the database to this library's schema version; which versions were applied."""
        needs = "create on the database, or what owns the schema orderbus where that is there already"
        async with (
            self._pool.connection(is_kept=False) as connection,
            _permitted(self._pool.where, needs),
            limited(self._pool.where, self._limit_s),
        ):
            return await schema.apply(connection)

    async def maintain(self, window_s: float) -> None:
        """Never waits long for a lock: what could not be done now is left for the next call. Two callers do not collide.

        A step that fails keeps none of the others from being taken; then it raises. Raises UsageError where the role does not own
        the inbox, as one with few rights does not: its owner has to do it.
        """
        failures: list[Exception] = []
        try:
            await self._keep_windows()
        except (UnavailableError, psycopg.Error) as error:
            failures.append(error)
        async with (
            self._pool.connection(is_kept=False) as connection,
            _permitted(self._pool.where, "what owns the schema orderbus"),
        ):
            async with self._ours():
                await _require_ownership(connection, self._pool.where)
                is_mine = await _try_lock(connection)
            if is_mine:
                failures += await self._keep_up(connection, window_s)
            for failure in failures[1:]:
                log.warning("the upkeep of inbox and outbox waits for the next hour: %s", failure)
            if failures:
                raise failures[0]

    async def _keep_up(self, connection: Connection, window_s: float) -> list[Exception]:
        """What failed."""
        failures: list[Exception] = []
        steps: list[tuple[Callable[[], Awaitable[Any]], float]] = [
            (partial(create_partitions, connection), VALIDATION_S),
            (partial(drop_partitions, connection, window_s), self._limit_s),
            (partial(promote_orphans, connection), self._limit_s),
            (partial(clean_default_partition, connection, window_s), self._limit_s),
        ]
        for step, limit_s in steps:
            try:
                async with limited(self._pool.where, limit_s, is_ours=True):
                    await step()
            except (UnavailableError, psycopg.Error) as error:
                failures.append(error)
                if connection.info.transaction_status is not TransactionStatus.IDLE:
                    return failures  # it is lost, and the lock with it
        async with self._ours():
            await connection.execute(_UNLOCK)
        return failures

    async def _keep_windows(self) -> None:
        if self._numbers:
            async with self._pool.connection() as connection, self._ours():
                await inbox_table.keep_windows(connection, list(self._numbers), self._window_s)

    def _ours(self) -> AbstractAsyncContextManager[None]:
        return limited(self._pool.where, self._limit_s, is_ours=True)

    async def _know(self, entries: Sequence[InboxEntry]) -> None:
        """Learn the numbers of consumers met for the first time: as many as there are handlers."""
        unknown = {entry.consumer for entry in entries}.difference(self._numbers)
        if unknown:
            async with self._pool.connection() as connection, limited(self._pool.where, self._limit_s):
                self._numbers.update(await inbox_table.number_consumers(connection, sorted(unknown), self._window_s))


@asynccontextmanager
async def _permitted(where: str, needs: str) -> AsyncIterator[None]:
    try:
        yield
    except errors.InsufficientPrivilege as error:
        text = str(error).strip().splitlines()[0]
        raise UsageError(f"{where}: {text}; the role needs {needs}", code="OB504") from None


async def _require_ownership(connection: Any, where: str) -> None:
    row = await (await connection.execute(_IS_OWNER)).fetchone()
    if not row[0]:
        raise UsageError(
            f"{where}: the role {row[1]} does not own orderbus.inbox; let its owner run `orderbus schema upkeep` daily",
            code="OB504",
        )


_IS_OWNER = """\
select pg_has_role(current_user, relowner, 'usage'), current_user
from pg_class where oid = 'orderbus.inbox'::regclass"""

_TRY_LOCK = "select pg_try_advisory_lock(hashtextextended('orderbus.maintain', 0))"
_UNLOCK = "select pg_advisory_unlock(hashtextextended('orderbus.maintain', 0))"


async def _try_lock(connection: Any) -> bool:
    row = await (await connection.execute(_TRY_LOCK)).fetchone()
    return bool(row[0])
