"""Tables of a million rows: those of orderbus and those of the services, as a long life or a long outage leaves them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import anyio
import psycopg
from psycopg import sql

from orderbus.adapters.postgres import open_store
from orderbus.adapters.postgres.partitions import partition_bounds
from services.shared import database

__all__ = [
    "CONSUMER",
    "DUE",
    "FIRST_ID",
    "LAST_ID",
    "MILLION",
    "OLD_KEYS",
    "PENDING",
    "customer_id",
    "fill",
    "handled_id",
    "order_id",
]

MILLION = 1_000_000
FIRST_ID, LAST_ID = MILLION + 1, 2 * MILLION
"""Of the outbox. The stuck rows came before."""
DUE = 10_000
"""So many scheduled rows are due, and so many stuck ones: those with the lowest ids."""
PENDING = 10_000
"""So many orders are pending for longer than they may: the last ones."""
OLD_KEYS = 60_000
"""So many idempotency keys are old enough to be forgotten: the first ones."""
CONSUMER = "million"

Connection = psycopg.Connection[Any]


def customer_id(number: int) -> UUID:
    """The id of a customer with a hundred orders, 0 ≤ number < 10,000."""
    return UUID(int=4096 + number)


def order_id(number: int) -> UUID:
    """The id of an order, 1 ≤ number ≤ a million."""
    return UUID(f"{ORDERS}{_TAIL + number:x}")


def handled_id(number: int) -> UUID:
    """The id of an event of today that `CONSUMER` has handled, 1 ≤ number ≤ a million."""
    return UUID(f"{_day_prefix(_days_ago(0))}{_TAIL + number:x}")


def fill(url: str) -> None:
    """Make all tables in an empty database, and fill them."""
    anyio.run(database.prepare, url, database.Stock(articles=100))
    anyio.run(_make_partitions, url)
    with ThreadPoolExecutor(max_workers=2) as writers:
        for done in [writers.submit(_fill, url, table, rows) for table, rows in _rows().items()]:
            done.result()
    with psycopg.connect(url) as connection:
        connection.execute("select setval('orderbus.outbox_id_seq', %s)", (LAST_ID,))


def _rows() -> dict[str, str]:
    """The columns of each table and what is in them, `n` being the number of the row. What only maintenance reads has fewer."""
    today, old = _days_ago(0), _days_ago(20)
    n, fewer = f"from generate_series(1, {MILLION}) n", f"from generate_series(1, {MILLION // 5}) n"
    keys = "event_id, bucket, topic, key, body, content_type, headers, unrouted"
    order = _uuid(ORDERS)
    event = f"{order}, n % 64, 'orders.placed', 'key-' || n, '\\x7b7d'::bytea, 'application/json', '{{}}'::json, 'keep'"
    return {
        "orders": f"""(order_id, customer_id, total_cents, lines, status, placed_at, stored_at)
            select {order}, ('{"0" * 28}' || to_hex(4096 + n % 10000))::uuid, 1000, '[]'::jsonb,
                case when n <= {MILLION - PENDING} then 'confirmed' else 'pending' end,
                at, at {n}, lateral (select now() - interval '10 min' - ({MILLION} - n) * interval '10 ms' as at) placed""",
        # Four of each key: the first waits for its next try, the others stay behind it.
        "orderbus.stuck": f"""(id, {keys}, created_at, reason, attempts, first_at, last_at, next_try_at, is_behind)
            select n, {event.replace("'key-' || n", "'stuck-' || n % 250000")}, now(), 'unroutable', 1, now(), now(),
                case when n <= 250000 then now() + (n - {DUE}) * interval '1 s' end, n > 250000 {n}""",
        "orderbus.outbox": f"(id, {keys}) select {MILLION} + n, {event} {n}",
        "orderbus.scheduled": f"(due_at, {keys}) select now() + (n - {DUE}) * interval '1 s', {event} {n}",
        "idempotency_key": f"""(key, fingerprint, order_id, created_at)
            select 'key-' || n, 'fingerprint', {order}, now() - interval '1 day' + (n - {OLD_KEYS}) * interval '80 ms' {n}""",
        _partition(today): f"(event_id, consumer, body_hash) select {_uuid(_day_prefix(today))}, 1, n {n}",
        "payment": f"(order_id, state) select {order}, 'authorized' {n}",
        "reservation": f"""(order_id, state, pieces) select {order}, 'held', '{{"{database.sku(1)}": 1}}'::jsonb {n}""",
        _partition(old): f"""(event_id, consumer, body_hash, handled_at)
            select {_uuid(_day_prefix(old))}, 1, n, now() - interval '20 days' {fewer}""",
        "orderbus.inbox_default": f"(event_id, consumer, body_hash) select {_uuid('f' * 16)}, 1, n {fewer}",
    }


def _fill(url: str, table: str, rows: str) -> None:
    options = "-c maintenance_work_mem=256MB -c synchronous_commit=off -c statement_timeout=0"
    with psycopg.connect(url, autocommit=True, options=options) as connection:
        with _without_indexes(connection, table):
            connection.execute(f"insert into {table} {rows}".encode())
        connection.execute(sql.SQL("analyze {}").format(_name(table)))


@contextmanager
def _without_indexes(connection: Connection, table: str) -> Iterator[None]:
    """A fifth of the time: the table's indexes are made again when its rows are there, and its log is spared."""
    name = _name(table)
    bounds = _all(connection, _BOUNDS, table)
    indexes, keys = _all(connection, _INDEXES, table), _all(connection, _KEYS, table)
    for parent, _ in bounds:
        connection.execute(sql.SQL("alter table {} detach partition {}").format(_name(parent), name))
    connection.execute(sql.SQL("alter table {} set unlogged").format(name))
    for index, _ in indexes:
        connection.execute(sql.SQL("drop index {}").format(_name(index)))
    for key, _ in keys:
        connection.execute(sql.SQL("alter table {} drop constraint {}").format(name, sql.Identifier(key)))
    yield
    for _, definition in keys:
        connection.execute(sql.SQL("alter table {} add {}").format(name, sql.SQL(definition)))
    for _, definition in indexes:
        connection.execute(definition)
    for parent, bound in bounds:
        connection.execute(sql.SQL("alter table {} attach partition {} {}").format(_name(parent), name, sql.SQL(bound)))


