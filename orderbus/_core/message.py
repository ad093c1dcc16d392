"""Messages as they cross the broker: what goes out, what comes in, and the headers that orderbus owns."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence

import msgspec

from orderbus.errors import MessageError

HeaderValue = str | int | float | bool | bytes | None | Sequence["HeaderValue"] | Mapping[str, "HeaderValue"]
Headers = Mapping[str, HeaderValue]
NO_HEADERS: Headers = {}

KEY = "ob-key"
VERSION = "ob-version"
ATTEMPT = "ob-attempt"
FIRST_FAILED_AT = "ob-first-failed-at"
NOT_BEFORE = "ob-not-before"

JSON = "application/json"
MSGPACK = "application/msgpack"


class Properties(msgspec.Struct, frozen=True):
    """The properties of a received message. Any of them may be missing: a stranger may have published it."""

    message_id: str | None = None
    type: str | None = None
    content_type: str | None = None
    timestamp_s: int | None = None
    headers: Headers = NO_HEADERS


class Outgoing(msgspec.Struct, frozen=True):
    """A message to publish: always persistent, always mandatory."""

    exchange: str
    routing_key: str
    body: bytes
    message_id: str
    type: str
    content_type: str = JSON
    timestamp_s: int | None = None
    headers: Headers = NO_HEADERS


class Receipt(enum.Enum):
    """What became of a published message."""

    CONFIRMED = "confirmed"
    """The broker has taken responsibility: it is on disk, in every queue that is bound."""
    UNROUTABLE = "unroutable"
    """No queue is bound to its routing key: the broker returned it, and keeps nothing."""
    REFUSED = "refused"
    """The broker said no (basic.nack, or the message is larger than it takes), or it was refused before sending."""
    UNKNOWN = "unknown"
    """The connection ended before the answer came: it may be in the queues, or not."""


class Settlement(enum.Enum):
    """How a delivery is given back to the broker."""

    ACK = "ack"
    """Done: the broker forgets it."""
    RELEASE = "release"
    """Given back politely (basic.nack with requeue): not a failure of the message."""
    REJECT = "reject"
    """Failed, and could not be moved elsewhere (basic.reject with requeue): counts towards the delivery limit."""
    DEAD_LETTER = "dead-letter"
    """No client could move it: the broker does (basic.reject), as it is, to where the queue says; away where it says nothing."""


class BodyNotKept(MessageError):
    """The body was larger than the adapter takes or sends, and was passed over. Only the broker still has it."""

    def __init__(self, detail: str) -> None:
        super().__init__("body-too-large", detail)


class Incoming:
    """A delivery as the broker's adapter hands it over; its properties are decoded when somebody asks.

    `tag` and `epoch` belong to the adapter: a settlement for an earlier epoch (a channel that is gone) is dropped.
    `delivery_count` is how often the broker had delivered it before (quorum queues; 0 on the first time).
    """

    __slots__ = ("_decode", "_properties", "body", "epoch", "exchange", "queue", "raw", "redelivered", "routing_key", "tag")

    def __init__(
        self,
        *,
        queue: str,
        exchange: str,
        routing_key: str,
        body: bytes,
        tag: int,
        epoch: int,
        redelivered: bool = False,
        raw: bytes = b"",
        properties: Properties | None = None,
        decode: Callable[[bytes], Properties] | None = None,
    ) -> None:
        self.queue = queue
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.tag = tag
        self.epoch = epoch
        self.redelivered = redelivered
        self.raw = raw
        self._properties = properties
        self._decode = decode

    @property
    def properties(self) -> Properties:
        """The decoded properties. Raises MessageError (`malformed-properties`) where the bytes in `raw` can't be read."""
        if self._properties is None:
            assert self._decode is not None
            try:
                self._properties = self._decode(self.raw)
            except MessageError:
                raise
            except Exception as error:  # whatever a decoder stumbles over harms this one message only
                raise MessageError("malformed-properties", f"{type(error).__name__}: {error}") from error
        return self._properties

    @property
    def delivery_count(self) -> int:
        count = self.properties.headers.get("x-delivery-count", 0)
        return count if isinstance(count, int) else 0

    def __repr__(self) -> str:
        return f"Incoming(queue={self.queue!r}, tag={self.tag}, epoch={self.epoch}, {len(self.body)} bytes)"


def header_bytes(value: HeaderValue) -> int:
    """The most that a header's value takes on the wire."""
    if isinstance(value, str):
        return 5 + len(value.encode("utf-8", "replace"))
    if isinstance(value, bytes):
        return 5 + len(value)
    if isinstance(value, Mapping):
        return 5 + sum(1 + len(name.encode("utf-8", "replace")) + header_bytes(inner) for name, inner in value.items())
    if isinstance(value, Sequence):
        return 5 + sum(header_bytes(inner) for inner in value)
    return 9
