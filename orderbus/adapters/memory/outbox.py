"""The outbox of the memory store: rows by bucket, what is scheduled, what is stuck, and who holds which bucket.

Ids are handed out within a commit, which is one step: they follow commit order, and no row with a lower id can turn up
after a higher one was read. So the numbers of an OutboxPage are trivially right: `last_id` is the last one given, and every
transaction id (one per `delete`) that exists has ended, which makes `xmin` the next one.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence

import anyio
import msgspec
from anyio.lowlevel import checkpoint

from orderbus._core.topology import BUCKETS
from orderbus.abc import OutboxPage, OutboxRow, Stuck
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
        self._scheduled: list[tuple[int, int, OutboxRow]] = []
        self._stuck: dict[int, _Stuck] = {}
        self._stuck_keys: dict[str, set[int]] = {}
        self._leases: dict[int, str] = {}
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
        """Renew this relay's buckets and take its fair share: 64 by the number of relays that called within their lease.

        With a list to `keep`, at most those and none new; `keep=[]` gives all back and signs off.
        """
        await checkpoint()
        now = anyio.current_time()
        self._relays = {relay: until for relay, until in self._relays.items() if until > now}
        self._leases = {bucket: relay for bucket, relay in self._leases.items() if relay in self._relays}
        mine = sorted(bucket for bucket, relay in self._leases.items() if relay == owner)
        if keep is not None:
            mine = [bucket for bucket in mine if bucket in keep]
        self._leases = {bucket: relay for bucket, relay in self._leases.items() if relay != owner}
        if keep is not None and not keep:
            self._relays.pop(owner, None)
            return frozenset()
        self._relays[owner] = now + lease_s
        share = math.ceil(BUCKETS / len(self._relays))
        mine = mine[:share]
        if keep is None:
            free = [bucket for bucket in range(BUCKETS) if bucket not in self._leases and bucket not in mine]
            mine += free[: share - len(mine)]
        self._leases.update((bucket, owner) for bucket in mine)
        return frozenset(mine)

    async def read(self, buckets: Sequence[int], floor: int, limit: int, limit_bytes: int) -> OutboxPage:
        """Rows of these buckets above the floor, by id, at most `limit` and (but for the first) `limit_bytes` of bodies."""
        await checkpoint()
        rows: list[OutboxRow] = []
        size_bytes = 0
        for row in heapq.merge(*(self._waiting[bucket].values() for bucket in set(buckets)), key=_id):
            if row.id <= floor or row.key in self._stuck_keys:
                continue
            size_bytes += len(row.body)
            if len(rows) == limit or (rows and size_bytes > limit_bytes):
                break
            rows.append(row)
        return OutboxPage(rows, self._last_xid + 1, self._last_id)

    async def delete(self, rows: Sequence[OutboxRow]) -> int:
        """Delete published rows, wherever they are; a new transaction id."""
        await checkpoint()
        for row in rows:
            gone = self._waiting[row.bucket].pop(row.id, None) or self._unstick(row.id)
            if gone is not None:
                self._size_bytes -= _size_bytes(gone)
        self._last_xid += 1
        return self._last_xid

    async def set_aside(self, stuck: Sequence[Stuck]) -> None:
        """Move rows to the stuck table, or renew reason and next try there. A row that was deleted meanwhile stays away."""
        await checkpoint()
        now = anyio.current_time()
        for item in stuck:
            row = self._waiting[item.row.bucket].pop(item.row.id, None)
            if row is None and item.row.id not in self._stuck:
                continue
            retry_at = None if item.retry_in_s is None else now + item.retry_in_s
            self._stuck[item.row.id] = _Stuck(item, retry_at)
            if item.row.key is not None:
                self._stuck_keys.setdefault(item.row.key, set()).add(item.row.id)

    async def due(self, buckets: Sequence[int], limit: int) -> Sequence[OutboxRow]:
        """Move scheduled rows that are due into the outbox; return stuck rows whose next try is due, at most one per key."""
        await checkpoint()
        now = anyio.current_time()
        wall_ms = (self._wall_s + now) * 1000
        while self._scheduled and self._scheduled[0][0] <= wall_ms:
            self._append(heapq.heappop(self._scheduled)[2])
        wanted = set(buckets)
        rows: list[OutboxRow] = []
        for row_id in sorted(self._stuck):
            stuck = self._stuck[row_id]
            row = stuck.item.row
            is_first = row.key is None or row_id == min(self._stuck_keys[row.key])
            if is_first and row.bucket in wanted and stuck.retry_at is not None and stuck.retry_at <= now:
                rows.append(row)
            if len(rows) == limit:
                break
        return rows

    def rows(self) -> list[OutboxRow]:
        """What waits to be published now, by id."""
        return sorted((row for rows in self._waiting.values() for row in rows.values()), key=_id)

    def scheduled(self) -> list[OutboxRow]:
        """What waits for its `due_at_ms`, soonest first."""
        return [row for _, _, row in sorted(self._scheduled, key=lambda item: item[:2])]

    def stuck(self) -> list[Stuck]:
        """What was set aside, by id, with the latest reason."""
        return [self._stuck[row_id].item for row_id in sorted(self._stuck)]

    def _append(self, row: OutboxRow) -> None:
        self._last_id += 1
        row = msgspec.structs.replace(row, id=self._last_id)
        self._waiting[row.bucket][row.id] = row

    def _unstick(self, row_id: int) -> OutboxRow | None:
        stuck = self._stuck.pop(row_id, None)
        if stuck is None:
            return None
        row = stuck.item.row
        if row.key is not None:
            ids = self._stuck_keys[row.key]
            ids.discard(row_id)
            if not ids:
                del self._stuck_keys[row.key]
        return row


class _Stuck:
    __slots__ = ("item", "retry_at")

    def __init__(self, item: Stuck, retry_at: float | None) -> None:
        self.item = item
        self.retry_at = retry_at


def _id(row: OutboxRow) -> int:
    return row.id


def _size_bytes(row: OutboxRow) -> int:
    return len(row.body) + _ROW_OVERHEAD_BYTES
