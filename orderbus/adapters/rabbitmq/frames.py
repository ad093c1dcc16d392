"""AMQP 0-9-1 frames: splitting a byte stream into them, and the settlement frames. No I/O.

A frame is `type(1) channel(2) length(4) payload(length) 0xCE` (AMQP 0-9-1 specification, section 2.3.5).
"""

from __future__ import annotations

from struct import Struct, error
from typing import Protocol

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
FRAME_END = 0xCE
HEARTBEAT_FRAME = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FRAME_OVERHEAD = 8
MAX_FRAME = 16 * 1024 * 1024
"""A longer frame is taken for garbage: RabbitMQ sends 128 KiB at most, unless it is configured otherwise."""

frame_head = Struct(">BHI")
_head_at = frame_head.unpack_from
_settlement = Struct(">BHIIQBB")

# class << 16 | method, as the first four bytes of a method frame's payload hold them
CONNECTION_CLOSE = 10 << 16 | 50
CONNECTION_BLOCKED = 10 << 16 | 60
CONNECTION_UNBLOCKED = 10 << 16 | 61
CHANNEL_CLOSE = 20 << 16 | 40
CHANNEL_CLOSE_OK = 20 << 16 | 41
BASIC_CANCEL = 60 << 16 | 30
BASIC_PUBLISH = 60 << 16 | 40
BASIC_RETURN = 60 << 16 | 50
BASIC_DELIVER = 60 << 16 | 60
BASIC_ACK = 60 << 16 | 80
BASIC_REJECT = 60 << 16 | 90
BASIC_NACK = 60 << 16 | 120


class FrameError(Exception):
    """The bytes are not AMQP frames, or come in an order that AMQP forbids. Nothing after them can be trusted."""


class Sink(Protocol):
    """Takes the frames of one channel."""

    is_closed: bool
    """The channel is over: no frame of it will follow, and its number may be used again."""

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        """Take the payload `data[start:end]`. True where aiormq must see the frame too."""


class FrameSplitter:
    """Hands the frames of the channels in `routes` to their sinks, and the others back."""

    def __init__(self) -> None:
        self.routes: dict[int, Sink] = {}
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes as they arrive; the whole frames that are aiormq's, unchanged. Raises FrameError."""
        if self._rest:
            data = self._rest + data
        routes = self.routes
        others: list[bytes] = []
        at, size = 0, len(data)
        try:
            while size - at > 7:
                kind, channel, length = _head_at(data, at)
                start = at + 7
                end = start + length
                if end >= size:
                    if length > MAX_FRAME:
                        raise FrameError(f"a frame of {length} bytes was announced")
                    break
                if data[end] != FRAME_END:
                    raise FrameError(f"a frame on channel {channel} does not end with 0xCE")
                sink = routes.get(channel)
                if sink is None:
                    others.append(data[at : end + 1])
                elif sink.frame(kind, data, start, end):
                    others.append(data[at : end + 1])
                    if sink.is_closed:
                        routes.pop(channel, None)
                at = end + 1
        except (IndexError, UnicodeDecodeError, error) as failure:
            raise FrameError(f"a method frame could not be read: {failure}") from failure
        self._rest = data[at:]
        return b"".join(others)


def ack(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    return _settlement.pack(METHOD, channel, 13, BASIC_ACK, tag, multiple, FRAME_END)


def nack_requeue(channel: int, tag: int) -> bytes:
    return _settlement.pack(METHOD, channel, 13, BASIC_NACK, tag, 2, FRAME_END)


def reject(channel: int, tag: int, *, requeue: bool) -> bytes:
    return _settlement.pack(METHOD, channel, 13, BASIC_REJECT, tag, requeue, FRAME_END)
