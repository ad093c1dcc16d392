"""What arrives on a channel: one sink for consuming, one for publishing, one for channel 0. State machines, no I/O.

After a method that has content, a channel sends one header frame, then body frames until the announced size is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from struct import Struct

from orderbus._core.message import BodyNotKept, Incoming, Properties
from orderbus.adapters.rabbitmq.confirms import Confirms
from orderbus.adapters.rabbitmq.fields import SEQUENCE, sequence_of
from orderbus.adapters.rabbitmq.frames import (
    BASIC_ACK,
    BASIC_CANCEL,
    BASIC_DELIVER,
    BASIC_NACK,
    BASIC_RETURN,
    BODY,
    CHANNEL_CLOSE,
    CHANNEL_CLOSE_OK,
    CONNECTION_BLOCKED,
    CONNECTION_CLOSE,
    CONNECTION_UNBLOCKED,
    HEADER,
    METHOD,
    FrameError,
)

PLACES_KEPT = 1024

_method_at = Struct(">I").unpack_from
_deliver_at = Struct(">QB").unpack_from
_confirm_at = Struct(">QB").unpack_from
_size_at = Struct(">4xQ").unpack_from
_code_at = Struct(">H").unpack_from
_CONFIRM_BYTES = 13  # class, method, tag, bits
_LEAST_HEADER_BYTES = 14  # class, weight, body size, property flags


class Delivery(Incoming):
    """An Incoming that is quick to make: one for each message."""

    __slots__ = ()

    def __init__(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        body: bytes,
        tag: int,
        epoch: int,
        redelivered: bool,
        raw: bytes,
        decode: Callable[[bytes], Properties],
    ) -> None:
        self.queue = queue
        self.exchange = exchange
        self.routing_key = routing_key
        self.body = body
        self.tag = tag
        self.epoch = epoch
        self.redelivered = redelivered
        self.raw = raw
        self._properties = None
        self._decode = decode


class ChannelSink(ABC):
    """What both kinds of channel do: notice their end, once."""

    def __init__(self) -> None:
        self.is_closed = False
        self.failure: str | None = None
        """Why nothing can be sent on the channel any more. A frame on a closed channel would end the connection (504)."""

    def fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self.on_failure()

    @abstractmethod
    def on_failure(self) -> None: ...

    @abstractmethod
    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool: ...

    def _other_method(self, method: int, data: bytes, start: int, end: int) -> bool:
        if end - start < 4:
            raise FrameError("a method frame is cut short")
        if method == CHANNEL_CLOSE:
            reason = _reason(data, start, end)
            self.is_closed = True
            self.fail(f"the broker closed the channel: {reason}")
        elif method == CHANNEL_CLOSE_OK:
            self.is_closed = True
            self.fail("the channel is closed")
        return True


class DeliverySink(ChannelSink):
    """Assembles deliveries of one queue into `arrived`. `notify` is called when it had been empty, and at the end."""

    def __init__(
        self,
        queue: str,
        epoch: int,
        decode: Callable[[bytes], Properties],
        notify: Callable[[], None],
        max_body: int,
    ) -> None:
        super().__init__()
        self.arrived: list[Incoming] = []
        self.cancelled: str | None = None
        """Why no delivery will follow, while the channel itself lives on and takes settlements."""
        self._queue = queue
        self._epoch = epoch
        self._decode = decode
        self._notify = notify
        self._max_body = max_body
        self._pending: Delivery | None = None
        self._size = -1  # -1: no header yet
        self._body = bytearray()  # not a list of pieces: a broker may cut a body into millions of them
        self._have = 0
        self._is_skipping = False
        self._places: dict[bytes, tuple[str, str]] = {}

    def on_failure(self) -> None:
        self._notify()

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == METHOD:
            (method,) = _method_at(data, start)
            if method != BASIC_DELIVER:
                if method == BASIC_CANCEL:
                    self.cancelled = "the broker cancelled the consumer: the queue was deleted, or its leader moved"
                    self._notify()
                return self._other_method(method, data, start, end)
            if self._pending is not None:
                raise FrameError("a delivery began inside another")
            at = start + 5 + data[start + 4]
            tag, redelivered = _deliver_at(data, at)
            where = data[at + 9 : end]
            exchange, routing_key = self._places.get(where) or self._place(where)
            self._pending = Delivery(
                self._queue,
                exchange,
                routing_key,
                b"",
                tag,
                self._epoch,
                redelivered & 1 == 1,
                b"",
                self._decode,
            )
            return False
        pending = self._pending
        if pending is None:
            raise FrameError("a content frame without a method")
        if kind == HEADER and self._size < 0:
            if end - start < _LEAST_HEADER_BYTES:
                raise FrameError("a content header is cut short")
            (size,) = _size_at(data, start)
            pending.raw = data[start + 12 : end]
            if size == 0:
                self._complete(pending)
            else:
                self._size = size
                if size > self._max_body:
                    self._begin_skipping(pending, size)
        elif kind == BODY and self._size >= 0:
            length = end - start
            if length == self._size and not self._have and not self._is_skipping:
                pending.body = data[start:end]
                self._complete(pending)
            else:
                self._piece(pending, data[start:end])
        else:
            raise FrameError(f"a frame of type {kind} inside a delivery")
        return False

    def _place(self, where: bytes) -> tuple[str, str]:
        """The exchange and the routing key, of which a queue sees few: a topic's buckets."""
        key = where[0] + 2
        if key + where[key - 1] != len(where):
            raise FrameError("a delivery's names do not end where their frame does")
        found = _text(where, 0, key - 1), _text(where, key - 1, len(where))
        if len(self._places) >= PLACES_KEPT:
            self._places.clear()
        self._places[where] = found
        return found

    def _begin_skipping(self, pending: Delivery, size: int) -> None:
        """Hand the message over without its body, its properties saying why."""

        def refuse(raw: bytes) -> Properties:
            raise BodyNotKept(f"the body takes {size} bytes, and was not kept: {self._max_body} is the limit")

        pending._decode = refuse
        self._is_skipping = True

    def _piece(self, pending: Delivery, piece: bytes) -> None:
        if not self._is_skipping:
            self._body += piece
        self._have += len(piece)
        if self._have > self._size:
            raise FrameError("a body is longer than announced")
        if self._have == self._size:
            pending.body = bytes(self._body)
            self._body = bytearray()
            self._have = 0
            self._is_skipping = False
            self._complete(pending)

    def _complete(self, pending: Delivery) -> None:
        self._pending = None
        self._size = -1
        arrived = self.arrived
        arrived.append(pending)
        if len(arrived) == 1:
            self._notify()