_BOUNDS = """\
select inhparent::regclass::text, pg_get_expr(relpartbound, pg_class.oid)
from pg_class join pg_inherits on inhrelid = pg_class.oid where pg_class.oid = %s::regclass"""

_INDEXES = """\
select indexrelid::regclass::text, pg_get_indexdef(indexrelid)
from pg_index where indrelid = %s::regclass and not indisprimary"""

_KEYS = "select conname, pg_get_constraintdef(oid) from pg_constraint where conrelid = %s::regclass and contype = 'p'"


async def _make_partitions(url: str) -> None:
    """Of today and the days to come by maintenance, and that of a day long past; and a name for the consumer with the number 1."""
    old = _days_ago(20)
    first, next_first = partition_bounds(old)
    async with open_store(url, name="million") as store:
        await store.maintain(7 * 86_400)
        transaction = await store.begin()
        await transaction.execute("insert into orderbus.consumer (name) values (%s)", (CONSUMER,))
        await transaction.execute(
            f"create table {_partition(old)} partition of orderbus.inbox for values from ('{first}') to ('{next_first}')", ()
        )
        await transaction.commit([], [])


ORDERS = "0" * 12 + "7000"
_TAIL = 1 << 60


def _uuid(prefix: str) -> str:
    """16 fixed hexadecimal digits, and 16 that count."""
    return f"('{prefix}' || to_hex({_TAIL} + n))::uuid"


def _day_prefix(day: datetime.date) -> str:
    return partition_bounds(day)[0].hex[:16]


def _partition(day: datetime.date) -> str:
    return f"orderbus.inbox_{day:%Y%m%d}"


def _days_ago(days: int) -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=days)


def _name(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split("."))


def _all(connection: Connection, query: str, *params: str) -> list[tuple[Any, ...]]:
    return connection.execute(query.encode(), params).fetchall()
