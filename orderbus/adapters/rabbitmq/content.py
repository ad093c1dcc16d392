"""What arrives on a channel: one sink for consuming, one for publishing, one for channel 0. State machines, no I/O.

After a method that has content, a channel sends one header frame, then body frames until the announced size is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from struct import Struct

from orderbus._core.message import Incoming, Properties
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
from orderbus.errors import MessageError

MAX_BODY = 128 * 1024 * 1024
"""The default of RabbitMQ's own limit before 4.0, so nothing that such a broker holds is out of reach."""

_method_at = Struct(">I").unpack_from
_deliver_at = Struct(">QBB").unpack_from
_confirm_at = Struct(">QB").unpack_from
_size_at = Struct(">4xQ").unpack_from
_code_at = Struct(">HB").unpack_from


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

    def _other_method(self, method: int, data: bytes, start: int) -> bool:
        if method == CHANNEL_CLOSE:
            self.is_closed = True
            code, length = _code_at(data, start + 4)
            self.fail(f"the broker closed the channel: {_text(data, start + 7, length)} ({code})")
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
        max_body: int = MAX_BODY,
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
        self._pieces: list[bytes] = []
        self._have = 0
        self._is_skipping = False

    def on_failure(self) -> None:
        self._notify()

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == METHOD:
            (method,) = _method_at(data, start)
            if method != BASIC_DELIVER:
                if method == BASIC_CANCEL:
                    self.cancelled = "the broker cancelled the consumer: the queue was deleted, or its leader moved"
                    self._notify()
                return self._other_method(method, data, start)
            if self._pending is not None:
                raise FrameError("a delivery began inside another")
            at = start + 5 + data[start + 4]
            tag, redelivered, length = _deliver_at(data, at)
            at += 10
            key = at + length + 1
            self._pending = Delivery(
                self._queue,
                str(data[at : at + length], "utf-8", "backslashreplace"),
                str(data[key : key + data[key - 1]], "utf-8", "backslashreplace"),
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
            if length == self._size and not self._is_skipping:
                pending.body = data[start:end]
                self._complete(pending)
            else:
                self._piece(pending, data[start:end])
        else:
            raise FrameError(f"a frame of type {kind} inside a delivery")
        return False

    def _begin_skipping(self, pending: Delivery, size: int) -> None:
        """Hand the message over without its body, its properties saying why."""

        def refuse(raw: bytes) -> Properties:
            raise MessageError("body-too-large", f"the body takes {size} bytes, was not kept; {self._max_body} is the limit")

        pending._decode = refuse
        self._is_skipping = True

    def _piece(self, pending: Delivery, piece: bytes) -> None:
        if not self._is_skipping:
            self._pieces.append(piece)
        self._have += len(piece)
        if self._have > self._size:
            raise FrameError("a body is longer than announced")
        if self._have == self._size:
            pending.body = b"".join(self._pieces)
            self._pieces.clear()
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
                tag, bits = _confirm_at(data, start + 4)
                self._confirms.answer(tag, multiple=bits & 1 == 1, accepted=method == BASIC_ACK)
                return False
            if method != BASIC_RETURN:
                return self._other_method(method, data, start)
            self._is_returning = True
        elif kind == HEADER and self._is_returning and self._left < 0:
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
        self._confirms.returned(sequence)


class ConnectionSink:
    """Overhears channel 0, whose frames all go to aiormq as well."""

    is_closed = False

    def __init__(self, on_close: Callable[[str], None], on_blocked: Callable[[str | None], None]) -> None:
        self._on_close = on_close
        self._on_blocked = on_blocked

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == METHOD:
            (method,) = _method_at(data, start)
            if method == CONNECTION_CLOSE:
                code, length = _code_at(data, start + 4)
                self._on_close(f"the broker closed the connection: {_text(data, start + 7, length)} ({code})")
            elif method == CONNECTION_BLOCKED:
                self._on_blocked(_text(data, start + 5, data[start + 4]))
            elif method == CONNECTION_UNBLOCKED:
                self._on_blocked(None)
        return True


def _text(data: bytes, at: int, length: int) -> str:
    return str(data[at : at + length], "utf-8", "backslashreplace")
