"""One delivery in a consumer's hands, and the two orders in which a consumer takes up its deliveries."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, cast
from uuid import UUID

import msgspec

from orderbus._core.codec import BodyDecoder, body_hash
from orderbus._core.delivery import State, Step, step
from orderbus._core.event import Event, event_type
from orderbus._core.handler import Handler, Plan
from orderbus._core.ids import uuid7_time_ms
from orderbus._core.message import ATTEMPT, FIRST_FAILED_AT, KEY, NOT_BEFORE, Headers, HeaderValue, Incoming, header_bytes
from orderbus._core.policy import LONGEST_DELAY_S
from orderbus._core.signing import SigningKeys
from orderbus._core.trace_context import TraceHeaders
from orderbus.errors import MessageError, UsageError

MOST_HEADERS = 48
MOST_HEADER_BYTES = 12 * 1024
"""What a sender may use of the 64 headers and 16 KiB that can be sent: the broker and we add to them."""
_ADDED = ("ob-", "x-death", "x-delivery-count", "x-first-death-", "x-last-death-")


class Route:
    """A handler made ready for one of its topics: its plan, the decoder, and the keys where messages must be signed."""

    __slots__ = ("decoder", "handler", "plan", "signing", "topic")

    def __init__(
        self, handler: Handler, plan: Plan, event: type[Event], *, limit_bytes: int, signing: SigningKeys | None = None
    ) -> None:
        self.handler = handler
        self.plan = plan
        self.topic = event_type(event).topic
        self.decoder = BodyDecoder(event, limit_bytes=limit_bytes)
        self.signing = signing


class Work(msgspec.Struct, eq=False):
    """A delivery on its way through a consumer. A Struct, made in a fraction of the time that a class with `__init__` takes."""

    incoming: Incoming
    state: State = State.QUEUED
    route: Route = cast(Any, None)
    """The handler; None before it was read."""
    id: UUID = cast(Any, None)
    event: Event = cast(Any, None)
    key: str | None = None
    attempt: int = 1
    failures: int = 0
    """How often a server was missing in a row: uncounted."""
    claim: str | None = None
    """The token under which its handler has run, while that could not be written down yet."""
    error: Exception | None = None
    """What its last try failed with."""
    first_failed_at: float | None = None
    not_before: float | None = None
    solo: bool = False
    """Run it alone: it shared a transaction that failed."""
    crowded: bool = False
    """It has held back so many followers that the other keys would wait too."""
    refusals: int = 0
    """How often what it became could not be published."""
    trace: TraceHeaders | None = None
    """The trace that it came with."""
    span: Any = None
    """The `process` span of its last try, where that is recorded."""
    outcome: str = ""
    """What became of its last try, for the span."""
    parks_for: str = ""
    """The reason, where it is on its way to the dead letters."""
    yields: bool = False
    """It has been failing for so long that it may be parked for the sake of other keys."""

    def read(self, routes: dict[str, Route], *, now_s: float, window_s: float) -> None:
        """Find the route, the id, the key and the event. Raises MessageError for what its handler can't read."""
        properties = self.incoming.properties
        topic = properties.type or self.incoming.routing_key.rpartition(".")[0]
        route = routes.get(topic)
        if route is None:
            if properties.type or len(routes) != 1:
                raise MessageError("unknown-topic", f"topic {topic[:120]!r} is not handled by this queue ({', '.join(routes)})")
            route = next(iter(routes.values()))
        self.route = route
        if route.signing is not None:
            route.signing.check(route.topic, properties, self.incoming.body)
        headers = properties.headers
        if len(headers) > 16 or len(self.incoming.raw) > MOST_HEADER_BYTES:
            _check_size(headers)
        self.id = _event_id(properties.message_id)
        made_ms = uuid7_time_ms(self.id)
        if made_ms is not None and made_ms / 1000 < now_s - window_s:
            raise MessageError(
                "older-than-window", f"the event is older than the dedupe window of {window_s:g} s, so it may have been handled"
            )
        key = headers.get(KEY)
        self.key = key if isinstance(key, str) else None
        attempt = headers.get(ATTEMPT, 0)
        if not isinstance(attempt, int) or isinstance(attempt, bool) or not 0 <= attempt < 1_000_000:
            raise MessageError("malformed-attempt", f"header {ATTEMPT} is {str(attempt)[:40]!r}, not a count")
        self.attempt = attempt + 1
        if FIRST_FAILED_AT in headers:
            self.first_failed_at = _time(headers[FIRST_FAILED_AT])
        if NOT_BEFORE in headers:
            not_before = _time(headers[NOT_BEFORE])
            is_ahead = not_before is not None and now_s + 0.5 < not_before < now_s + LONGEST_DELAY_S + 86_400
            self.not_before = not_before if is_ahead else None
        self.event = route.decoder.decode(self.incoming.body, properties.content_type)

    @property
    def hash(self) -> int:
        """The fingerprint by which another body under the same id is known."""
        return body_hash(self.incoming.body)

    def take(self, taken: Step) -> None:
        self.state = step(self.state, taken)


