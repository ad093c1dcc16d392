"""What is in the outbox's tables, as a person looks at it: rows without their bodies, which of them, and how many."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

import msgspec

State = Literal["waiting", "scheduled", "stuck"]


class HeldRow(msgspec.Struct, frozen=True):
    """An event that has not gone out. Times are Unix times by the database's clock."""

    state: State
    """`waiting` for the relay's next round, `scheduled` for its `due_at`, or `stuck`, because it could not be published."""
    row_id: int
    """Within `scheduled`, or within the other two together."""
    event_id: UUID
    topic: str
    key: str | None
    bucket: int
    size_bytes: int
    created_at_s: float
    due_at_s: float | None = None
    reason: str | None = None
    attempts: int = 0
    first_failed_at_s: float | None = None
    last_failed_at_s: float | None = None
    next_try_at_s: float | None = None
    """When a stuck row is tried again; None: when the one before it has gone, or a person says so."""
    waits_for: UUID | None = None
    """The first stuck event of its key, if that is another: nothing of the key goes out before it."""


class RowsWanted(msgspec.Struct, frozen=True):
    """Which rows: those that match one of each list that is not empty. In topics, keys and reasons `*` and `?` match anything."""

    states: tuple[State, ...] = ()
    topics: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    ids: tuple[UUID, ...] = ()
    reasons: tuple[str, ...] = ()
    older_than_s: float | None = None
    """Emitted longer ago than this."""
    behind: tuple[int, ...] = ()
    """Stuck rows that come after one of these stuck rows of their keys."""


class Held(msgspec.Struct, frozen=True):
    """The rows of one state and topic."""

    state: State
    topic: str
    count: int
    size_bytes: int
    oldest_s: float
    """The age of the oldest. For scheduled rows since they were emitted."""
    overdue_s: float | None
    """Of scheduled rows, how long the first one is overdue; None where none is."""


class StuckFor(msgspec.Struct, frozen=True):
    """The stuck rows of one reason."""

    reason: str
    count: int
    since_s: float
    """How long ago the first of them became stuck."""
    most_attempts: int
    next_try_in_s: float | None


class Holder(msgspec.Struct, frozen=True):
    """A relay and what it holds; `owner=None` stands for buckets that no relay holds, whose rows wait."""

    owner: str | None
    buckets: int
    waiting: int
    """Rows in these buckets."""
    lease_left_s: float | None
    seen_s: float | None
    """How long ago it was last heard of."""


class OutboxStats(msgspec.Struct, frozen=True):
    held: tuple[Held, ...]
    stuck: tuple[StuckFor, ...]
    holders: tuple[Holder, ...]


class Pace(msgspec.Struct, frozen=True):
    """What a consumer has handled lately, as its inbox rows say. Its lag is from an event's emission to the commit."""

    consumer: str
    per_s: float
    lag_p50_s: float | None
    """None where none of the events' ids says when it was emitted."""
    lag_p99_s: float | None


class Handled(msgspec.Struct, frozen=True):
    """That a consumer has handled an event, as its inbox row says."""

    consumer: str
    handled_at_s: float
