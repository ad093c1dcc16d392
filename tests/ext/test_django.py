"""Django's own connections with the outbox, on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import anyio
import django
import psycopg
import pytest
from django.conf import settings
from django.db import DatabaseError, connection, models, transaction
from django.db.migrations import RunSQL
from django.db.migrations.state import ProjectState
from django.db.transaction import TransactionManagementError

from orderbus import Bus, Event, Settings, UsageError
from orderbus.adapters.postgres import BlockingOutbox, schema_sql
from orderbus.ext.django import Outbox
from tests.runtime.world import until

pytestmark = pytest.mark.servers

Database = psycopg.Connection[Any]


class Paid(Event, topic="orders.paid", key="number"):
    number: int
    text: str = ""


@pytest.fixture(scope="module")
def payment(module_url: str) -> Iterator[Any]:
    """The model of a Django project whose database is this module's."""
    parts = urlsplit(module_url)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path[1:],
        "HOST": parts.hostname or "",
        "PORT": parts.port or "",
        "USER": parts.username or "",
        "PASSWORD": parts.password or "",
    }
    settings.configure(DATABASES={"default": database, "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup()

    class Payment(models.Model):
        number = models.IntegerField(primary_key=True)
        cents = models.IntegerField()

        class Meta:
            app_label = "shop"
            db_table = "payment"

    yield Payment
    connection.close()


@pytest.fixture
def outbox(payment: Any, db: Database) -> Outbox:
    return Outbox()


def emitted(db: Database) -> list[str]:
    return [key for (key,) in db.execute("select key from orderbus.outbox order by id").fetchall()]


def test_an_event_is_committed_with_the_row_that_it_tells_of(outbox: Outbox, payment: Any, db: Database) -> None:
    with transaction.atomic():
        payment.objects.create(number=1, cents=500)
        event_id = outbox.emit(Paid(number=1))
        before = emitted(db)

    assert before == []
    assert db.execute("select event_id from orderbus.outbox").fetchall() == [(event_id,)]
    assert payment.objects.count() == 1


def test_what_rolls_back_leaves_no_ghost_and_a_savepoint_takes_only_its_own_events_along(
    outbox: Outbox, payment: Any, db: Database
) -> None:
    def undone(number: int) -> None:
        with transaction.atomic():
            payment.objects.create(number=number, cents=1)
            outbox.emit(Paid(number=number))
            raise KeyError

    with pytest.raises(KeyError):
        undone(1)
    with transaction.atomic():
        with pytest.raises(KeyError):
            undone(2)
        outbox.emit(Paid(number=3))

    assert emitted(db) == ["3"]
    assert payment.objects.count() == 0


def test_many_events_keep_their_order_and_those_with_a_time_are_scheduled(outbox: Outbox, db: Database) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)

    with transaction.atomic():
        outbox.emit_many([Paid(number=number) for number in range(100)])
        outbox.emit(Paid(number=500), due_at=tomorrow)
        assert outbox.emit_many([]) == []

    assert emitted(db) == [str(number) for number in range(100)]
    assert db.execute("select due_at from orderbus.scheduled").fetchall() == [
        (tomorrow.replace(microsecond=tomorrow.microsecond // 1000 * 1000),)
    ]


def test_outside_of_a_transaction_it_is_refused(outbox: Outbox, db: Database) -> None:
    with pytest.raises(UsageError, match=r"put `with transaction\.atomic\(\):` around both"):
        outbox.emit(Paid(number=1))

    assert emitted(db) == []


def test_in_a_transaction_that_is_to_be_rolled_back_it_is_refused_as_a_query_is(outbox: Outbox) -> None:
    with transaction.atomic():
        transaction.set_rollback(True)
        with pytest.raises(TransactionManagementError):
            outbox.emit(Paid(number=1))


def test_what_the_database_says_is_djangos_error(outbox: Outbox, db: Database) -> None:
    db.execute("alter table orderbus.outbox rename to away")
    try:
        with pytest.raises(DatabaseError, match=r"orderbus\.outbox"):
            with transaction.atomic():
                outbox.emit(Paid(number=1))
    finally:
        db.execute("alter table orderbus.away rename to outbox")


def test_another_database_and_another_connection_are_refused(payment: Any) -> None:
    not_psycopg: Any = object()

    with pytest.raises(UsageError, match="the database 'other' is sqlite, and the outbox is in PostgreSQL"):
        Outbox(using="other").emit(Paid(number=1))
    with pytest.raises(UsageError, match=r"takes a psycopg\.Connection, not object"):
        BlockingOutbox().emit(not_psycopg, [Paid(number=1)])


def test_the_blocking_outbox_refuses_autocommit_and_too_many(module_url: str, db: Database) -> None:
    outbox = BlockingOutbox(Settings(max_body_bytes=1024))

    with pytest.raises(UsageError, match=r"put `with connection\.transaction\(\):` around it"):
        outbox.emit(db, [Paid(number=1)])
    with db.transaction():
        with pytest.raises(UsageError, match="at most 10000 events"):
            outbox.emit(db, [Paid(number=1)] * 10_001)
        with pytest.raises(UsageError, match="1024"):
            outbox.emit(db, [Paid(number=1, text="x" * 1024)])

    assert emitted(db) == []


def test_a_connection_that_would_garble_keys_is_refused(module_url: str) -> None:
    with psycopg.connect(module_url, client_encoding="LATIN1") as latin:
        with pytest.raises(UsageError, match=r"client_encoding is LATIN1.*set it to UTF8"):
            BlockingOutbox().emit(latin, [Paid(number=1)])


def test_the_tables_of_orderbus_go_into_a_migration(outbox: Outbox) -> None:
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("drop schema orderbus cascade")
        with connection.schema_editor() as editor:
            RunSQL(schema_sql()).database_forwards("shop", editor, ProjectState(), ProjectState())
        outbox.emit(Paid(number=1))
        transaction.set_rollback(True)


@pytest.mark.anyio
async def test_a_bus_elsewhere_relays_what_django_emitted_in_order(outbox: Outbox, module_url: str, db: Database) -> None:
    bus = Bus("ledger", settings=Settings(broker_url="memory://", database_url=module_url, pool_size=2))
    heard: list[str] = []

    @bus.on(Paid, ordered=True)
    async def hear(paid: Paid) -> None:
        heard.append(paid.text)

    def emit() -> None:
        with transaction.atomic():
            outbox.emit_many([Paid(number=7, text="first"), Paid(number=7, text="second")])
        connection.close()

    async with bus:
        with pytest.raises(Exception, match="You cannot call this from an async context"):
            outbox.emit(Paid(number=1))
        await anyio.to_thread.run_sync(emit)
        await until(lambda: heard == ["first", "second"])
