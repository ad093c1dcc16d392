"""A message as the frames of a publish: always mandatory, always persistent, numbered. No I/O."""

from __future__ import annotations

from struct import Struct

from orderbus._core.message import Headers, Outgoing
from orderbus.adapters.rabbitmq.fields import (
    CONTENT_TYPE,
    DELIVERY_MODE,
    HEADERS,
    LAST_TIMESTAMP_S,
    MESSAGE_ID,
    SEQUENCE,
    TIMESTAMP,
    TYPE,
    Unsendable,
    encode_headers,
    short_string,
)
from orderbus.adapters.rabbitmq.frames import BASIC_PUBLISH, BODY, FRAME_OVERHEAD, HEADER, METHOD, frame_head

MAX_BODY = 16 * 1024 * 1024
"""RabbitMQ 4.0 takes no larger one."""

_MANDATORY = b"\x01"
_PERSISTENT = b"\x02"
_FRAME_END = b"\xce"
_FLAGS = CONTENT_TYPE | HEADERS | DELIVERY_MODE | MESSAGE_ID | TYPE
_SEQUENCE_ENTRY = short_string(SEQUENCE) + b"l"
_SEQUENCE_BYTES = len(_SEQUENCE_ENTRY) + 8
_CACHE_LIMIT = 4096

_header = Struct(">BHIHHQH")
_sequence = Struct(f">I{len(_SEQUENCE_ENTRY)}sq").pack
_timestamp = Struct(">Q").pack


class PublishEncoder:
    """Encodes publishes for one channel. Frame heads of a route, and the strings that recur, are encoded once."""

    def __init__(self, channel: int, frame_max: int) -> None:
        self._channel = channel
        self._max_piece = frame_max - FRAME_OVERHEAD
        self._routes: dict[tuple[str, str], bytes] = {}
        self._strings: dict[str, bytes] = {}

    def encode(self, message: Outgoing, sequence: int) -> bytes:
        """All frames of one publish. Raises Unsendable, naming what is wrong."""
        body = message.body
        size = len(body)
        if size > MAX_BODY:
            raise Unsendable(f"the body takes {size} bytes; {MAX_BODY} is the limit")
        route = (message.exchange, message.routing_key)
        method = self._routes.get(route) or self._encode_route(route)
        strings = self._strings
        content_type = strings.get(message.content_type) or self._encode_string(message.content_type)
        type_ = strings.get(message.type) or self._encode_string(message.type)
        headers = encode_headers(_without_sequence(message.headers))
        flags, timestamp = _FLAGS, b""
        if message.timestamp_s is not None:
            if not 0 <= message.timestamp_s <= LAST_TIMESTAMP_S:
                raise Unsendable(f"the timestamp {message.timestamp_s} is not between 1970 and the year 9999")
            flags |= TIMESTAMP
            timestamp = _timestamp(message.timestamp_s)
        properties = b"".join(
            (
                content_type,
                _sequence(_SEQUENCE_BYTES + len(headers), _SEQUENCE_ENTRY, sequence),
                headers,
                _PERSISTENT,
                short_string(message.message_id),
                timestamp,
                type_,
            )
        )
        header = _header.pack(HEADER, self._channel, 14 + len(properties), 60, 0, size, flags)
        if 0 < size <= self._max_piece:
            head = frame_head.pack(BODY, self._channel, size)
            return b"".join((method, header, properties, _FRAME_END, head, body, _FRAME_END))
        return b"".join((method, header, properties, _FRAME_END, *self._pieces(body)))

    def _pieces(self, body: bytes) -> list[bytes]:
        frames: list[bytes] = []
        for start in range(0, len(body), self._max_piece):
            piece = body[start : start + self._max_piece]
            frames += (frame_head.pack(BODY, self._channel, len(piece)), piece, _FRAME_END)
        return frames

    def _encode_route(self, route: tuple[str, str]) -> bytes:
        exchange, routing_key = route
        payload = b"".join(
            (BASIC_PUBLISH.to_bytes(4, "big"), b"\x00\x00", short_string(exchange), short_string(routing_key), _MANDATORY)
        )
        if len(self._routes) >= _CACHE_LIMIT:
            self._routes.clear()
        self._routes[route] = frame = frame_head.pack(METHOD, self._channel, len(payload)) + payload + _FRAME_END
        return frame

    def _encode_string(self, text: str) -> bytes:
        if len(self._strings) >= _CACHE_LIMIT:
            self._strings.clear()
        self._strings[text] = encoded = short_string(text)
        return encoded


def _without_sequence(headers: Headers) -> Headers:
    """A second sequence number, of a message that somebody published again as it came, would be taken for ours."""
    if SEQUENCE not in headers:
        return headers
    return {name: value for name, value in headers.items() if name != SEQUENCE}
