"""Reading what lies in a dead letter queue: why, since when, from where, and whether it can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from uuid import UUID

import msgspec

from orderbus._core.ids import uuid7_time_ms
from orderbus._core.leaving import (
    ERROR,
    ERROR_TEXT,
    HANDLER,
    PARKED_AT,
    PARKING_HEADERS,
    QUEUE,
    RAW_PROPERTIES,
    REASON,
    kept_headers,
)
from orderbus._core.message import ATTEMPT, FIRST_FAILED_AT, KEY, NO_HEADERS, Headers, HeaderValue, Incoming
from orderbus._core.topology import LOST_QUEUE, dead_letter_queue
from orderbus.errors import MessageError

SUFFIX = dead_letter_queue("")
_SAID_ALREADY = PARKING_HEADERS | {ATTEMPT, FIRST_FAILED_AT, KEY}


class Parked(msgspec.Struct, frozen=True):
    """A dead letter. Whatever its headers did not say, or said in a wrong type, is None: strangers write to queues, too."""

    queue: str
    """Where it lies."""
    origin: str
    """The queue that it came from, and that a replay sends it to."""
    reason: str
    """Why it was parked: a stable word, or the handler's own. `delivery-limit`, `expired` and `lost` are the broker's work."""
    body: bytes
    event_id: str | None = None
    topic: str | None = None
    key: str | None = None
    handler: str | None = None
    error: str | None = None
    """The name of the exception's class."""
    error_text: str | None = None
    attempts: int | None = None
    first_failed_at_s: float | None = None
    parked_at_s: float | None = None
    content_type: str | None = None
    headers: Headers = NO_HEADERS
    """The message's own headers, without those that orderbus added and that are fields here."""
    raw_properties: bytes | None = None
    """Its properties as they came over the wire, where they could not be read."""


class Wanted(msgspec.Struct, frozen=True):
    """Which dead letters: those that match one of each list that is not empty. `*` and `?` stand for other characters."""

    reasons: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    handlers: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    """Name and value of a header of the message's own; unlike in the other lists, every one of them must match."""
    since_s: float | None = None
    """Parked at this Unix time or later. A letter that does not say when it was parked is not among them."""
    before_s: float | None = None

    def matches(self, parked: Parked) -> bool:
        return (
            _one_of(self.reasons, parked.reason)
            and _one_of(self.errors, parked.error)
            and _one_of(self.handlers, parked.handler)
            and (not self.ids or _id(parked.event_id) in map(_id, self.ids))
            and _one_of(self.keys, parked.key)
            and all(_one_of((value,), _shown(parked.headers.get(name))) for name, value in self.headers)
            and (self.since_s is None or (parked.parked_at_s is not None and parked.parked_at_s >= self.since_s))
            and (self.before_s is None or (parked.parked_at_s is not None and parked.parked_at_s < self.before_s))
        )


EVERYTHING = Wanted()


def is_dead_letter_queue(queue: str) -> bool:
    """Whether a queue keeps dead letters: looking into it takes nothing from any consumer."""
    return queue == LOST_QUEUE or (queue.endswith(SUFFIX) and queue != SUFFIX)


def read_parked(incoming: Incoming) -> Parked:
    """What a delivery from a dead letter queue says of itself. Never raises: a letter that can't be read must be shown, too."""
    try:
        properties = incoming.properties
    except MessageError as error:
        return Parked(
            queue=incoming.queue,
            origin=_origin(incoming, NO_HEADERS),
            reason=error.reason,
            body=incoming.body,
            error_text=str(error),
            raw_properties=incoming.raw,
        )
    headers = properties.headers
    attempts, raw = headers.get(ATTEMPT), headers.get(RAW_PROPERTIES)
    return Parked(
        queue=incoming.queue,
        origin=_origin(incoming, headers),
        reason=_text(headers, REASON) or _reason_of_the_broker(incoming.queue, headers),
        body=incoming.body,
        event_id=properties.message_id or None,
        topic=properties.type or None,
        key=_text(headers, KEY),
        handler=_text(headers, HANDLER),
        error=_text(headers, ERROR),
        error_text=_text(headers, ERROR_TEXT),
        attempts=attempts if isinstance(attempts, int) and not isinstance(attempts, bool) else None,
        first_failed_at_s=_seconds(headers, FIRST_FAILED_AT),
        parked_at_s=_seconds(headers, PARKED_AT) or _time_of_death(headers),
        content_type=properties.content_type,
        headers={name: value for name, value in kept_headers(headers).items() if name not in _SAID_ALREADY},
        raw_properties=raw if isinstance(raw, bytes) else None,
    )


def refusal(parked: Parked, *, now_s: float, window_s: float | None = None) -> str | None:
    """Why a replay would be no use; None where it may be tried. `window_s` is the dedupe window of its consumer, if known."""
    if parked.raw_properties is not None:
        return "its properties could not be read, so neither its event id is known; publish the event anew at its source"
    event_id = _id(parked.event_id)
    if not isinstance(event_id, UUID):
        return "it has no event id (a UUID), without which its consumer parks it again at once"
    made_ms = uuid7_time_ms(event_id)
    if window_s is not None and made_ms is not None and made_ms / 1000 < now_s - window_s:
        return (
            f"the event is older than the dedupe window of {window_s / 86_400:g} days: its consumer can't know whether it was "
            f"handled, and parks it again"
        )
    return None


def _origin(incoming: Incoming, headers: Headers) -> str:
    """The queue's name says it; its header, which a stranger may have written, only where that does not."""
    if incoming.queue.endswith(SUFFIX):
        return incoming.queue.removesuffix(SUFFIX)
    return _text(headers, QUEUE) or incoming.routing_key


def _reason_of_the_broker(queue: str, headers: Headers) -> str:
    if queue == LOST_QUEUE:
        return "lost"
    reason = _last_death(headers).get("reason")
    return reason.replace("_", "-") if isinstance(reason, str) else "unknown"


def _time_of_death(headers: Headers) -> float | None:
    return _seconds(_last_death(headers), "time")


def _last_death(headers: Headers) -> Mapping[str, HeaderValue]:
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, Sequence) and not isinstance(deaths, (str, bytes)) and deaths else None
    return newest if isinstance(newest, Mapping) else {}


def _text(headers: Headers, name: str) -> str | None:
    value = headers.get(name)
    return value if isinstance(value, str) else None


def _seconds(headers: Headers, name: str) -> float | None:
    value = headers.get(name)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _shown(value: HeaderValue) -> str | None:
    """A header's value as people write it; None for one that can't be compared with a text, as for one that is not there."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, (str, int, float)) else None


def _one_of(patterns: tuple[str, ...], value: str | None) -> bool:
    return not patterns or (value is not None and any(fnmatchcase(value, pattern) for pattern in patterns))


def _id(text: str | None) -> UUID | str | None:
    """An id to compare by: the same UUID may be written in several ways."""
    try:
        return UUID(text) if text else None
    except ValueError:
        return text
