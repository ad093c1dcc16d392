"""Every statement of the hot path finds its rows by an index, on tables of a million rows.

The statements are those that are really run, with their parameters, at first planned anew and then, where the server thinks
it better, by a plan that was cached: auto_explain tells the plan of each, with the rows and the blocks that it touched.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orderbus import Batch, Bus, Delivery, Event, Settings, new_id
from orderbus._core.delivery import Item
from orderbus._core.outbox import Floor
from orderbus.abc import MOST_COUNTED, InboxEntry, OutboxRow, Stuck, Verdict
from orderbus.adapters.postgres import PostgresStore, open_store
from services import aggregator, inventory, payment
from services.orders_api import idempotency, orders
from services.orders_api.orders import NewLine, NewOrder
from services.shared import database
from services.shared.events import Line, OrderCancelled, OrderPlaced, PaymentAuthorized, StockReserved
from tests.postgres.conftest import ALL, emit, row
from tests.postgres.million import CONSUMER, DUE, FIRST_ID, LAST_ID, MILLION, OLD_KEYS, customer_id, fill, handled_id, order_id
from tests.postgres.plans import blocks, looked_at, nodes, shown
from tests.postgres.wire import Wire, open_postgres_wire

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

RUNS = 8
"""From its sixth run on, a prepared statement may go by a plan that knows no parameters."""
MANY = 100
PLENTY = 1 << 30
BLOCKS_A_ROW = 60
"""For 100 rows 6,000 and a few: less than any table of a million rows has."""
LARGE = 100_000
"""A table of so many rows is not read from one end to the other."""


class Large(NamedTuple):
    url: str
    tables: frozenset[str]


@pytest.fixture(scope="module")
def large(postgres_url: str) -> Iterator[Large]:
    """A database of this module's own, with a million rows in each table. Tests take from it, but no test takes much."""
    name = f"orderbus_test_{secrets.token_hex(6)}"
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    with psycopg.connect(postgres_url, autocommit=True) as server:
        with_auto_explain(postgres_url)
        server.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        fill(url)
        with psycopg.connect(url) as connection:
            tables = connection.execute(
                "select relname from pg_class where reltuples > %s and relkind = 'r'", (LARGE,)
            ).fetchall()
        yield Large(url, frozenset(table for (table,) in tables))
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
async def wire(large: Large) -> AsyncIterator[Wire]:
    """The way to the large tables; it keeps the plan of every statement."""
    async with open_postgres_wire(with_auto_explain(large.url)) as wire:
        yield wire


@pytest.fixture
async def store(wire: Wire) -> AsyncIterator[PostgresStore]:
    async with open_store(wire.url, name="tests") as store:
        yield store


@pytest.fixture
async def bus(large: Large, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bus]:
    """An open bus that maintains nothing: its lock is held. The functions of the Orders API use it."""
    bus = Bus("tests", settings=Settings(broker_url=f"memory://{secrets.token_hex(6)}", database_url=wire.url, relay=False))
    monkeypatch.setattr(orders, "bus", bus)
    with psycopg.connect(large.url, autocommit=True) as beside:
        beside.execute("select pg_advisory_lock(hashtextextended('orderbus.maintain', 0))")
        async with bus:
            await wire.executed("pg_try_advisory_lock")
            yield bus


# The relay


