"""Tx: what a handler writes through, so that its effects, its inbox row and its events commit together or not at all."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from orderbus._core.codec import CONTENT_TYPES, Format, encode
from orderbus._core.event import Event, event_key, event_place, event_type
from orderbus._core.ids import uuid7, uuid_text
from orderbus._core.message import VERSION
from orderbus._core.signing import SIGNATURE, SigningKeys
from orderbus._core.topology import bucket_of
from orderbus._core.trace_context import TraceHeaders
from orderbus._runtime.tracing import Tracing, current_trace
from orderbus.abc import Deferred, InboxEntry, OutboxRow, Transaction
from orderbus.errors import UsageError

Params = Sequence[Any] | Mapping[str, Any]
Row = tuple[Any, ...]

MOST_EMITTED = 10_000
MOST_KEY_BYTES = 200


class Encoding:
    """How a bus turns events into outbox rows: its format, its limit, its clock, its keys where it signs."""

    __slots__ = ("clock", "form", "limit_bytes", "rng", "signing")

    def __init__(
        self,
        *,
        form: Format,
        limit_bytes: int,
        clock: Callable[[], float],
        rng: random.Random,
        signing: SigningKeys | None = None,
    ) -> None:
        self.form: Format = form
        self.limit_bytes = limit_bytes
        self.clock = clock
        self.rng = rng
        self.signing = signing

    def row(self, event: Event, due_at: datetime | None = None, trace: TraceHeaders | None = None) -> OutboxRow:
        """Raises UsageError for what is no event, has no topic, is too large, or is due at a time without a zone."""
        kind = event_type(type(event))
        event_id = uuid7(int(self.clock() * 1000), self.rng.getrandbits(80))
        key = _checked_key(event)
        if due_at is not None and due_at.tzinfo is None:
            raise UsageError(
                f"{event_place(event)}: due_at={due_at!r} has no time zone; use datetime.now(timezone.utc) + …",
                code="OB212",
            )
        body, content_type = encode(event, self.form, limit_bytes=self.limit_bytes), CONTENT_TYPES[self.form]
        headers = {} if kind.version == 1 else {VERSION: str(kind.version)}
        if trace is not None:
            headers.update(trace)
        if self.signing is not None:
            headers[SIGNATURE] = self.signing.sign(kind.topic, uuid_text(event_id), key, content_type, body)
        return OutboxRow(
            event_id=event_id,
            topic=kind.topic,
            key=key,
            bucket=bucket_of(key if key is not None else uuid_text(event_id)),
            body=body,
            content_type=content_type,
            headers=headers,
            unrouted=kind.unrouted,
            due_at_ms=None if due_at is None else int(due_at.timestamp() * 1000),
        )


def _checked_key(event: Event) -> str | None:
    key = event_key(event)
    if key is None:
        return None
    size_bytes = len(key.encode("utf-8", "replace"))
    if size_bytes > MOST_KEY_BYTES:
        raise UsageError(
            f"{event_place(event)}: its key is {size_bytes} bytes; at most {MOST_KEY_BYTES}: use an id", code="OB211"
        )
    if not key.isprintable() and ("\0" in key or any("\ud800" <= char <= "\udfff" for char in key)):
        raise UsageError(f"{event_place(event)}: its key {key!r} holds what neither UTF-8 nor PostgreSQL can store", code="OB211")
    return key


class Tx:
    """A database transaction with an outbox. It belongs to one handler call (or one fused batch) and ends with it.

    Not safe for use by several tasks at once. After its end every method raises UsageError.
    """

    __slots__ = ("_cause", "_causes", "_deferred", "_emitted", "_encoding", "_ended", "_tracing", "_transaction")

    def __init__(self, transaction: Transaction, encoding: Encoding, tracing: Tracing | None = None) -> None:
        self._transaction = transaction
        self._encoding = encoding
        self._tracing = tracing
        self._cause: TraceHeaders | None = None
        """The trace of what is being handled, for the events that its handler returns: they are emitted outside of its span."""
        self._causes: Mapping[str | None, TraceHeaders] = {}
        """In a batch, the traces of its items by their keys."""
        self._deferred: list[Deferred] = []
        self._emitted: list[OutboxRow] = []
        self._ended = False

    def emit(self, event: Event, *, due_at: datetime | None = None) -> UUID:
        """Send an event when the transaction commits; never if it doesn't. Synchronous: all go in as one insert at commit.

        `due_at` (with a time zone) holds it back until then. Returns the event's id, a UUIDv7. At most 10,000 a transaction.
        """
        self._check_open()
        if len(self._emitted) >= MOST_EMITTED:
            raise UsageError(f"a transaction emits at most {MOST_EMITTED} events; split the work", code="OB406")
        trace = current_trace() or self._cause
        if self._causes:
            trace = self._causes.get(event_key(event), trace)
        row = self._encoding.row(event, due_at, trace)
        self._emitted.append(row)
        return row.event_id

    def defer(self, sql: str, params: Params = ()) -> None:
        """Queue a write until commit, where equal statements of the whole batch are sent together.

        Statements run grouped by their text, in order of first appearance. Its errors appear at commit.
        """
        self._check_open()
        self._deferred.append(Deferred(sql, params))

    def defer_row(self, sql: str, row: Sequence[Any]) -> None:
        """Queue one row of a statement that takes columns; the rows of equal statements are sent together, as one statement.

        For `insert into t (id, total) select * from unnest(%s::uuid[], %s::bigint[])`: the SQL names each column's array type. A
        third of what `defer` costs for each row, here and on the server. Runs at commit, in its turn among the deferred.
        """
        self._check_open()
        self._deferred.append(Deferred(sql, row, is_row=True))

    async def execute(self, sql: str, params: Params = ()) -> int:
        """Run a statement now; the number of rows it touched. Deferred writes have not run yet."""
        return (await self._run(sql, params))[1]

    async def fetch_one(self, sql: str, params: Params = ()) -> Row | None:
        """The first row of a query, or None."""
        rows, _ = await self._run(sql, params)
        return rows[0] if rows else None

    async def fetch_all(self, sql: str, params: Params = ()) -> Sequence[Row]:
        """All rows of a query. They are held in memory: bound them with `limit`."""
        return (await self._run(sql, params))[0]

    @property
    def connection(self) -> Any:
        """psycopg's AsyncConnection, for what the above can't do. Do not commit it. UsageError under trio and on the memory store."""
        self._check_open()
        return self._transaction.connection

    async def _run(self, sql: str, params: Params) -> tuple[Sequence[Row], int]:
        self._check_open()
        if self._tracing is None or not self._tracing.records:
            return await self._transaction.execute(sql, params)
        words = sql.split(None, 1) if isinstance(sql, str) else ()  # psycopg takes its own composed SQL as well
        with self._tracing.database(words[0].upper() if words else "EXECUTE", query=sql if words else None):
            return await self._transaction.execute(sql, params)

    async def _commit(self, forget: Sequence[InboxEntry] = ()) -> None:
        self._check_open()
        self._ended = True
        await self._transaction.commit(self._deferred, self._emitted, forget)

    async def _rollback(self) -> None:
        if not self._ended:
            self._ended = True
            await self._transaction.rollback()

    @property
    def _emits(self) -> bool:
        return bool(self._emitted)

    def _check_open(self) -> None:
        if self._ended:
            raise UsageError(
                "this tx has ended; use it only inside the handler or the `async with` it was given to", code="OB405"
            )
