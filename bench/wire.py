"""A raw AMQP client on a blocking socket: pamqp for the few control frames, content frames by hand.

It fills and empties queues for the workloads, and is the practical limit that the tables compare with: nothing that a client
must do per message is left out (unique ids, persistent messages, confirms, acknowledgements), and nothing is added.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import msgspec
from pamqp import commands, frame
from pamqp.header import ContentHeader

from bench.job import Job, Sample, samples

READ_BYTES = 1 << 18
BATCH = 500
_END = b"\xce"
_CONFIRMED = struct.Struct(">QB")
_TAG = struct.Struct(">Q")
METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
_encode = msgspec.json.Encoder().encode


class Wire:
    """One connection, one channel. Use it as a context manager."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 5672), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bytes = bytearray()
        self._parts: list[bytes] = []
        self._missing = 0
        self._tag = 0
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._expect(0, "Connection.Start")
        login = f"\0{unquote(parts.username or 'guest')}\0{unquote(parts.password or 'guest')}"
        self._send(0, commands.Connection.StartOk(mechanism="PLAIN", response=login, client_properties={"product": "bench"}))
        self._expect(0, "Connection.Tune")
        self._send(0, commands.Connection.TuneOk(channel_max=16, frame_max=131072, heartbeat=0))
        self._send(0, commands.Connection.Open(virtual_host=unquote(parts.path[1:]) or "/"))
        self._expect(0, "Connection.OpenOk")
        self._send(1, commands.Channel.Open())
        self._expect(1, "Channel.OpenOk")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._send(0, commands.Connection.Close(200, "bye", 0, 0))
            self._expect(0, "Connection.CloseOk")
        finally:
            self._socket.close()

    def declare(self, queue: str, arguments: Mapping[str, Any] | None = None) -> None:
        """A durable quorum queue, unless the arguments say otherwise."""
        self._send(
            1, commands.Queue.Declare(queue=queue, durable=True, arguments={"x-queue-type": "quorum", **(arguments or {})})
        )
        self._expect(1, "Queue.DeclareOk")

    def bind(self, queue: str, exchange: str, routing_key: str, kind: str = "topic") -> None:
        self._send(1, commands.Exchange.Declare(exchange=exchange, exchange_type=kind, durable=True))
        self._expect(1, "Exchange.DeclareOk")
        self._send(1, commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=routing_key))
        self._expect(1, "Queue.BindOk")

    def delete(self, queue: str) -> None:
        self._send(1, commands.Queue.Delete(queue=queue))
        self._expect(1, "Queue.DeleteOk")

    def ready(self, queue: str) -> int:
        """How many messages wait in the queue, those in a consumer's hands not counted."""
        self._send(1, commands.Queue.Declare(queue=queue, passive=True))
        found: int = self._expect(1, "Queue.DeclareOk").message_count
        return found

    # Publishing

    def confirms(self) -> None:
        self._send(1, commands.Confirm.Select())
        self._expect(1, "Confirm.SelectOk")

    def publish(self, messages: Iterable[bytes]) -> None:
        """Send ready frames of one batch in one write."""
        self._socket.sendall(b"".join(messages))

    def confirmed_up_to(self, last: int, so_far: int) -> int:
        """Wait until every publish up to number `last` is confirmed."""
        while so_far < last:
            for _, kind, payload in self._frames():
                if kind == METHOD and payload[:4] == b"\x00\x3c\x00\x50":
                    tag, multiple = _CONFIRMED.unpack_from(payload, 4)
                    so_far = max(so_far, tag) if multiple else so_far + 1
                elif kind == METHOD:
                    raise RuntimeError(f"the broker answered {frame.unmarshal(_framed(1, payload))[2]}")
        return so_far

    # Consuming

    def consume(self, queue: str, prefetch: int) -> None:
        self._send(1, commands.Basic.Qos(prefetch_count=prefetch))
        self._expect(1, "Basic.QosOk")
        self._send(1, commands.Basic.Consume(queue=queue, consumer_tag="bench"))
        self._expect(1, "Basic.ConsumeOk")

    def cancel(self) -> None:
        """Wait until the queue has done it. Acks that a close follows at once are lost on RabbitMQ 3.10: a quorum queue puts them
        off behind the end of their consumer; a cancel is carried out after them."""
        self._send(1, commands.Basic.Cancel(consumer_tag="bench"))
        self._expect(1, "Basic.CancelOk")

    def deliveries(self) -> tuple[int, list[bytes]]:
        """What has arrived whole, at least one: the last one's tag, and the bodies."""
        bodies: list[bytes] = []
        last = 0
        while not bodies:
            for _, kind, payload in self._frames():
                if kind == METHOD:
                    self._tag = _TAG.unpack_from(payload, 5 + payload[4])[0]
                elif kind == HEADER:
                    self._missing = int.from_bytes(payload[4:12], "big")
                elif kind == BODY:
                    self._parts.append(payload)
                    self._missing -= len(payload)
                    if not self._missing:
                        bodies.append(b"".join(self._parts))
                        self._parts.clear()
                        last = self._tag
        return last, bodies

    def ack(self, tag: int) -> None:
        self._socket.sendall(b"\x01\x00\x01\x00\x00\x00\x0d\x00\x3c\x00\x50" + tag.to_bytes(8, "big") + b"\x01\xce")

    # Frames

    def _send(self, channel: int, command: Any) -> None:
        self._socket.sendall(frame.marshal(command, channel))

    def _expect(self, channel: int, name: str) -> Any:
        while True:
            for number, kind, payload in self._frames(one=True):
                if kind == HEARTBEAT:
                    continue
                found: Any = frame.unmarshal(_framed(number, payload, kind))[2]
                if found.name == name and number == channel:
                    return found
                if found.name in ("Channel.Close", "Connection.Close"):
                    raise RuntimeError(f"the broker closed instead of {name}: {found.reply_text}")

    def _frames(self, *, one: bool = False) -> Iterator[tuple[int, int, bytes]]:
        """The whole frames that have arrived (`one`: the first of them), after a read where there is none."""
        data = self._bytes
        if not _whole(data):
            received = self._socket.recv(READ_BYTES)
            if not received:
                raise ConnectionError("the broker closed the connection")
            data += received
        at = 0
        view = bytes(data)
        size = len(view)
        while size - at >= 8:
            kind = view[at]
            end = at + 7 + int.from_bytes(view[at + 3 : at + 7], "big")
            if end >= size:
                break
            number, payload = int.from_bytes(view[at + 1 : at + 3], "big"), view[at + 7 : end]
            at = end + 1
            if one:
                del data[:at]
            yield number, kind, payload
            if one:
                return
        del data[:at]


