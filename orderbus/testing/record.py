"""What happened in a test: each try of a handler, each event that was emitted, and what the handlers' transactions cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Literal
from uuid import UUID

import anyio
import msgspec

from orderbus import Event
from orderbus._core.message import Outgoing
from orderbus.abc import Deferred, OutboxRow

__all__ = ["HANDLING", "Cost", "Emission", "Record", "Try"]

HANDLING: ContextVar[str | None] = ContextVar("orderbus.testing.handling", default=None)
"""The handler (as `group.name`) that the running code was called for."""


class Try(msgspec.Struct, frozen=True):
    """One call of a handler with one event."""

    handler: str
    """Its name with its group, as the inbox knows it: `payments.orders.placed`."""
    event: Event
    id: UUID
    attempt: int
    """1 for the first."""
    outcome: Literal["handled", "duplicate", "retried", "parked", "waits"]
    """`waits`: a server was missing, or the database asked to run the transaction again; uncounted."""
    error: Exception | None
    at_s: float
    """When it ended, in seconds since the TestBus was opened."""


class Emission(msgspec.Struct, frozen=True):
    """An event of a committed transaction, or one that was published without any."""

    id: UUID | None
    topic: str
    body: bytes
    content_type: str
    handler: str | None
    """Who emitted it; None for the test's own code."""


class Cost(msgspec.Struct, frozen=True):
    """What a handler cost on average for each message that it handled."""

    messages: int
    """How many it handled."""
    statements: float
    """SQL statements a message. Deferred writes of a transaction count once for each text, as they are sent."""
    emitted: float
    """Events a message."""
    queries: dict[str, float]
    """The statements by their text, the most frequent first."""

    def __str__(self) -> str:
        lines = [f"{self.statements:g} statements and {self.emitted:g} events a message (of {self.messages})"]
        return "\n".join([*lines, *(f"  {count:g}× {text}" for text, count in self.queries.items())])


class Record:
    """Written by the servers and the engines of one TestBus, at the moment at which something takes effect."""

    def __init__(self) -> None:
        self.tries: list[Try] = []
        self.emissions: list[Emission] = []
        self.on_commit: Callable[[], None] = lambda: None
        self.messages: dict[str, Outgoing] = {}
        """What was published, by event id."""
        self.tried: Counter[tuple[str, UUID]] = Counter()
        """How often each handler was called for each event."""
        self.applied: set[tuple[str, UUID]] = set()
        """Which handler's effect of which event was committed to the store in memory, by its last try."""
        self._opened_at = anyio.current_time()
        self._known: set[str] = set()
        self._unheard_of: dict[str, Emission] = {}
        """Published, and of a transaction of which nobody has said that it was committed; most were published directly."""
        self._queries: dict[str, Counter[str]] = {}
        self._emitted: Counter[str] = Counter()
        self.changed = anyio.Event()
        """Set, and replaced by another, when something has changed that `settled` looks at."""

    @property
    def elapsed_s(self) -> float:
        return round(anyio.current_time() - self._opened_at, 6)  # an hour is an hour, on a clock that does not begin at 0, too

    def wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def input(self, event_id: UUID) -> None:
        """An event that the test itself publishes, and that nobody has emitted."""
        self._known.add(str(event_id))

    def attempted(self, tried: Try) -> None:
        if tried.outcome == "waits" and (tried.handler, tried.id) in self.applied:
            tried = msgspec.structs.replace(tried, outcome="handled")  # its commit took place, only that nobody heard
        self.tries.append(tried)
        self.tried[tried.handler, tried.id] += 1
        self.wake()

    def committed(self, statements: Sequence[str], deferred: Sequence[Deferred], emitted: Sequence[OutboxRow]) -> None:
        handler = HANDLING.get()
        for row in emitted:
            self._known.add(str(row.event_id))
            if (early := self._unheard_of.pop(str(row.event_id), None)) is not None:
                self.emissions.remove(early)  # the relay found the row before the commit had returned to its caller
            self.emissions.append(Emission(row.event_id, row.topic, row.body, row.content_type, handler))
        if handler is not None:
            texts = [*statements, *dict.fromkeys(item.sql for item in deferred)]
            self._queries.setdefault(handler, Counter()).update(" ".join(text.split()) for text in texts)
            self._emitted[handler] += len(emitted)
        self.on_commit()

    def published(self, message: Outgoing) -> None:
        """The broker has taken an event; one that nobody has committed was published directly."""
        self.messages.setdefault(message.message_id, message)
        if message.message_id in self._known:
            return
        self._known.add(message.message_id)
        handler = HANDLING.get()
        if handler is not None:
            self._emitted[handler] += 1
        emission = Emission(_uuid(message.message_id), message.type, message.body, message.content_type, handler)
        self._unheard_of[message.message_id] = emission
        self.emissions.append(emission)

    def cost(self, handlers: Sequence[str]) -> Cost | None:
        """Of these handlers together; None where they have handled nothing."""
        messages = sum(one.outcome == "handled" and one.handler in handlers for one in self.tries)
        if not messages:
            return None
        queries: Counter[str] = sum((self._queries.get(name, Counter()) for name in handlers), Counter())
        return Cost(
            messages,
            queries.total() / messages,
            sum(self._emitted[name] for name in handlers) / messages,
            {text: count / messages for text, count in queries.most_common()},
        )


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
