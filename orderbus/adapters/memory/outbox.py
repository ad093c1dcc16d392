"""The outbox of the memory store: rows by bucket, what is scheduled, what is stuck, and who holds which bucket.

Ids are handed out within a commit, which is one step: they follow commit order, and no row with a lower id can turn up
after a higher one was read. So the numbers of an OutboxPage are trivially right: `last_id` is the last one given, and every
transaction id (one per `delete`) that exists has ended, which makes `xmin` the next one.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from orderbus._core.outbox import plan_lease
from orderbus._core.topology import BUCKETS
from orderbus.abc import Backlog, OutboxPage, OutboxRow, Stuck
from orderbus.adapters.memory.stuck import StuckRows
from orderbus.errors import UnavailableError

__all__ = ["MemoryOutbox"]

LIMIT_BYTES = 1 << 30
_ROW_OVERHEAD_BYTES = 1024


class MemoryOutbox:
    """Implements `orderbus.abc.OutboxStore`. Full at `limit_bytes`, a row counting its body and 1 KiB: then commits fail.

    Made within a running event loop: its wall clock is the real one at that moment plus the time that passes for
    `anyio.current_time`, so that scheduled rows follow virtual time, too.
    """

    def __init__(self, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._last_id = 0
        self._last_xid = 0
        self._waiting: dict[int, dict[int, OutboxRow]] = {bucket: {} for bucket in range(BUCKETS)}
        self._since: dict[int, float] = {}
        """When each row came to wait, or to be stuck."""
        self._scheduled: list[tuple[int, int, OutboxRow]] = []
        self._stuck = StuckRows()
        self._leases: dict[int, tuple[str, float]] = {}
        self._relays: dict[str, float] = {}
        self._wall_s = time.time() - anyio.current_time()

    def insert(self, rows: Sequence[OutboxRow]) -> None:
        """Take the rows of a commit, all or none; those with a `due_at_ms` wait until then."""
        size_bytes = sum(_size_bytes(row) for row in rows)
        if self._size_bytes + size_bytes > self._limit_bytes:
            raise UnavailableError(f"the memory outbox is full: {self._size_bytes} of {self._limit_bytes} bytes")
        self._size_bytes += size_bytes
        for row in rows:
            if row.due_at_ms is None:
                self._append(row)
            else:
                self._last_id += 1
                heapq.heappush(self._scheduled, (row.due_at_ms, self._last_id, row))

    async def lease(self, owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        """With `keep=None` the fair share; with a list, at most those, and none new. `keep=[]` also signs this relay off."""
        await checkpoint()
        now = anyio.current_time()
        self._relays = {relay: seen_at for relay, seen_at in self._relays.items() if seen_at > now - lease_s}
        if keep is not None and not keep:
            self._relays.pop(owner, None)
        else:
            self._relays[owner] = now
        held = {bucket: holder for bucket, (holder, until) in self._leases.items() if until > now or holder == owner}
        plan = plan_lease(owner, self._relays, held, keep=keep, buckets=BUCKETS)
        self._leases = {bucket: lease for bucket, lease in self._leases.items() if lease[0] != owner}
        self._leases.update((bucket, (owner, now + lease_s)) for bucket in plan)
        return plan

    async def read(
        self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None
    ) -> OutboxPage:
        """Rows of these buckets above the floor, by id, at most `limit` and (but for the first) `limit_bytes` of bodies."""
        await checkpoint()
        rows: list[OutboxRow] = []
        behind: list[OutboxRow] = []
        size_bytes = 0
        waiting = [self._waiting[bucket].values() for bucket in set(buckets) if self._waiting[bucket]]
        for row in heapq.merge(*waiting, key=_id):
            if row.id <= floor:
                continue
            if up_to is not None and row.id > up_to:
                break
            if self._stuck.holds_back(row.key):
                behind.append(row)
                continue
            size_bytes += len(row.body)
            if len(rows) == limit or (rows and size_bytes > limit_bytes):
                break
            rows.append(row)
        for row in behind:
            del self._waiting[row.bucket][row.id]
            self._stuck.put_behind(row, anyio.current_time())
        return OutboxPage(rows, self._last_xid + 1, self._last_id)

    async def backlog(self, buckets: Sequence[int], floor: int) -> Backlog:
        """All that is here; `floor` saves a real database from reading what it has read."""
        await checkpoint()
        ids = [row_id for bucket in set(buckets) for row_id in self._waiting[bucket]]
        oldest_s = anyio.current_time() - self._since[min(ids)] if ids else 0.0
        return Backlog(len(ids), oldest_s, self._stuck.count(buckets))

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        """From the outbox or from among the stuck, wherever each is; of a key that was stuck, the next row may then be tried."""
        await checkpoint()
        now = anyio.current_time()
        for row in rows:
            self._since.pop(row.id, None)
            gone = self._waiting[row.bucket].pop(row.id, None) or self._stuck.remove(row.id, now)
            if gone is not None:
                self._size_bytes -= _size_bytes(gone)
        self._last_xid += 1
        return self._last_xid

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        """Move rows among the stuck, or renew reason and next try there. A row that was deleted meanwhile stays away."""
        await checkpoint()
        now = anyio.current_time()
        for item in stuck:
            row = item.row
            if self._waiting[row.bucket].pop(row.id, None) is not None or row.id in self._stuck:
                self._stuck.put(row, item.reason, None if item.retry_in_s is None else now + item.retry_in_s)

    async def due(self, buckets: Sequence[int], limit: int, limit_bytes: int) -> Sequence[OutboxRow]:
        """Move scheduled rows that are due into the outbox; return stuck rows whose next try is due, and those behind them."""
        await checkpoint()
        now = anyio.current_time()
        while self._scheduled and self._scheduled[0][0] <= (self._wall_s + now) * 1000:
            self._append(heapq.heappop(self._scheduled)[2])
        rows: list[OutboxRow] = []
        size_bytes = 0
        for row in self._stuck.due(set(buckets), now):
            size_bytes += len(row.body)
            if len(rows) == limit or (rows and size_bytes > limit_bytes):
                break
            rows.append(row)
        return rows

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, is scheduled, or is stuck."""
        return not self._size_bytes

    def rows(self) -> list[OutboxRow]:
        """What waits to be published now, by id."""
        return sorted((row for rows in self._waiting.values() for row in rows.values()), key=_id)

    def scheduled(self) -> list[OutboxRow]:
        """What waits for its `due_at_ms`, soonest first."""
        return [row for _, _, row in sorted(self._scheduled, key=lambda item: item[:2])]

    def stuck(self) -> list[Stuck]:
        """What was set aside, by id, with the latest reason and the time until the next try."""
        return self._stuck.list(anyio.current_time())

    def _append(self, row: OutboxRow) -> None:
        self._last_id += 1
        row = msgspec.structs.replace(row, id=self._last_id, due_at_ms=None)
        self._waiting[row.bucket][row.id] = row
        self._since[row.id] = anyio.current_time()


def _id(row: OutboxRow) -> int:
    return row.id


def _size_bytes(row: OutboxRow) -> int:
    return len(row.body) + _ROW_OVERHEAD_BYTES
