"""Django's ORM and orderbus's outbox in one transaction.

Blocking, as the ORM is; needs Django's PostgreSQL backend on psycopg 3, and `orderbus[postgres]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from django.db import transaction

from orderbus import Event, Settings, UsageError
from orderbus.adapters.postgres import BlockingOutbox

__all__ = ["Outbox"]


class Outbox:
    """`outbox = Outbox()` once for a program, then `outbox.emit(event)` inside of `transaction.atomic()`.

    `using` is the alias of the database, whose outbox has to be relayed by some bus: `orderbus run`, in a process of its own.
    Settings are those of the environment unless given; no broker has to be named. Raises SettingsError.
    """

    def __init__(self, *, using: str = "default", settings: Settings | None = None) -> None:
        self._using = using
        self._outbox = BlockingOutbox(settings)

    def emit(self, event: Event, *, due_at: datetime | None = None) -> UUID:
        """Insert an event into the outbox, in the transaction that is open; its id. As `emit_many` in everything else."""
        return self.emit_many([event], due_at=due_at)[0]

    def emit_many(self, events: Sequence[Event], *, due_at: datetime | None = None) -> list[UUID]:
        """Insert events with one statement; their ids, in order. They are sent when the outermost `atomic` commits, never else.

        At once, not at the commit: save first, then emit, so that events of one key keep the order of what they tell. A
        savepoint that is rolled back takes them along. `due_at` (with a time zone) holds them back until then. Raises
        UsageError outside of a transaction, and for another database; SynchronousOnlyOperation in a running event loop,
        as the ORM does; django.db.Error for what the database says.
        """
        connection = transaction.get_connection(self._using)
        if connection.vendor != "postgresql":
            raise UsageError(
                f"the database {self._using!r} is {connection.vendor}, and the outbox is in PostgreSQL; name it by using=",
                code="OB409",
            )
        connection.ensure_connection()
        if connection.get_autocommit():
            raise UsageError(
                "emit goes along with what you write in a transaction; put `with transaction.atomic():` around both", code="OB409"
            )
        connection.validate_no_broken_transaction()
        with connection.wrap_database_errors:
            return self._outbox.emit(connection.connection, events, due_at=due_at)
