"""What AMQP would let through, and what it makes of it: so that a program which works here works on a real broker, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from orderbus._core.message import Headers, HeaderValue, Outgoing, Properties

__all__ = ["received_properties"]

BODY_LIMIT_BYTES = 16 << 20
"""RabbitMQ 4.0 takes no larger one."""
SHORT_STRING_BYTES = 255
MAX_HEADERS = 64
MAX_DEPTH = 8
MAX_HEADER_BYTES = 16 << 10
LAST_TIMESTAMP_S = 253402300799
"""The last second of the year 9999."""


def received_properties(message: Outgoing) -> Properties | None:
    """The properties as a consumer will read them; None where the message can't be sent and is to be refused."""
    if len(message.body) > BODY_LIMIT_BYTES or not 0 <= (message.timestamp_s or 0) <= LAST_TIMESTAMP_S:
        return None
    try:
        for name in (message.exchange, message.routing_key, message.message_id, message.type, message.content_type):
            _short_string_bytes(name)
        headers, size_bytes = _table(message.headers, 1) if message.headers else ({}, 0)
    except _UnsendableError:
        return None
    if len(headers) > MAX_HEADERS or size_bytes > MAX_HEADER_BYTES:
        return None
    return Properties(message.message_id, message.type, message.content_type, message.timestamp_s, headers)


class _UnsendableError(Exception):
    pass


def _table(table: Headers, depth: int) -> tuple[dict[str, HeaderValue], int]:
    """A copy in plain types, and its size on the wire."""
    copy: dict[str, HeaderValue] = {}
    size_bytes = 0
    for name, value in table.items():
        size_bytes += _short_string_bytes(name)
        if type(value) is str:
            copy[name] = value
            size_bytes += 5 + _text_bytes(value)
        else:
            copy[name], more = _value(value, depth)
            size_bytes += more
    return copy, size_bytes


def _value(value: HeaderValue, depth: int) -> tuple[HeaderValue, int]:
    match value:
        case str():
            return value, 5 + _text_bytes(value)
        case bytes():
            return value, 5 + len(value)
        case bool():
            return value, 2
        case None:
            return value, 1
        case int() if -(1 << 63) <= value < 1 << 63:
            return value, 9
        case float() if isfinite(value):
            return value, 9
        case Mapping() if depth < MAX_DEPTH:
            table, size_bytes = _table(value, depth + 1)
            return table, 5 + size_bytes
        case Sequence() if depth < MAX_DEPTH:
            items = [_value(item, depth + 1) for item in value]
            return [item for item, _ in items], 5 + sum(size_bytes for _, size_bytes in items)
    raise _UnsendableError


def _short_string_bytes(text: str) -> int:
    size_bytes = _text_bytes(text)
    if size_bytes > SHORT_STRING_BYTES:
        raise _UnsendableError
    return 1 + size_bytes


def _text_bytes(text: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise _UnsendableError from error
