"""A dead letter as a line of a file, exact in its bytes, and back; and what it looks like when it is put back or was edited."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any
from uuid import UUID, uuid5

import msgspec

from orderbus._core.ids import uuid7, uuid7_time_ms
from orderbus._core.leaving import (
    MOST_RAW_BYTES,
    PARKED_AT,
    QUEUE,
    RAW_PROPERTIES,
    REASON,
    kept_headers,
    replayed_message,
)
from orderbus._core.message import JSON, KEY, Headers, HeaderValue, Incoming, Outgoing, Properties
from orderbus._core.parked import is_dead_letter_queue, read_parked
from orderbus._core.signing import SIGNATURE, SigningKeys
from orderbus.errors import MessageError, UsageError

KIND = "orderbus-dead-letter-1"
EDITED_FROM = "ob-edited-from"
"""The id of the event that an edited letter was made from."""


class LetterRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dead letter with all that its queue holds of it. `raw_properties` are the AMQP bytes, where they came over a wire."""

    kind: str
    queue: str
    exchange: str
    routing_key: str
    message_id: str | None
    type: str | None
    content_type: str | None
    timestamp_s: int | None
    headers: Any
    """As in JSON, but bytes are `{"base64": …}`, tables `{"table": {…}}`. None where the properties could not be read."""
    body: bytes
    raw_properties: bytes


def record_of(incoming: Incoming) -> LetterRecord:
    try:
        properties, headers = incoming.properties, _packed(incoming.properties.headers)["table"]
    except MessageError:
        properties, headers = Properties(), None
    return LetterRecord(
        kind=KIND,
        queue=incoming.queue,
        exchange=incoming.exchange,
        routing_key=incoming.routing_key,
        message_id=properties.message_id,
        type=properties.type,
        content_type=properties.content_type,
        timestamp_s=properties.timestamp_s,
        headers=headers,
        body=incoming.body,
        raw_properties=incoming.raw,
    )


def read_record(line: bytes) -> Incoming:
    """The letter in a line, as its queue would deliver it. Raises UsageError that says what is wrong with the line."""
    try:
        record = _decoder.decode(line)
        headers = {} if record.headers is None else _unpacked({"table": record.headers})
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"is no dead letter that `orderbus dlq export` wrote: {error}", code="OB709") from None
    if record.kind != KIND:
        raise UsageError(f"is of kind {record.kind!r}; this orderbus reads {KIND!r}", code="OB709")
    if not is_dead_letter_queue(record.queue):
        raise UsageError(
            f"names the queue {record.queue!r}, which is not a dead letter queue (their names end in .dlq)", code="OB701"
        )
    if record.headers is None:
        headers = {RAW_PROPERTIES: record.raw_properties[:MOST_RAW_BYTES]}
    assert isinstance(headers, Mapping)
    return Incoming(
        queue=record.queue,
        exchange=record.exchange,
        routing_key=record.routing_key,
        body=record.body,
        tag=0,
        epoch=0,
        raw=record.raw_properties,
        properties=Properties(record.message_id, record.type, record.content_type, record.timestamp_s, headers),
    )


def write_record(incoming: Incoming) -> bytes:
    """One line, its end included."""
    return msgspec.json.encode(record_of(incoming)) + b"\n"


def returned_message(incoming: Incoming) -> Outgoing:
    """A letter for its dead letter queue again. What only the broker's own headers said (why, when) becomes ours."""
    letter, properties = read_parked(incoming), incoming.properties
    headers: dict[str, HeaderValue] = {REASON: letter.reason, QUEUE: letter.origin}
    if letter.parked_at_s is not None:
        headers[PARKED_AT] = letter.parked_at_s
    return Outgoing(
        exchange="",
        routing_key=incoming.queue,
        body=incoming.body,
        message_id=properties.message_id or "",
        type=properties.type or "",
        content_type=properties.content_type or JSON,
        timestamp_s=properties.timestamp_s,
        headers={**headers, **kept_headers(properties.headers)},
    )


def edited_message(
    incoming: Incoming, queue: str, body: bytes, *, event_id: UUID, signing: SigningKeys | None = None
) -> Outgoing:
    """A letter for its own queue again, with another body, signed anew; where its id is another, it says which it had."""
    message = msgspec.structs.replace(replayed_message(incoming, queue), body=body, message_id=str(event_id))
    headers = dict(message.headers)
    before = incoming.properties.message_id
    if before is not None and UUID(before) != event_id:
        headers[EDITED_FROM] = before
    if signing is not None:
        key = headers.get(KEY)
        key = key if isinstance(key, str) else None
        headers[SIGNATURE] = signing.sign(message.type, message.message_id, key, message.content_type, body)
    return msgspec.structs.replace(message, headers=headers)


def edited_id(event_id: UUID, queue: str) -> UUID:
    """The id that a letter gets by being edited: the same whenever it is edited again.

    So an edit that was killed after its publish may be repeated: with the same body it is a duplicate, with another a conflict,
    which is parked; never a second effect. The time in it stays, and with it what the dedupe window says.
    """
    made_ms = uuid7_time_ms(event_id)
    if made_ms is None:
        return uuid5(event_id, f"orderbus edit {queue}")
    return uuid7(made_ms, int.from_bytes(blake2b(event_id.bytes + queue.encode(), digest_size=10).digest(), "big"))


def fingerprint(incoming: Incoming) -> tuple[str | None, bytes]:
    """By what two letters of a queue are the same: the event's id and the body."""
    try:
        event_id = incoming.properties.message_id
    except MessageError:
        event_id = None
    return event_id, blake2b(incoming.body, digest_size=16).digest()


_decoder = msgspec.json.Decoder(LetterRecord)


def _packed(value: Headers | HeaderValue) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {"table": {name: _packed(inner) for name, inner in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_packed(inner) for inner in value]
    return value


def _unpacked(value: Any) -> HeaderValue:
    if isinstance(value, list):
        return [_unpacked(inner) for inner in value]
    if not isinstance(value, dict):
        return value  # type: ignore[no-any-return]
    match value:
        case {"base64": str(text), **rest} if not rest:
            return base64.b64decode(text, validate=True)
        case {"float": str(text), **rest} if not rest:
            return float(text)
        case {"table": dict(table), **rest} if not rest:
            return {name: _unpacked(inner) for name, inner in table.items()}
    raise ValueError(f"a header is {sorted(value)}, where one of base64, float and table was expected")