class ConfirmSink(ChannelSink):
    """Feeds acks, nacks and returns of a publishing channel to its Confirms."""

    def __init__(self, confirms: Confirms) -> None:
        super().__init__()
        self._confirms = confirms
        self._is_returning = False
        self._left = -1  # bytes of a returned body still to come; -1: no header yet

    def on_failure(self) -> None:
        self._confirms.lose()

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == METHOD:
            (method,) = _method_at(data, start)
            if method in (BASIC_ACK, BASIC_NACK):
                if end - start != _CONFIRM_BYTES:
                    raise FrameError("a confirm has a wrong length")
                tag, bits = _confirm_at(data, start + 4)
                self._confirms.answer(tag, multiple=bits & 1 == 1, accepted=method == BASIC_ACK)
                return False
            if method != BASIC_RETURN:
                return self._other_method(method, data, start, end)
            if self._is_returning:
                raise FrameError("a return began inside another")
            self._is_returning = True
        elif kind == HEADER and self._is_returning and self._left < 0:
            if end - start < _LEAST_HEADER_BYTES:
                raise FrameError("a content header is cut short")
            (size,) = _size_at(data, start)
            self._returned(data[start + 12 : end])
            self._left = size
        elif kind == BODY and self._left > 0:
            self._left -= end - start
            if self._left < 0:
                raise FrameError("a body is longer than announced")
        else:
            raise FrameError(f"a frame of type {kind} outside of a returned message")
        if self._left == 0:
            self._is_returning = False
            self._left = -1
        return False

    def _returned(self, raw: bytes) -> None:
        sequence = sequence_of(raw)
        if sequence is None:
            # Only what we sent is returned, and all we send has the header. Without it nobody may be told "confirmed".
            raise FrameError(f"a returned message has no {SEQUENCE} header")
        if not self._confirms.returned(sequence):
            raise FrameError(f"a message was returned under the number {sequence}, which waits for no answer")


class ConnectionSink:
    """Overhears channel 0, whose frames all go to aiormq as well."""

    is_closed = False

    def __init__(self, on_close: Callable[[str], None], on_blocked: Callable[[str | None], None]) -> None:
        self._on_close = on_close
        self._on_blocked = on_blocked

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == METHOD:
            if end - start < 4:
                raise FrameError("a method frame is cut short")
            (method,) = _method_at(data, start)
            if method == CONNECTION_CLOSE:
                self._on_close(f"the broker closed the connection: {_reason(data, start, end)}")
            elif method == CONNECTION_BLOCKED:
                self._on_blocked(_text(data, start + 4, end))
            elif method == CONNECTION_UNBLOCKED:
                self._on_blocked(None)
        return True


def _reason(data: bytes, start: int, end: int) -> str:
    """What a close method says: code, text, then the method that it blames."""
    (code,) = _code_at(data, start + 4)
    return f"{_text(data, start + 6, end)} ({code})"


def _text(data: bytes, at: int, end: int) -> str:
    """A short string that must end before its frame does."""
    stop = at + 1 + data[at]
    if stop > end:
        raise FrameError("a text is longer than its frame")
    return str(data[at + 1 : stop], "utf-8", "backslashreplace")