@pytest.mark.parametrize("floor", [0, FIRST_ID + MILLION // 2])
@pytest.mark.parametrize("buckets", [ALL, range(16), [7]], ids=["all buckets", "a quarter", "one bucket"])
async def test_a_page_of_the_outbox(large: Large, wire: Wire, store: PostgresStore, buckets: Sequence[int], floor: int) -> None:
    """Of 64 buckets, those of other relays are read over."""

    async def read(run: int) -> None:
        assert len((await store.outbox.read(buckets, floor, MANY, PLENTY)).rows) == MANY

    await check_runs(large, wire, read, rows=MANY, read=MANY * 64 // len(buckets) + MANY)


@pytest.mark.parametrize("floor", [0, FIRST_ID + MILLION // 2])
async def test_a_backlog_is_counted_no_further_than_it_says(large: Large, wire: Wire, store: PostgresStore, floor: int) -> None:
    async def count(run: int) -> None:
        assert (await store.outbox.backlog(ALL, floor)).waiting == MOST_COUNTED

    await check_runs(large, wire, count, rows=MOST_COUNTED)


async def test_published_rows_are_deleted(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def delete(run: int) -> None:
        page = await store.outbox.read(ALL, FIRST_ID + 100_000, MANY, PLENTY)
        await store.outbox.delete(page.rows)

    await check_runs(large, wire, delete, rows=MANY)


@pytest.mark.parametrize("buckets", [ALL, range(16), [7]], ids=["all buckets", "a quarter", "one bucket"])
async def test_what_is_due(large: Large, wire: Wire, store: PostgresStore, buckets: Sequence[int]) -> None:
    """What is due in the buckets of other relays is read over."""

    async def due(run: int) -> None:
        assert len(await store.outbox.due(buckets, MANY, 1 << 30)) == MANY

    await check_runs(large, wire, due, rows=MANY, read=DUE)


async def test_stuck_rows_are_tried_again_and_published(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def try_again(run: int) -> None:
        due = await store.outbox.due(ALL, MANY, 1 << 30)
        await store.outbox.set_aside([Stuck(row, "unroutable", 3600.0) for row in due[1::2]])
        await store.outbox.delete(due[::2])

    await check_runs(large, wire, try_again, rows=MANY, read=8 * MANY)


async def test_rows_that_can_not_be_published_are_set_aside(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def set_aside(run: int) -> None:
        page = await store.outbox.read(ALL, FIRST_ID + 200_000, MANY, PLENTY)
        await store.outbox.set_aside([Stuck(row, "unroutable", 3600.0) for row in page.rows])

    await check_runs(large, wire, set_aside, rows=MANY)


async def test_rows_of_stuck_keys_are_moved_behind_them(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def emit_and_read(run: int) -> None:
        floor = (await store.outbox.read(ALL, LAST_ID, 1, PLENTY)).last_id
        await emit(store, [row(n, f"stuck-{200_000 + n}") for n in range(MANY)])
        assert (await store.outbox.read(ALL, floor, MANY, PLENTY)).rows == []

        assert any("'behind'" in statement for statement in wire.statements)

    await check_runs(large, wire, emit_and_read, rows=MANY)


async def test_a_lease(large: Large, wire: Wire, store: PostgresStore) -> None:
    await check_runs(large, wire, lambda run: store.outbox.lease("relay", 30, None), rows=64)


async def test_plans_that_were_cached_while_the_outbox_was_empty_serve_a_backlog_and_what_it_leaves_behind(
    database_url: str,
) -> None:
    """A million rows that an old snapshot holds, though they are deleted, cost a read nothing once its floor has passed them."""
    large = Large(database_url, frozenset({"outbox"}))
    async with (
        open_postgres_wire(with_auto_explain(database_url)) as wire,
        open_store(wire.url, name="tests") as store,
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as beside,
        await psycopg.AsyncConnection.connect(database_url) as old,
    ):
        await store.apply_schema()
        floor = Floor()
        await beside.execute("alter table orderbus.outbox set (autovacuum_enabled = off), set unlogged")

        async def relay(run: int) -> list[OutboxRow]:
            page = await store.outbox.read(ALL, floor.value, MANY, PLENTY)
            floor.read(xmin=page.xmin, last_id=page.last_id, lowest_id=page.rows[0].id if page.rows else None)
            if page.rows:
                mark = floor.mark()
                floor.deleted(mark, await store.outbox.delete(page.rows))
            return list(page.rows)

        async def emit_and_relay(run: int) -> None:
            await emit(store, [row(run)])
            assert len(await relay(run)) == 1

        await check_runs(large, wire, emit_and_relay, rows=1)
        await old.execute("set transaction isolation level repeatable read")
        await old.execute("select count(*) from orderbus.outbox")
        await beside.execute(BACKLOG, (MILLION,))

        await check_runs(large, wire, relay, rows=MANY)

        await beside.execute("delete from orderbus.outbox")
        async with asyncio.timeout(60):  # other databases of this server have transactions, too
            while floor.value <= MILLION:
                wire.clear()
                await emit_and_relay(0)
        assert max(blocks(plan["Plan"]) for plan in wire.plans) > BLOCKS_A_ROW * MANY, "the dead rows are not there"

        await check_runs(large, wire, emit_and_relay, rows=1)


# Transactions


async def test_events_of_a_transaction(large: Large, wire: Wire, store: PostgresStore) -> None:
    later_ms = int((datetime.now(UTC) + timedelta(days=365)).timestamp() * 1000)

    async def emit_now_and_later(run: int) -> None:
        await emit(store, [row(n) for n in range(MANY)] + [row(n, due_at_ms=later_ms) for n in range(MANY)])

    await check_runs(large, wire, emit_now_and_later, rows=MANY)


async def test_messages_that_are_new(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def handle(run: int) -> None:
        transaction = await store.begin([InboxEntry(new_id(), CONSUMER, n) for n in range(MANY)])
        assert set(transaction.verdicts) == {Verdict.NEW}
        await transaction.commit([], [])

    await check_runs(large, wire, handle, rows=MANY)


async def test_messages_that_were_handled_before(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def handle(run: int) -> None:
        numbers = range(run * MANY + 1, (run + 1) * MANY + 1)
        transaction = await store.begin([InboxEntry(handled_id(n), CONSUMER, n) for n in numbers])
        assert set(transaction.verdicts) == {Verdict.DUPLICATE}
        await transaction.rollback()

    await check_runs(large, wire, handle, rows=MANY)


async def test_messages_that_are_put_off(large: Large, wire: Wire, store: PostgresStore) -> None:
    async def handle(run: int) -> None:
        entries = [InboxEntry(new_id(), CONSUMER, n) for n in range(MANY)]
        transaction = await store.begin(entries)
        await transaction.commit([], [], entries)

    await check_runs(large, wire, handle, rows=MANY)


# Maintenance


async def test_maintenance_drops_an_old_partition_and_reads_no_table_but_that_of_the_stuck_rows(
    large: Large, wire: Wire, store: PostgresStore
) -> None:
    """Once an hour, what is stuck behind nothing is looked for among all that is stuck."""
    await store.maintain(7 * 86_400)

    assert any("drop table" in statement for statement in wire.statements), str(wire)
    check(Large(large.url, large.tables - {"stuck"}), wire, rows=MANY, unless="update orderbus.stuck")


# The services


async def test_orders_are_placed(large: Large, wire: Wire, bus: Bus) -> None:
    async def place(run: int) -> None:
        keys = [(secrets.token_hex(8), "fingerprint") if n % 2 else None for n in range(MANY)]
        await asyncio.gather(*(orders.place(new_id(), NEW_ORDER, key) for key in keys))

    await check_runs(large, wire, place, rows=MANY)


async def test_an_order_is_looked_up(large: Large, wire: Wire, bus: Bus) -> None:
    async def look_up(run: int) -> None:
        assert (await orders.get(order_id(run + 1))).status == "confirmed"

    await check_runs(large, wire, look_up, rows=1)


async def test_an_idempotency_key_is_looked_up(large: Large, wire: Wire, bus: Bus) -> None:
    async def look_up(run: int) -> None:
        assert await orders.placed_under(f"key-{MILLION - run}") is not None

    await check_runs(large, wire, look_up, rows=1)


async def test_a_customers_orders_are_listed(large: Large, wire: Wire, bus: Bus) -> None:
    async def two_pages(run: int) -> None:
        first = await orders.of_customer(customer_id(1), 40, None)
        second = await orders.of_customer(customer_id(1), 40, first.next)
        assert len(first.orders) == len(second.orders) == 40

    await check_runs(large, wire, two_pages, rows=41, read=100)


Handler = Callable[..., Awaitable[Any]]
HANDLERS: dict[str, tuple[Handler, type[Event]]] = {
    "payment authorizes": (payment.authorize, OrderPlaced),
    "payment refunds": (payment.refund, OrderCancelled),
    "inventory reserves": (inventory.reserve, OrderPlaced),
    "inventory releases": (inventory.release, OrderCancelled),
    "aggregator, of payment": (aggregator.answered, PaymentAuthorized),
    "aggregator, of stock": (aggregator.answered, StockReserved),
}


@pytest.mark.parametrize(("handler", "kind"), HANDLERS.values(), ids=HANDLERS.keys())
@pytest.mark.parametrize("known", [True, False], ids=["known orders", "new orders"])
async def test_a_batch_of_a_service(large: Large, wire: Wire, bus: Bus, handler: Handler, kind: type[Event], known: bool) -> None:
    """Half of the orders want goods that there are not."""
    rest = (payment.Rules(),) if handler is payment.authorize else ()

    async def handle(run: int) -> None:
        ids = [order_id(MILLION - run * MANY - n) if known else new_id() for n in range(MANY)]
        async with bus.transaction() as tx:
            await handler(Batch([Item(event_of(kind, n, one), DELIVERY) for n, one in enumerate(ids)]), tx, *rest)

    await check_runs(large, wire, handle, rows=MANY)


async def test_overdue_orders_are_cancelled(large: Large, wire: Wire, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregator, "bus", bus)

    async def cancel(run: int) -> None:
        before = bus.stats.emitted
        await aggregator.cancel_overdue(aggregator.Deadline())
        assert bus.stats.emitted == before + 500

    await check_runs(large, wire, cancel, rows=500)


async def test_old_idempotency_keys_are_forgotten(large: Large, wire: Wire, bus: Bus) -> None:
    async def forget(run: int) -> None:
        async with bus.transaction() as tx:
            await idempotency.forget_old(tx)

    await check_runs(large, wire, forget, rows=idempotency.MOST_FORGOTTEN)


async def test_new_idempotency_keys_in_the_place_of_old_ones_are_not_looked_at(large: Large, wire: Wire, bus: Bus) -> None:
    async def forget(run: int) -> None:
        async with bus.transaction() as tx:
            await idempotency.forget_old(tx)

    for run in range(1 + OLD_KEYS // idempotency.MOST_FORGOTTEN):
        await forget(run)
    async with await psycopg.AsyncConnection.connect(large.url, autocommit=True) as beside:
        await beside.execute("vacuum idempotency_key")
        await beside.execute(NEW_KEYS, (OLD_KEYS,))

    await check_runs(large, wire, forget, rows=MANY)


# What the tests share


NEW_ORDER = NewOrder(customer_id=UUID(int=1), lines=(NewLine(sku=database.sku(1), quantity=1, unit_cents=1_000),))
DELIVERY = Delivery(id=UUID(int=1), topic="", key=None, attempt=1, headers={}, deadline=0.0)

BACKLOG = """\
insert into orderbus.outbox (event_id, bucket, topic, key, body, content_type, headers, unrouted)
select gen_random_uuid(), n %% 64, 'orders.placed', 'key-' || n, '', 'application/json', '{}', 'keep' from generate_series(1, %s) n"""


NEW_KEYS = """\
insert into idempotency_key (key, fingerprint, order_id)
select 'new-' || n, 'fingerprint', gen_random_uuid() from generate_series(1, %s) n"""


def event_of(kind: type[Event], number: int, order_id: UUID) -> Event:
    known = {
        "order_id": order_id,
        "customer_id": UUID(int=1),
        "total_cents": 1_000,
        "amount_cents": 1_000,
        "lines": (Line(sku=database.sku(number % 10 + 1) if number % 2 else "nothing", quantity=1, unit_cents=1_000),),
        "reason": "deadline",
    }
    return kind(**{field: known[field] for field in kind.__struct_fields__})


def with_auto_explain(url: str) -> str:
    """The same server, asked to tell its plans. Where it can't, the test is skipped, and says so."""
    options = {
        "session_preload_libraries": "auto_explain",
        "auto_explain.log_min_duration": 0,
        "auto_explain.log_analyze": "on",
        "auto_explain.log_timing": "off",
        "auto_explain.log_buffers": "on",
        "auto_explain.log_format": "json",
        "auto_explain.log_level": "notice",
    }
    told = make_conninfo(url, options=" ".join(f"-c {name}={value}" for name, value in options.items()))
    try:
        psycopg.connect(told).close()
    except psycopg.Error as error:
        if os.environ.get("CI"):
            pytest.fail(f"the server can't load auto_explain, and CI may not skip: {error}", pytrace=False)
        pytest.skip(f"SERVER MISSING: PostgreSQL with auto_explain, as a superuser: {error}")
    return told


async def check_runs(
    large: Large, wire: Wire, operation: Callable[[int], Awaitable[object]], *, rows: int, read: int | None = None
) -> None:
    """Run an operation until its plans are cached, and look at what each run did: see `check`."""
    for run in range(RUNS):
        wire.clear()
        await operation(run)
        check(large, wire, rows=rows, read=read)


def check(large: Large, wire: Wire, *, rows: int, read: int | None = None, unless: str = "\0") -> None:
    """No statement may read a large table as a whole, or touch much more than the `rows` that it is about.

    `read` is how many rows of a table may be looked at to find those; `unless` exempts statements with these words from all.
    """
    read = 2 * rows if read is None else read
    assert wire.plans, "auto_explain told no plan"
    for plan in wire.plans:
        if unless in plan["Query Text"]:
            continue
        told = f"{plan['Query Text']}\n{shown(plan['Plan'])}"
        for node in nodes(plan["Plan"]):
            if node.get("Relation Name") in large.tables:
                assert node["Node Type"] != "Seq Scan" or not node["Actual Loops"], (
                    f"reads all of {node['Relation Name']}:\n{told}"
                )
                assert looked_at(node) <= read, f"looks at {looked_at(node)} rows to find {rows}:\n{told}"
        touched = blocks(plan["Plan"])
        assert touched <= BLOCKS_A_ROW * (rows + 5), f"touches {touched} blocks for {rows} rows:\n{told}"