def _time(value: HeaderValue) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _check_size(headers: Headers) -> None:
    sent = {name: value for name, value in headers.items() if not name.startswith(_ADDED)}
    if len(sent) > MOST_HEADERS:
        raise MessageError("too-many-headers", f"the message has {len(sent)} headers; the limit is {MOST_HEADERS}")
    size_bytes = header_bytes(sent)
    if size_bytes > MOST_HEADER_BYTES:
        raise MessageError("headers-too-large", f"the headers take {size_bytes} bytes; the limit is {MOST_HEADER_BYTES}")


def _event_id(text: str | None) -> UUID:
    if text is None:
        raise MessageError("no-event-id", "the message has no message_id; it must be the event's UUID")
    try:
        return msgspec.convert(text, UUID)  # a fifth of what UUID(text) costs
    except msgspec.ValidationError:
        raise MessageError("no-event-id", f"message_id {text[:60]!r} is not a UUID") from None


class AnyOrder:
    """First come, first served; those that wait let the others pass."""

    def __init__(self) -> None:
        self._ready: deque[Work] = deque()
        self._waiting: list[tuple[float, int, Work]] = []
        self._ticket = 0

    def add(self, works: Iterable[Work]) -> None:
        """New deliveries, in the order of the queue."""
        self._ready.extend(works)

    def take(self, most: int) -> list[Work]:
        """Up to `most` deliveries to run together now; a solo one comes alone."""
        ready = self._ready
        taken: list[Work] = []
        while ready and len(taken) < most:
            if ready[0].solo:
                if not taken:
                    taken.append(ready.popleft())
                break
            taken.append(ready.popleft())
        return taken

    def wait(self, work: Work, until: float) -> None:
        """Have a taken one again once the clock says `until`."""
        self._ticket += 1
        heapq.heappush(self._waiting, (until, self._ticket, work))

    def done(self, work: Work) -> None:
        """A taken one has left."""

    def wake(self, now: float) -> None:
        """Make those ready whose wait is over."""
        while self._waiting and self._waiting[0][0] <= now:
            self._ready.append(heapq.heappop(self._waiting)[2])

    def next_due(self) -> float | None:
        """When the next wait is over."""
        return self._waiting[0][0] if self._waiting else None

    def ready(self) -> int:
        """How many `take` could give now."""
        return len(self._ready)

    def drain(self) -> list[Work]:
        """Give up everything that is not taken."""
        left = [*self._ready, *(work for _, _, work in self._waiting)]
        self._ready.clear()
        self._waiting.clear()
        return left


class KeyOrder(AnyOrder):
    """One at a time for each key, in the order of the queue; a key that waits holds back its own followers only.

    The key is read from the header, before the body is decoded; a message whose header can't be read has no key, and so
    no order.
    """

    def __init__(self, most_followers: int) -> None:
        super().__init__()
        self._lanes: dict[str, deque[Work]] = {}
        self._most_followers = most_followers

    def add(self, works: Iterable[Work]) -> None:
        for work in works:
            key = work.key = _peek_key(work.incoming)
            if key is None:
                self._ready.append(work)
            elif key in self._lanes:
                self._lanes[key].append(work)
                if len(self._lanes[key]) > self._most_followers:
                    self._crowd_out(key)
            else:
                self._lanes[key] = deque()
                self._ready.append(work)

    def done(self, work: Work) -> None:
        if work.key is None or work.key not in self._lanes:
            return
        lane = self._lanes[work.key]
        if lane:
            self._ready.append(lane.popleft())
        else:
            del self._lanes[work.key]

    def wait(self, work: Work, until: float) -> None:
        super().wait(work, until)
        if work.key is not None and len(self._lanes.get(work.key, ())) > self._most_followers:
            self._crowd_out(work.key)

    def _crowd_out(self, key: str) -> None:
        """A key's followers may not fill the prefetch: its waiting head comes out now, to be parked, if it has failed for long."""
        for entry in self._waiting:
            if entry[2].key == key and entry[2].yields:
                entry[2].crowded = True
                self._ready.append(entry[2])
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                return

    def drain(self) -> list[Work]:
        left = super().drain()
        for lane in self._lanes.values():
            left.extend(lane)
            lane.clear()
        return left


def _peek_key(incoming: Incoming) -> str | None:
    try:
        key = incoming.properties.headers.get(KEY)
    except MessageError:
        return None
    return key if isinstance(key, str) else None


def by_key(works: Sequence[Work]) -> list[Work]:
    """Sorted by key, stable: without it, two consumers that update the same rows deadlocked in 26 of 80 batches."""
    return sorted(works, key=lambda work: work.key or "")


def check_tx_result(result: object, place: str) -> Sequence[Event]:
    """The events that a handler returned. Raises UsageError for anything else."""
    if result is None:
        return ()
    if isinstance(result, Event):
        return (result,)
    if isinstance(result, (list, tuple)) and all(isinstance(event, Event) for event in result):
        return result
    raise UsageError(
        f"{place}: returned {type(result).__name__}; a handler returns None, an event, or a sequence of events", code="OB307"
    )
