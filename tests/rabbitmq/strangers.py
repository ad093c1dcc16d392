"""Messages that no client of ours would send: properties as raw bytes, beside any body."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from orderbus._core.message import Outgoing, Receipt
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from orderbus.adapters.rabbitmq.encoder import PublishEncoder

CONTENT_TYPE, ENCODING, HEADERS, DELIVERY_MODE, PRIORITY, CORRELATION, REPLY_TO = (1 << bit for bit in range(15, 8, -1))
MESSAGE_ID, TIMESTAMP, TYPE, _, APP, CLUSTER = (1 << bit for bit in range(7, 1, -1))
PERSISTENT = b"\x02"


class Raw(Outgoing, frozen=True):
    """A message to publish with these bytes as its properties; all other fields but exchange, routing key and body are ignored."""

    properties: bytes = b"\x00\x00"


class RawEncoder(PublishEncoder):
    def encode(self, message: Outgoing, sequence: int) -> bytes:
        if not isinstance(message, Raw):
            return super().encode(message, sequence)
        frame = super().encode(Outgoing(message.exchange, message.routing_key, b"", "m", "t"), sequence)
        method = frame[: struct.unpack_from(">xxxI", frame)[0] + 8]
        payload = struct.pack(">HHQ", 60, 0, len(message.body)) + message.properties
        header = struct.pack(">BHI", 2, self._channel, len(payload)) + payload + b"\xce"
        return b"".join((method, header, *self._pieces(message.body)))


@asynccontextmanager
async def stranger(url: str) -> AsyncIterator[RabbitBroker]:
    """A broker that publishes Raw messages as they are."""
    async with open_broker(url, name="stranger") as broker:
        publisher = await broker._ready_publisher()
        publisher._encoder.__class__ = RawEncoder
        yield broker


async def publish_raw(url: str, queue: str, messages: Sequence[tuple[bytes, bytes]]) -> None:
    """Properties and body of each, straight to a queue. Raises AssertionError where the broker took one of them not."""
    async with stranger(url) as broker:
        receipts = await broker.publish([Raw("", queue, body, "m", "t", properties=raw) for raw, body in messages])
        assert set(receipts) <= {Receipt.CONFIRMED}, receipts


def short(text: bytes | str) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return bytes([len(data)]) + data


def text(name: bytes | str, value: bytes | str) -> bytes:
    """An entry of a header table: a string."""
    data = value.encode() if isinstance(value, str) else value
    return short(name) + b"S" + struct.pack(">I", len(data)) + data


def number(name: str, value: int) -> bytes:
    """An entry of a header table: a 64-bit integer."""
    return short(name) + b"l" + struct.pack(">q", value)


def properties(parts: dict[int, bytes]) -> bytes:
    """Encoded values by their flags, as they go over the wire; a header table without its length."""
    parts = {DELIVERY_MODE: PERSISTENT, **parts}
    if HEADERS in parts:
        parts[HEADERS] = struct.pack(">I", len(parts[HEADERS])) + parts[HEADERS]
    return struct.pack(">H", sum(parts)) + b"".join(parts[flag] for flag in sorted(parts, reverse=True))
