"""The stuck rows of the memory store: each key in order, its first row tried again when its time has come, the rest behind it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import msgspec

from orderbus.abc import OutboxRow, Stuck

__all__ = ["StuckRows"]

BEHIND = "behind"
"""The reason of a row that waits only because an earlier one of its key is stuck."""


class StuckRows:
    """All times are of `anyio.current_time`, and are given by the caller."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._ids_by_key: dict[str, set[int]] = {}

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._entries

    def count(self, buckets: Collection[int]) -> int:
        return sum(entry.row.bucket in buckets for entry in self._entries.values())

    def holds_back(self, key: str | None) -> bool:
        return key in self._ids_by_key

    def put(self, row: OutboxRow, reason: str, retry_at: float | None) -> None:
        """Set a row aside after a failed try, or renew it. `retry_at=None` waits for a person."""
        known = self._entries.get(row.id)
        attempts = (known.row.attempts if known else 0) + 1
        self._add(_Entry(msgspec.structs.replace(row, attempts=attempts), reason, retry_at))

    def put_behind(self, row: OutboxRow, now: float) -> None:
        """Set a row aside, untried, whose key has stuck rows; it is due now if they all come after it."""
        is_first = row.key is None or row.id < min(self._ids_by_key[row.key])
        self._add(_Entry(row, BEHIND, now if is_first else None))

    def remove(self, row_id: int, now: float) -> OutboxRow | None:
        """Take a row out; if another of its key has waited behind it, that one may be tried at once."""
        entry = self._entries.pop(row_id, None)
        if entry is None:
            return None
        if entry.row.key is not None:
            ids = self._ids_by_key[entry.row.key]
            ids.discard(row_id)
            if not ids:
                del self._ids_by_key[entry.row.key]
            elif (following := self._entries[min(ids)]).reason == BEHIND:
                following.retry_at = now
        return entry.row

    def due(self, buckets: Collection[int], now: float) -> Iterable[OutboxRow]:
        """The rows to try now, longest due first: the first of each key, then what is behind those, by id."""
        entries = [
            entry
            for entry in self._entries.values()
            if entry.retry_at is not None and entry.retry_at <= now and entry.row.bucket in buckets and self._is_first(entry.row)
        ]
        heads = [entry.row for entry in sorted(entries, key=lambda entry: (entry.retry_at, entry.row.id))]
        return [*heads, *sorted((row for head in heads for row in self._behind(head)), key=lambda row: row.id)]

    def _behind(self, head: OutboxRow) -> Iterable[OutboxRow]:
        """What waits only because of it: up to a row that is stuck for a reason of its own."""
        following = sorted(self._ids_by_key[head.key])[1:] if head.key is not None else ()
        entries = (self._entries[row_id] for row_id in following)
        return (entry.row for entry in itertools.takewhile(lambda entry: entry.reason == BEHIND, entries))

    def list(self, now: float) -> list[Stuck]:
        """All of them, by id."""
        return [
            Stuck(entry.row, entry.reason, None if entry.retry_at is None else max(0.0, entry.retry_at - now))
            for _, entry in sorted(self._entries.items())
        ]

    def _add(self, entry: _Entry) -> None:
        self._entries[entry.row.id] = entry
        if entry.row.key is not None:
            self._ids_by_key.setdefault(entry.row.key, set()).add(entry.row.id)

    def _is_first(self, row: OutboxRow) -> bool:
        return row.key is None or row.id == min(self._ids_by_key[row.key])


class _Entry:
    __slots__ = ("reason", "retry_at", "row")

    def __init__(self, row: OutboxRow, reason: str, retry_at: float | None) -> None:
        self.row = row
        self.reason = reason
        self.retry_at = retry_at
