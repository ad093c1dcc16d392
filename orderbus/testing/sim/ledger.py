"""What really happened in a run, written down by the servers themselves, and which promise it breaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from orderbus._core.handler import Handler
from orderbus._core.message import Outgoing
from orderbus._core.parked import Parked
from orderbus._core.topology import EVENTS_EXCHANGE
from orderbus.abc import InboxEntry, OutboxRow

__all__ = ["Ledger", "Statement"]

Params = Sequence[Any] | Mapping[str, Any]


class Statement(msgspec.Struct, frozen=True):
    """A statement of a committed transaction, and which events that transaction handled for whom."""

    sql: str
    params: Params
    handled: tuple[InboxEntry, ...] = ()


class Ledger:
    """Kept by the servers at the moment at which something takes effect there, whether or not anybody hears of it."""

    def __init__(self) -> None:
        self.broken: list[str] = []
        """The promises that were seen to be broken."""
        self.statements: list[Statement] = []
        self.emitted: dict[str, tuple[int, OutboxRow]] = {}
        """By event id, with its place in the order of the commits."""
        self._reached: dict[str, list[str]] = {}
        self._published: dict[str, int] = {}
        self._first_published: set[str] = set()
        self._direct: set[str] = set()
        self._handlers: dict[str, Handler] = {}
        self._handled: dict[tuple[str, str], int] = {}
        self._last_handled: dict[tuple[str, str], str] = {}
        self._acked: set[tuple[str, str]] = set()
        self._claims: dict[str, _Claim] = {}
        self._granted: set[tuple[str, object]] = set()
        self._overrun: set[tuple[str, str]] = set()

    def knows(self, handlers: Sequence[Handler]) -> None:
        """Whose queues and whose order are looked at."""
        self._handlers.update((handler.consumer, handler) for handler in handlers)

    def publishes_directly(self, event_id: str) -> None:
        """Published without any transaction, as the program wants it."""
        self._direct.add(event_id)

    # What the servers tell

    def committed(
        self, entered: Sequence[InboxEntry], statements: Sequence[tuple[str, Params]], emitted: Sequence[OutboxRow]
    ) -> None:
        for row in emitted:
            self.emitted[str(row.event_id)] = (len(self.emitted), row)
        for entry in entered:
            self._handles(str(entry.event_id), entry.consumer)
        handled = tuple(entered)
        self.statements += [Statement(sql, params, handled) for sql, params in statements]

    def accepted(self, message: Outgoing, queues: Sequence[str]) -> None:
        """The broker has taken a message into these queues."""
        if message.exchange != EVENTS_EXCHANGE:
            return
        reached = self._reached.setdefault(message.message_id, [])
        reached += [queue for queue in queues if queue not in reached]
        known = self.emitted.get(message.message_id)
        if known is None:
            if message.message_id not in self._direct:
                self.broken.append(f"ghost: event {message.message_id} ({message.type}) was published, and nobody committed it")
            return
        place, row = known
        if row.key is None or row.due_at_ms is not None:
            return
        last = self._published.get(row.key, -1)
        if place > last:
            self._published[row.key] = place
        elif message.message_id in self._first_published:
            return
        else:
            self.broken.append(f"disordered: {self._name(message.message_id)} was published after a later one of its key")
        self._first_published.add(message.message_id)

    def acked(self, queue: str, message_id: str | None) -> None:
        self._acked.add((queue, message_id or ""))

    def granted(self, key: str, holder: object, until: float) -> None:
        """A claim was granted. `holder` is a process in one of its lives, and its token."""
        self._granted.add((key, holder))
        claim = self._claims.get(key)
        now = anyio.current_time()
        if claim is not None and claim.until > now and claim.holder != holder:
            self.broken.append(f"doubled: the claim of {key} was granted while another held it")
        self._claims[key] = _Claim(holder, until)

    def completed(self, key: str, holder: object, until: float, *, is_stored: bool) -> None:
        """A handler has done its work; where that is not stored, its claim had run out, or it was never granted."""
        _, _, name = key.partition("inbox:")
        consumer, _, event_id = name.rpartition(":")
        if (key, holder) not in self._granted:
            self.broken.append(f"doubled: {key} was handled without its claim")
            return
        if not is_stored:
            self._overrun.add((event_id, consumer))
            return
        claim = self._claims.get(key)
        if claim is not None:
            claim.holder, claim.until = None, until
        if consumer:
            self._handles(event_id, consumer)

    def released(self, key: str, holder: object) -> None:
        claim = self._claims.get(key)
        if claim is not None and claim.holder == holder:
            del self._claims[key]

    def _handles(self, event_id: str, consumer: str) -> None:
        times = self._handled[event_id, consumer] = self._handled.get((event_id, consumer), 0) + 1
        if times > 1:
            self.broken.append(f"doubled: {self._name(event_id)} was handled {times} times by {consumer}")
            return
        handler, known = self._handlers.get(consumer), self.emitted.get(event_id)
        if handler is None or not handler.options.ordered or known is None:
            return
        place, row = known
        if row.key is None or row.due_at_ms is not None:
            return
        last = self._last_handled.get((handler.queue, row.key))
        if last is not None and self.emitted[last][0] > place:
            self.broken.append(f"disordered: {consumer} handled {self._name(event_id)} after {self._name(last)}")
        self._last_handled[handler.queue, row.key] = event_id

    # What must hold in the end

    def broken_promises(self, parked: Sequence[Parked], expects: Callable[[Parked], bool]) -> list[str]:
        """All that is broken, once everything has come to rest."""
        broken = list(self.broken)
        broken += [
            f"innocent: {self._name(letter.event_id or '')} was parked in {letter.queue}: {letter.reason}: {letter.error_text}"
            for letter in parked
            if not expects(letter)
        ]
        in_dlq = {(letter.origin, letter.event_id) for letter in parked}
        for event_id, (_, row) in self.emitted.items():
            if event_id not in self._reached and row.unrouted == "keep":
                broken.append(f"lost: {self._name(event_id)} was committed, and never published")
        for event_id, queues in self._reached.items():
            for queue in queues:
                if (queue, event_id) not in in_dlq and not self._is_done(event_id, queue):
                    broken.append(f"lost: {self._name(event_id)} reached {queue}, and was neither handled nor parked")
        return broken

    def _is_done(self, event_id: str, queue: str) -> bool:
        row = self.emitted.get(event_id)
        for handler in self._handlers.values():
            if handler.queue != queue or (row is not None and row[1].topic not in handler.topics):
                continue
            if handler.options.guard == "none":
                return (queue, event_id) in self._acked
            done = (event_id, handler.consumer)
            return done in self._handled or done in self._overrun
        return True  # of a queue that nobody here consumes

    def _name(self, event_id: str) -> str:
        known = self.emitted.get(event_id)
        if known is None:
            return f"event {event_id}"
        place, row = known
        return f"{row.topic} of key {row.key} (commit {place + 1}, event …{event_id[-6:]})"


class _Claim:
    __slots__ = ("holder", "until")

    def __init__(self, holder: object, until: float) -> None:
        self.holder = holder
        self.until = until
