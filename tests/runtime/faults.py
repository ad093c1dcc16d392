"""Faults of servers in memory, by name: what the database or the claims keeper does when it is away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orderbus.abc import InboxEntry
from orderbus.adapters.memory import MemoryClaims, MemoryStore
from orderbus.errors import TransientError, UnavailableError


class StoreFaults:
    """Stands between the runtime and a memory store. What is set here holds until it is changed."""

    def __init__(self, store: MemoryStore) -> None:
        self.is_away = False
        self.transient = 0
        """So many begins ask to be run again."""
        self.lose_before_commit = 0
        """So many commits lose the connection before they are done."""
        self.lose_after_commit = 0
        """So many commits are done, but their answer is lost."""
        self.driven_away_by: set[Any] = set()
        """A begin with one of these events loses the connection."""
        self._begin = store.begin
        store.begin = self.begin  # type: ignore[method-assign]
        for name in ("lease", "read", "delete", "set_aside", "due"):
            setattr(store.outbox, name, self._checked(getattr(store.outbox, name)))

    async def begin(self, inbox: Sequence[InboxEntry] = ()) -> Any:
        self.check()
        if self.transient:
            self.transient -= 1
            raise TransientError("deadlock detected")
        if any(entry.event_id in self.driven_away_by for entry in inbox):
            raise UnavailableError("the database closed the connection")
        transaction = await self._begin(inbox)
        commit = transaction.commit

        async def faulty_commit(*arguments: Any) -> None:
            if self.is_away or self.lose_before_commit:
                self.lose_before_commit = max(self.lose_before_commit - 1, 0)
                await transaction.rollback()
                raise UnavailableError("the connection was lost before the commit")
            await commit(*arguments)
            if self.lose_after_commit:
                self.lose_after_commit -= 1
                raise UnavailableError("the connection was lost after the commit")

        transaction.commit = faulty_commit  # type: ignore[method-assign]
        return transaction

    def check(self) -> None:
        if self.is_away:
            raise UnavailableError("the database is away")

    def _checked(self, method: Any) -> Any:
        async def checked(*arguments: Any) -> Any:
            self.check()
            return await method(*arguments)

        return checked


class ClaimsFaults:
    """Stands before every claims keeper in memory, for the bus opens one of its own on the shared table."""

    def __init__(self, monkeypatch: Any) -> None:
        self.away: set[str] = set()
        """The methods that can't reach the server."""
        self.calls: list[str] = []
        for name in ("claim", "complete", "release"):
            monkeypatch.setattr(MemoryClaims, name, self._checked(name, getattr(MemoryClaims, name)))

    def _checked(self, name: str, method: Any) -> Any:
        async def checked(claims: MemoryClaims, *arguments: Any) -> Any:
            self.calls.append(name)
            if name in self.away:
                raise UnavailableError("Redis is away")
            return await method(claims, *arguments)

        return checked
