"""The outbox for code without an event loop: events as rows in the transaction of a blocking psycopg connection."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg
from psycopg.pq import TransactionStatus

from orderbus._core.event import Event
from orderbus._core.settings import PREFIX, Settings
from orderbus._core.signing import signing_keys
from orderbus._runtime.tracing import current_trace
from orderbus._runtime.tx import MOST_EMITTED, Encoding
from orderbus.adapters.postgres.arrays import register
from orderbus.adapters.postgres.transaction import check_encoding, outbox_calls
from orderbus.errors import UsageError

__all__ = ["BlockingOutbox"]


class BlockingOutbox:
    """Inserts events at once, where `tx.emit` waits for the commit. Needs no open bus: a relay elsewhere sends them.

    Settings as for a bus, of which it heeds `max_body_bytes` and `signing_keys`; no broker has to be named. Safe to share
    between threads, each with a connection of its own, and across a fork. Raises SettingsError.
    """

    def __init__(self, settings: Settings | None = None, *, clock: Callable[[], float] = time.time) -> None:
        heeded = Settings.load({f"{PREFIX}BROKER_URL": "memory://", **os.environ}, settings)
        self._encoding = Encoding(
            form="json",
            limit_bytes=heeded.max_body_bytes,
            clock=clock,
            rng=random.SystemRandom(),  # workers that are forked would draw the same ids from any other
            signing=signing_keys(heeded.signing_keys),
        )

    def emit(self, connection: psycopg.Connection[Any], events: Sequence[Event], *, due_at: datetime | None = None) -> list[UUID]:
        """Insert at most 10,000 events; their ids, in order. They are sent when the caller's transaction commits.

        Emit after your own writes: events of one key keep their order because whoever emits holds the locks of what it has
        written. Raises UsageError for a connection outside of a transaction or in another encoding than UTF8, and for what is
        no event or is too large; what the database says is psycopg's error, and the transaction is then to be rolled back.
        """
        if not isinstance(connection, psycopg.Connection):
            raise UsageError(
                f"emit takes a psycopg.Connection, not {type(connection).__name__}; it must be psycopg 3", code="OB409"
            )
        if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
            raise UsageError(
                "emit takes a connection in a transaction; put `with connection.transaction():` around it", code="OB409"
            )
        check_encoding(connection)
        if len(events) > MOST_EMITTED:
            raise UsageError(f"at most {MOST_EMITTED} events are emitted at once; split the work", code="OB406")
        trace = current_trace()
        rows = [self._encoding.row(event, due_at, trace) for event in events]
        with psycopg.Cursor(connection) as cursor:  # binds on the server, whatever the connection's own cursors do
            register(cursor)
            for call in outbox_calls(rows):
                cursor.execute(call.sql.encode(), call.params, prepare=True)
        return [row.event_id for row in rows]
