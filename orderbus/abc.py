"""What orderbus asks of a broker, a store and a claims keeper. Batch-shaped, because every cost here is per round trip.

All methods raise UnavailableError when the server can't be reached; none waits for it to come back: the runtime does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol
from uuid import UUID

import msgspec

from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.outbox_rows import Handled, HeldRow, OutboxStats, Pace, RowsWanted
from orderbus._core.topology import Topology

__all__ = [
    "Backlog",
    "Broker",
    "ClaimAnswer",
    "ClaimState",
    "Claims",
    "Deferred",
    "InboxEntry",
    "Incoming",
    "OutboxDesk",
    "OutboxPage",
    "OutboxRow",
    "OutboxStore",
    "Outgoing",
    "Receipt",
    "Settlement",
    "Store",
    "Stuck",
    "Subscription",
    "Transaction",
    "Verdict",
]


class Broker(Protocol):
    """A connected message broker. It reconnects by itself at the next call after a loss."""

    async def apply(self, topology: Topology) -> None:
        """Declare everything that is missing. Raises TopologyError, naming each, where something exists with other arguments."""

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        """Publish all, wait for all confirms; one receipt each, in order. A cancelled call leaves the outcome unknown."""

    def subscribe(self, queue: str, *, prefetch: int) -> AbstractAsyncContextManager[Subscription]:
        """Consume a queue with at most `prefetch` (≥ 1) unsettled deliveries. Leaving gives back what is unsettled."""

    async def depth(self, queue: str) -> int:
        """How many messages are ready in a queue. Raises UsageError where there is no such queue."""


class Subscription(Protocol):
    """A live consumer. `receive` raises UnavailableError once the broker has cancelled it or the connection is gone."""

    async def receive(self) -> Sequence[Incoming]:
        """At least one delivery; what has arrived, up to the prefetch."""

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        """Synchronous and never blocking: sent soon, coalesced. For a delivery of an earlier epoch it does nothing."""

    def tried(self, delivery: Incoming) -> None:
        """Its handler has come to an end and failed, so it kills nobody: where a subscription hands over few at first, it need not
        wait for this one. It stays unsettled. Saying it again, or of one that is settled, does nothing.
        """

    async def pause(self) -> None:
        """Take no new deliveries from the broker; hand over by `receive` nothing more. Settling goes on working."""

    async def flush(self) -> None:
        """Wait until every settlement so far has reached the broker."""


class ClaimState(enum.Enum):
    GRANTED = "granted"
    """Nobody has it: it is yours until the lease ends."""
    IN_PROGRESS = "in-progress"
    """Somebody else holds an unexpired lease on it."""
    DONE = "done"
    """It was completed; `answer` holds what was stored."""
    MISMATCH = "mismatch"
    """The same key was claimed before with another fingerprint."""


class ClaimAnswer(msgspec.Struct, frozen=True):
    state: ClaimState
    answer: bytes = b""


class Claims(Protocol):
    """Idempotency keys with a lease and a fencing token, for work that no database transaction guards."""

    async def claim(self, keys: Sequence[tuple[str, str]], token: str, lease_ms: int) -> Sequence[ClaimAnswer]:
        """Claim (key, fingerprint) pairs, each atomically; one answer each, in order."""

    async def complete(self, answers: Sequence[tuple[str, bytes]], token: str, keep_ms: int) -> Sequence[bool]:
        """Store the answer for each key that the token still holds, for `keep_ms`; False where the lease had been lost."""

    async def release(self, keys: Sequence[str], token: str) -> None:
        """Give up the keys that the token still holds, so that another may claim them at once."""


class InboxEntry(msgspec.Struct, frozen=True):
    """That `consumer` handles an event: applied once per (event_id, consumer)."""

    event_id: UUID
    consumer: str
    body_hash: int
    """Signed 64 bits; the same id with another hash is a conflict, not a duplicate."""


class Verdict(enum.Enum):
    NEW = "new"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class Deferred(msgspec.Struct, frozen=True):
    """A statement queued until commit; equal texts are sent together. With `is_row`, its params are one row of the columns it takes."""

    sql: str
    params: Sequence[Any] | Mapping[str, Any]
    is_row: bool = False


class OutboxRow(msgspec.Struct, frozen=True):
    """An event on its way out. `id` orders rows of one key (0 before it is inserted); `due_at_ms` holds it back until then."""

    event_id: UUID
    topic: str
    key: str | None
    bucket: int
    body: bytes
    content_type: str
    headers: Mapping[str, str]
    unrouted: str = "keep"
    due_at_ms: int | None = None
    id: int = 0
    attempts: int = 0
    """How often it was set aside so far."""


class Transaction(Protocol):
    """An open transaction. It ends by exactly one of `commit` and `rollback`."""

    verdicts: Sequence[Verdict]
    """One for each inbox entry that the transaction was begun with."""

    @property
    def connection(self) -> Any:
        """The driver's own connection. Raises UsageError where there is none, or where it lives on another thread."""

    async def execute(self, sql: str, params: Any) -> tuple[Sequence[tuple[Any, ...]], int]:
        """Run one statement: its rows (empty where it returns none) and the count of rows it touched."""

    async def commit(self, deferred: Sequence[Deferred], emitted: Sequence[OutboxRow], forget: Sequence[InboxEntry] = ()) -> None:
        """Run the deferred statements, insert the emitted rows, drop the inbox entries in `forget`, and commit."""

    async def rollback(self) -> None: ...


