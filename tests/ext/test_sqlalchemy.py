"""SQLAlchemy's own sessions and connections with the outbox, and its sessions inside a handler's transaction; on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from orderbus import Bus, Event, Retry, Settings, TransientError, Tx, UnavailableError, UsageError
from orderbus.ext.sqlalchemy import Sessions, enlist

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

Database = psycopg.Connection[Any]


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payment"
    number: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]


class Placed(Event, topic="orders.placed", key="number"):
    number: int


class Paid(Event, topic="orders.paid", key="number", unrouted="drop"):
    number: int


@pytest.fixture
def bus(module_url: str, db: Database) -> Bus:
    """Without a relay, so that what was emitted stays to be seen."""
    return Bus("shop", settings=Settings(broker_url="memory://", database_url=module_url, relay=False, pool_size=1))


@pytest.fixture
async def engine(module_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(module_url.replace("postgresql://", "postgresql+psycopg://"))
    yield engine
    await engine.dispose()


def payments(db: Database) -> list[tuple[int, int]]:
    return db.execute("select number, cents from payment order by number").fetchall()


def emitted(db: Database) -> list[str | None]:
    return [key for (key,) in db.execute("select key from orderbus.outbox order by id").fetchall()]


async def test_an_event_goes_into_the_outbox_with_the_sessions_own_commit(bus: Bus, engine: AsyncEngine, db: Database) -> None:
    async with bus, AsyncSession(engine) as session:
        session.add(Payment(number=1, cents=500))
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=1))
        before = payments(db), emitted(db)
        await session.commit()

    assert before == ([], [])
    assert payments(db) == [(1, 500)]
    assert emitted(db) == ["1"]


async def test_the_session_is_flushed_before_the_event_gets_its_place_in_the_order(
    bus: Bus, engine: AsyncEngine, db: Database
) -> None:
    db.execute("create function emitted_before() returns bigint return (select count(*) from orderbus.outbox)")
    db.execute("alter table payment add emitted_before bigint default emitted_before()")

    async with bus, AsyncSession(engine) as session:
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=1))
            session.add(Payment(number=1, cents=500))
        await session.commit()

    assert db.execute("select emitted_before from payment").fetchall() == [(0,)]
    assert emitted(db) == ["1"]


@pytest.mark.parametrize("where", ["inside", "at the flush", "after"])
async def test_a_session_that_rolls_back_leaves_no_ghost(bus: Bus, engine: AsyncEngine, db: Database, where: str) -> None:
    async def fail(session: AsyncSession) -> None:
        session.add(Payment(number=1, cents=-1 if where == "at the flush" else 1))
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=1))
            if where == "inside":
                raise KeyError
        raise KeyError

    async with bus, AsyncSession(engine) as session:
        with pytest.raises(IntegrityError if where == "at the flush" else KeyError):
            await fail(session)

    assert payments(db) == []
    assert emitted(db) == []


async def test_a_savepoint_that_is_undone_takes_its_events_along(bus: Bus, engine: AsyncEngine, db: Database) -> None:
    async with bus, AsyncSession(engine) as session:
        savepoint = await session.begin_nested()
        session.add(Payment(number=1, cents=1))
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=1))
        await savepoint.rollback()
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=2))
        await session.commit()

    assert payments(db) == []
    assert emitted(db) == ["2"]


async def test_a_connection_that_had_not_begun_is_begun_so_that_its_commit_commits_the_event(
    bus: Bus, engine: AsyncEngine, db: Database
) -> None:
    async with bus, engine.connect() as connection:
        async with enlist(bus, connection) as tx:
            tx.emit(Paid(number=1))
            tx.defer("insert into payment (number, cents) values (%s, %s)", (1, 500))
        await connection.commit()
        async with enlist(bus, connection) as tx:
            tx.emit(Paid(number=2))

    assert payments(db) == [(1, 500)]
    assert emitted(db) == ["1"]


async def test_a_commit_inside_of_the_block_is_refused_and_writes_to_nobody_elses_transaction(
    bus: Bus, engine: AsyncEngine, db: Database
) -> None:
    async def commit_inside(session: AsyncSession) -> None:
        async with enlist(bus, session) as tx:
            tx.emit(Paid(number=1))
            await session.commit()

    async with bus, AsyncSession(engine) as session:
        with pytest.raises(UsageError, match=r"ended inside of enlist.*commit after the block"):
            await commit_inside(session)
        await session.commit()

    assert emitted(db) == []


async def test_another_driver_is_refused(bus: Bus, module_url: str) -> None:
    engine = create_async_engine(module_url.replace("postgresql://", "postgresql+asyncpg://"))

    async with bus, AsyncSession(engine) as session:
        with pytest.raises(UsageError, match=r"not postgresql\+asyncpg; make its engine with .*postgresql\+psycopg://"):
            await enlist(bus, session).__aenter__()
    await engine.dispose()


async def test_autocommit_and_what_is_not_sqlalchemys_are_refused(bus: Bus, engine: AsyncEngine) -> None:
    async with bus, engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        with pytest.raises(UsageError, match=r"AUTOCOMMIT.*leave isolation_level out"):
            await enlist(bus, connection).__aenter__()
        not_ours: Any = engine
        with pytest.raises(UsageError, match="takes SQLAlchemy's AsyncSession or AsyncConnection, not AsyncEngine"):
            await enlist(bus, not_ours).__aenter__()


async def test_a_handlers_own_session_needs_not_be_enlisted(bus: Bus, db: Database) -> None:
    sessions = Sessions()

    async with bus, bus.transaction() as tx, sessions(tx) as session:
        with pytest.raises(UsageError, match="on the transaction of a handler's tx already; emit with that"):
            await enlist(bus, session).__aenter__()


# A session on a handler's transaction


async def test_a_handlers_session_commits_with_its_inbox_row_and_its_event(bus: Bus, db: Database) -> None:
    sessions = Sessions()
    handled = anyio.Event()

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> Paid:
        async with sessions(tx) as session:
            session.add(Payment(number=order.number, cents=500))
        handled.set()
        return Paid(number=order.number)

    await publish_until(bus, handled)

    assert payments(db) == [(1, 500)]
    assert emitted(db) == ["1"]
    assert db.execute("select count(*) from orderbus.inbox").fetchone() == (1,)


async def test_a_handler_that_fails_after_its_session_leaves_nothing_of_the_try_that_failed(bus: Bus, db: Database) -> None:
    sessions = Sessions()
    handled = anyio.Event()
    tries: list[int] = []

    @bus.on(Placed, retry=Retry.exponential(first=0.01, attempts=3))
    async def pay(order: Placed, tx: Tx) -> Paid:
        tries.append(len(tries))
        async with sessions(tx) as session:
            session.add(Payment(number=len(tries), cents=500))
            await session.commit()
        if len(tries) == 1:
            raise ConnectionResetError
        handled.set()
        return Paid(number=order.number)

    await publish_until(bus, handled)

    assert payments(db) == [(2, 500)]
    assert emitted(db) == ["1"]


async def test_what_a_session_undoes_is_undone_and_the_rest_of_the_transaction_stays(bus: Bus, db: Database) -> None:
    sessions = Sessions()

    async with bus, bus.transaction() as tx:
        await tx.execute("insert into payment (number, cents) values (1, 1)")
        with pytest.raises(IntegrityError):
            async with sessions(tx) as session:
                session.add_all([Payment(number=2, cents=2), Payment(number=3, cents=-3)])
        async with sessions(tx) as session:
            session.add(Payment(number=4, cents=4))
            await session.rollback()
            kept = Payment(number=5, cents=5)
            session.add(kept)
            assert list(await session.scalars(select(Payment.number).order_by(Payment.number))) == [1, 5]
        tx.emit(Paid(number=kept.number))

    assert payments(db) == [(1, 1), (5, 5)]
    assert emitted(db) == ["5"]


@pytest.mark.parametrize("end", [AsyncConnection.commit, AsyncConnection.rollback])
async def test_the_end_of_a_handlers_transaction_is_not_the_sessions(bus: Bus, db: Database, end: Any) -> None:
    sessions = Sessions()

    async def write() -> None:
        async with bus.transaction() as tx, sessions(tx) as session:
            session.add(Payment(number=1, cents=1))
            await session.flush()
            await end(await session.connection())

    async with bus:
        with pytest.raises(UsageError, match=r"which is orderbus's to do; use session\.commit\(\) and session\.rollback"):
            await write()

    assert payments(db) == []


async def test_the_connection_is_as_good_as_before_after_many_sessions(bus: Bus, db: Database) -> None:
    sessions = Sessions()

    async with bus:
        for number in range(5):
            async with bus.transaction() as tx:
                async with sessions(tx) as session:
                    session.add(Payment(number=number, cents=1))
                tx.defer_row("insert into payment select * from unnest(%s::int[], %s::int[])", (number + 100, 1))
                tx.emit(Paid(number=number))
                lent = tx.connection
        assert lent.autocommit
        assert lent._notice_handlers == []

    assert len(payments(db)) == 10
    assert len(emitted(db)) == 5


async def test_a_session_cut_off_by_the_handlers_time_limit_leaves_the_connection_to_the_next(bus: Bus, db: Database) -> None:
    sessions = Sessions()

    async def too_slow() -> None:
        with anyio.fail_after(0.2):
            async with bus.transaction() as tx, sessions(tx) as session:
                session.add(Payment(number=1, cents=1))
                await session.execute(text("select pg_sleep(20)"))

    async with bus:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await too_slow()
        async with bus.transaction() as tx, sessions(tx) as session:
            session.add(Payment(number=2, cents=2))

    assert payments(db) == [(2, 2)]


async def test_a_clash_and_a_lost_server_are_orderbus_errors_so_that_they_do_not_count_as_a_try(bus: Bus, db: Database) -> None:
    sessions = Sessions()

    async def clash(sql: str) -> None:
        async with bus.transaction() as tx, sessions(tx) as session:
            await session.execute(text(sql))

    db.execute("insert into payment (number, cents) values (1, 1)")
    async with bus:
        with db.transaction():
            db.execute("select * from payment for update")
            with pytest.raises(TransientError, match=r"^PostgreSQL at .*could not obtain lock"):
                await clash("select * from payment for update nowait")
        with pytest.raises(UnavailableError, match="terminating connection"):
            await clash("select pg_terminate_backend(pg_backend_pid())")
        await clash("select 1")


async def publish_until(bus: Bus, handled: anyio.Event) -> None:
    """Open the bus, publish one order, and close it when its handler says so."""
    async with bus:
        await bus.publish(Placed(number=1))
        with anyio.fail_after(20):
            await handled.wait()
