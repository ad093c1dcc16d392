"""The outbox's arithmetic: from where to read, what to publish next, whose buckets, and how long to wait.

Rows get their ids in the order in which transactions of one key commit, but a row with a lower id may still appear after one with
a higher id was seen. `Floor` says up to where that can no longer happen. What it rests on, in the words of PostgreSQL:
a transaction's xid is assigned before it takes ids from the sequence; xids are assigned in ascending order; and every
transaction below a snapshot's xmin had ended before the snapshot was taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

__all__ = ["Floor", "Keyed", "fair_share", "first_per_key", "idle_wait_s", "plan_lease", "stuck_retry_s"]


class Floor:
    """The id at and below which no row of one relay's buckets remains or can still appear. Reads start above it.

    A state machine; on one history of the database `value` never falls. A relay that gains buckets starts with a new one, since it
    knows nothing of theirs.

        state         event                            next state
        ------------  -------------------------------  ---------------------------------------------------
        unknown       read (last id V)                 seen V
        seen V        read (V')                        seen V'
        seen V        deleted by xid X, marked at V    waiting for X, with V
        waiting V, X  read with xmin ≤ X               waiting V, X
        waiting V, X  read with xmin > X (last id V')  seen V'; value = min(V, the lowest id that read found − 1)
        waiting V, X  deleted                          waiting V, X
        any           read (last id less than V)       seen that; value = 0
    """

    __slots__ = ("_seen", "_waiting", "value")

    def __init__(self) -> None:
        self.value = 0
        self._seen = 0
        self._waiting: tuple[int, int] | None = None

    def read(self, *, xmin: int, last_id: int, lowest_id: int | None) -> None:
        """A read above `value` has returned: its xmin, the last id handed out, and the lowest id it found (None: no row)."""
        if last_id < self._seen:  # another history: of a promoted replica that did not have all of this one, or of a backup
            self.value, self._seen, self._waiting = 0, last_id, None
            return
        self._seen = max(self._seen, last_id)
        if self._waiting is None:
            return
        highest, xid = self._waiting
        if xmin > xid:
            self._waiting = None
            self.value = max(self.value, highest if lowest_id is None else min(highest, lowest_id - 1))

    def mark(self) -> int:
        """To be taken before a delete is sent, and given to `deleted`: the last id known by then."""
        return self._seen

    def deleted(self, mark: int, xid: int) -> None:
        """A delete was done by the transaction `xid`, which therefore began after `mark` was known."""
        if self._waiting is None and mark > self.value:
            self._waiting = (mark, xid)


class Keyed(Protocol):
    """A row of the outbox, as far as this module looks at it."""

    @property
    def key(self) -> str | None: ...


Row = TypeVar("Row", bound=Keyed)


def first_per_key(rows: Iterable[Row], unconfirmed: Collection[str] = ()) -> list[Row]:
    """Of rows in the order of their ids, those that may be published now: one of each key, none of a key that awaits a confirm.

    With two unconfirmed rows of one key, a nack of the first would reorder them. Rows without a key have no order to keep.
    """
    taken = set(unconfirmed)
    chosen = []
    for row in rows:
        if row.key is not None:
            if row.key in taken:
                continue
            taken.add(row.key)
        chosen.append(row)
    return chosen


def plan_lease(
    owner: str, live: Collection[str], held: Mapping[int, str], *, buckets: int, keep: Sequence[int] | None = None
) -> frozenset[int]:
    """The buckets that `owner` shall hold now: its fair share of all, first what it has, then what is free.

    `held` maps buckets with an unexpired lease to their owner. With `keep`, only what it has of those, and nothing new.
    """
    mine = sorted(bucket for bucket, holder in held.items() if holder == owner)
    if keep is not None:
        return frozenset(mine).intersection(keep)
    share = fair_share(owner, live, buckets)
    kept = mine[:share]
    free = [bucket for bucket in range(buckets) if bucket not in held]
    return frozenset(kept + free[: share - len(kept)])


def fair_share(owner: str, live: Collection[str], buckets: int) -> int:
    """How many buckets are an owner's share among the live ones (itself included). All shares together are all buckets."""
    owners = sorted({*live, owner})
    share, rest = divmod(buckets, len(owners))
    return share + (owners.index(owner) < rest)


def stuck_retry_s(attempts: int, jitter: float) -> float:
    """When to try a stuck row again after its nth attempt: 1 s, doubling up to 5 minutes; a `jitter` of 0..1 adds up to half."""
    return float(min(2 ** min(attempts - 1, 16), 300)) * (1 + jitter / 2)


def idle_wait_s(empty_reads: int) -> float:
    """How long to wait after so many reads in a row that found nothing: nothing after 0, then 5 ms, doubling up to 250 ms."""
    return min(0.005 * 2 ** min(empty_reads - 1, 16), 0.25) if empty_reads > 0 else 0.0