class OutboxPage(msgspec.Struct, frozen=True):
    """What one read of the outbox saw: rows by id, and what the floor's arithmetic needs (see `_core/outbox.py`)."""

    rows: Sequence[OutboxRow]
    xmin: int
    """Taken before the rows were read: every transaction below it had ended."""
    last_id: int
    """The last id handed out, read before the rows."""


class Stuck(msgspec.Struct, frozen=True):
    """A row that can't be published now: `reason`, and when to try again (None: a person must look)."""

    row: OutboxRow
    reason: str
    retry_in_s: float | None


class Backlog(msgspec.Struct, frozen=True):
    """What waits in some buckets of the outbox, counted no further than `MOST_COUNTED`."""

    waiting: int
    oldest_s: float
    """How long the oldest has waited, in seconds; 0 where none waits."""
    stuck: int


MOST_COUNTED = 10_000


class OutboxStore(Protocol):
    """What the relay needs of the database."""

    async def lease(self, owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        """Renew this relay's buckets and take its fair share; `keep=[]` gives all back. The buckets now held."""

    async def read(
        self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None
    ) -> OutboxPage:
        """Rows of these buckets above the floor, up to the id `up_to` if given, by id, at most `limit`; an empty page: there are none.

        Rows whose key has a stuck row are not among them, and move behind it into the stuck table: of what a read leaves out
        nothing may stay in the outbox, or the floor would pass it.
        """

    async def backlog(self, buckets: Sequence[int], floor: int) -> Backlog:
        """How much waits in these buckets above the floor, and how much of theirs is stuck."""

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        """Delete published rows; the transaction id (xid) that did it."""

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        """Move rows to the stuck table (or renew them there)."""

    async def due(self, buckets: Sequence[int], limit: int, limit_bytes: int) -> Sequence[OutboxRow]:
        """Move scheduled rows that are due into the outbox; return stuck rows whose next try is due, and those behind them.

        Of each key only where its first stuck row is due, and in their order; at most `limit`, and bodies of `limit_bytes` but for one.
        """


class OutboxDesk(Protocol):
    """What a person needs of the database: to see what has not gone out, and to try or discard it."""

    async def rows(self, wanted: RowsWanted, limit: int | None = None) -> Sequence[HeldRow]:
        """The oldest rows that are wanted, at most `limit`."""

    async def stats(self) -> OutboxStats:
        """How many there are, since when, why, and which relays hold the buckets; all of one moment."""

    async def retry(self, row_ids: Sequence[int]) -> frozenset[int]:
        """Let stuck rows be tried now; those that were. Not one that has an earlier stuck row of its key before it."""

    async def discard(self, rows: Sequence[HeldRow]) -> frozenset[UUID]:
        """Delete stuck and scheduled rows for good; the events that were. What waited behind them goes on: at once, in its order."""

    async def handled(self, event_id: UUID) -> Sequence[Handled]:
        """Which consumers have handled an event, as far as the inbox remembers."""

    async def paces(self, window_s: float) -> Sequence[Pace]:
        """What each consumer has handled within the last so many seconds; those that have handled nothing are left out."""


class Store(Protocol):
    """The database: transactions with an inbox and an outbox."""

    @property
    def outbox(self) -> OutboxStore: ...

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> Transaction:
        """Begin a transaction and insert the inbox entries, all in one round trip."""

    def enlist(self, connection: Any) -> Transaction:
        """The inserts of a commit inside a transaction that the caller's own code owns; its `commit` does not commit."""

    async def check(self) -> None:
        """Raise UsageError where the schema is missing or of another version, naming the command that mends it."""

    async def maintain(self, window_s: float) -> None:
        """Create the inbox partitions of the coming days, drop those outside the dedupe window, or a longer one that others have."""