def _whole(data: bytearray) -> bool:
    return len(data) >= 8 and len(data) >= 8 + int.from_bytes(data[3:7], "big")


def _framed(number: int, payload: bytes, kind: int = METHOD) -> bytes:
    return struct.pack(">BHI", kind, number, len(payload)) + payload + _END


class Envelope:
    """Makes the frames of a message: everything but the ids and the sizes is made once."""

    def __init__(self, exchange: str, routing_key: str, topic: str, headers: Mapping[str, str] | None = None) -> None:
        self._method = frame.marshal(commands.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=True), 1)
        properties = commands.Basic.Properties(
            content_type="application/json",
            headers={"ob-key": "K" * 36, **(headers or {})},
            delivery_mode=2,
            message_id="M" * 36,
            timestamp=datetime.now(UTC),
            message_type=topic,
        )
        made = frame.marshal(ContentHeader(0, 0, properties), 1)
        key, message_id = made.index(b"K" * 36), made.index(b"M" * 36)
        self._to_size, self._to_key = made[:11], made[19:key]
        self._to_id, self._to_end = made[key + 36 : message_id], made[message_id + 36 :]

    def frames(self, message_id: str, key: str, body: bytes) -> bytes:
        size = len(body)
        return b"".join(
            (
                self._method,
                self._to_size,
                size.to_bytes(8, "big"),
                self._to_key,
                key.encode(),
                self._to_id,
                message_id.encode(),
                self._to_end,
                b"\x03\x00\x01",
                size.to_bytes(4, "big"),
                body,
                _END,
            )
        )


def event_id(number: int) -> str:
    """A UUIDv7 of now, different for every number."""
    return str(UUID(int=((time.time_ns() // 1_000_000) << 80) | (0x7 << 76) | (0x2 << 62) | number))


def message(queue: str, body: bytes, properties: commands.Basic.Properties) -> bytes:
    """The frames of any message to a queue, for peers whose own format differs; they make it with their own encoders."""
    parts = (
        frame.marshal(commands.Basic.Publish(exchange="", routing_key=queue, mandatory=True), 1),
        frame.marshal(ContentHeader(0, len(body), properties), 1),
        struct.pack(">BHI", BODY, 1, len(body)) + body + _END,
    )
    return b"".join(parts)


def fill(job: Job, frames: Callable[[Sample], bytes] | None = None, *, queue: str | None = None) -> None:
    """Put the job's messages into its queue, which exists, each confirmed. `frames` makes those of a peer with a format of its own."""
    if frames is None:
        envelopes = _envelopes(queue or job.queue, job)

        def frames(sample: Sample) -> bytes:
            envelope = envelopes[sample.number % len(envelopes)]
            return envelope.frames(event_id(sample.number), str(sample.order_id), _encode(sample))

    with Wire(job.broker_url) as wire:
        wire.confirms()
        sent = confirmed = 0
        batch: list[bytes] = []
        for sample in samples(job):
            batch.append(frames(sample))
            if len(batch) == BATCH:
                wire.publish(batch)
                sent += len(batch)
                batch.clear()
                confirmed = wire.confirmed_up_to(sent - 2 * BATCH, confirmed)
        wire.publish(batch)
        wire.confirmed_up_to(sent + len(batch), confirmed)


def _envelopes(queue: str, job: Job) -> list[Envelope]:
    """One; or, where a share of the messages is to be sampled, a hundred with and without that flag in their trace context."""
    if "sampled" not in job.options:
        return [Envelope("", queue, job.topic)]
    sampled = round(100 * job.options["sampled"])
    parents = (f"00-{number + 1:032x}-{number + 1:016x}-{int(number < sampled):02x}" for number in range(100))
    return [Envelope("", queue, job.topic, {"traceparent": parent}) for parent in parents]


class Numbered(msgspec.Struct):
    number: int


def drain(url: str, queue: str, count: int) -> tuple[int, int]:
    """Take everything out of a queue; how many of the numbers 0 to count-1 are missing, and how many came again."""
    decode = msgspec.json.Decoder(Numbered).decode
    seen = bytearray(count)
    with Wire(url) as wire:
        waiting = wire.ready(queue)
        if waiting:
            wire.consume(queue, 2000)
        while waiting > 0:
            tag, bodies = wire.deliveries()
            wire.ack(tag)
            waiting -= len(bodies)
            for body in bodies:
                seen[decode(body).number] += 1
    lost = seen.count(0)
    return lost, sum(seen) - (count - lost)
