"""Message properties and header tables, from bytes and to bytes, under limits. No I/O.

Field types as RabbitMQ uses them: https://www.rabbitmq.com/amqp-0-9-1-errata.html, section 3. What is decoded can be encoded
again, so that a message which was read can also be parked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from struct import Struct, error
from typing import Any

from orderbus._core.message import NO_HEADERS, HeaderValue, Properties
from orderbus.errors import MessageError

SEQUENCE = "ob-seq"
"""The header with the publish sequence number of its channel: how a returned message is told from its neighbours."""
_OUR_SEQUENCE = b"\x06ob-seql"

MAX_HEADERS = 64
MAX_DEPTH = 8
MAX_TABLE_BYTES = 16 * 1024
BROKER_ROOM_BYTES = 4 * 1024
"""What the broker and we ourselves may add to a table that was within the limits: x-death, x-delivery-count, ob-seq."""
LAST_TIMESTAMP_S = 253402300799
"""The last second of the year 9999, where calendars end."""

CONTENT_TYPE, HEADERS, DELIVERY_MODE, MESSAGE_ID, TIMESTAMP, TYPE = 1 << 15, 1 << 13, 1 << 12, 1 << 7, 1 << 6, 1 << 5
_OTHER_STRINGS_BEFORE_ID = (1 << 10, 1 << 9, 1 << 8)  # correlation-id, reply-to, expiration
_OTHER_STRINGS_AT_END = (1 << 4, 1 << 3, 1 << 2)  # user-id, app-id, cluster-id
_CONTENT_ENCODING, _PRIORITY, _UNDEFINED = 1 << 14, 1 << 11, 0b11

_u16, _u32, _u64, _i64, _f64 = Struct(">H"), Struct(">I"), Struct(">Q"), Struct(">q"), Struct(">d")
_u16_at, _u32_at, _u64_at = _u16.unpack_from, _u32.unpack_from, _u64.unpack_from


class Unsendable(ValueError):
    """A message that AMQP, or one of the limits, does not let through. Refused before anything is sent."""


class _Malformed(Exception):
    pass


def decode_properties(raw: bytes) -> Properties:
    """The properties in a content header: `raw` is what follows the body size. Raises MessageError (`malformed-properties`)."""
    try:
        return _decode_properties(raw)
    except UnicodeDecodeError as failure:
        raise MessageError("malformed-properties", f"a name or property is not UTF-8: {failure.object[:80]!r}") from failure
    except (IndexError, error) as failure:
        raise MessageError("malformed-properties", "the properties end in the middle of a value") from failure
    except _Malformed as failure:
        raise MessageError("malformed-properties", str(failure)) from failure


def _decode_properties(raw: bytes) -> Properties:
    (flags,) = _u16_at(raw, 0)
    if flags & _UNDEFINED:
        raise _Malformed("undefined property flags are set")
    at = 2
    content_type = message_id = type_ = timestamp_s = None
    headers = NO_HEADERS
    # A string that is cut short moves `at` beyond the end, which the last check sees.
    if flags & CONTENT_TYPE:
        end = at + 1 + raw[at]
        content_type = str(raw[at + 1 : end], "utf-8")
        at = end
    if flags & _CONTENT_ENCODING:
        at += 1 + raw[at]
    if flags & HEADERS:
        (length,) = _u32_at(raw, at)
        at += 4
        if length > MAX_TABLE_BYTES + BROKER_ROOM_BYTES:
            raise _Malformed(f"the headers take {length} bytes; {MAX_TABLE_BYTES} is the limit")
        if at + length > len(raw):
            raise _Malformed("the header table is cut short")
        end = at + length
        # Ours comes first; passing over it here spares a tenth of the whole.
        table = _decode_table(raw, at + 16 if raw.startswith(_OUR_SEQUENCE, at) else at, end, 1)
        at = end
        table.pop(SEQUENCE, None)
        if len(table) > MAX_HEADERS:
            _check_count(table)
        headers = table
    if flags & DELIVERY_MODE:
        at += 1
    if flags & _PRIORITY:
        at += 1
    if flags & 0x700:
        for flag in _OTHER_STRINGS_BEFORE_ID:
            if flags & flag:
                at += 1 + raw[at]
    if flags & MESSAGE_ID:
        end = at + 1 + raw[at]
        message_id = str(raw[at + 1 : end], "utf-8")
        at = end
    if flags & TIMESTAMP:
        (timestamp_s,) = _u64_at(raw, at)
        if timestamp_s > LAST_TIMESTAMP_S:
            raise _Malformed(f"the timestamp {timestamp_s} is past the year 9999: it counts seconds since 1970")
        at += 8
    if flags & TYPE:
        end = at + 1 + raw[at]
        type_ = str(raw[at + 1 : end], "utf-8")
        at = end
    if flags & 0x1C:
        for flag in _OTHER_STRINGS_AT_END:
            if flags & flag:
                at += 1 + raw[at]
    if at != len(raw):
        raise _Malformed("the properties do not end where their frame does")
    return Properties(message_id, type_, content_type, timestamp_s, headers)


def sequence_of(raw: bytes) -> int | None:
    """The publish sequence number in the content header of a message that we sent and the broker returned."""
    (flags,) = _u16_at(raw, 0)
    at = 2
    for flag in (CONTENT_TYPE, _CONTENT_ENCODING):
        if flags & flag:
            at += 1 + raw[at]
    if not flags & HEADERS:
        return None
    try:
        value = _decode_table(raw, at + 4, at + 4 + _u32_at(raw, at)[0], 1).get(SEQUENCE)
    except _Malformed:
        return None
    return value if isinstance(value, int) else None


def _check_count(table: dict[str, HeaderValue]) -> None:
    """Headers that the broker adds (x-death and the like) do not count: the sender can't help them."""
    count = sum(not name.startswith("x-") for name in table)
    if count > MAX_HEADERS:
        raise _Malformed(f"{count} headers; {MAX_HEADERS} is the limit")


def _decode_table(raw: bytes, at: int, end: int, depth: int) -> dict[str, HeaderValue]:
    table: dict[str, HeaderValue] = {}
    while at < end:
        start = at + 1
        at = start + raw[at]
        name = str(raw[start:at], "utf-8")
        kind = raw[at]
        if kind == 0x53:  # S, by far the most common; the same in _decode_value
            start = at + 5
            at = start + _u32_at(raw, at + 1)[0]
            value = raw[start:at]
            try:
                table[name] = str(value, "utf-8")
            except UnicodeDecodeError:
                table[name] = value
        else:
            table[name], at = _decode_value(kind, raw, at + 1, end, depth)
    if at != end:
        raise _Malformed("a header is longer than its table")
    return table


def _decode_value(kind: int, raw: bytes, at: int, end: int, depth: int) -> tuple[HeaderValue, int]:
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        layout, convert = scalar
        return convert(*layout.unpack_from(raw, at)), at + layout.size
    if kind == 0x56:  # V
        return None, at
    if kind not in _NESTED_OR_LONG:
        raise _Malformed(f"a header has the unknown type {bytes([kind])!r}")
    start = at + 4
    stop = start + _u32_at(raw, at)[0]
    if stop > end:
        raise _Malformed("a header is longer than its table")
    if kind == 0x53:  # S
        return _text_or_bytes(raw[start:stop]), stop
    if kind == 0x78:  # x
        return raw[start:stop], stop
    if depth == MAX_DEPTH:
        raise _Malformed(f"the headers are nested more than {MAX_DEPTH} deep")
    if kind == 0x46:  # F
        return _decode_table(raw, start, stop, depth + 1), stop
    items: list[HeaderValue] = []
    while start < stop:
        item, start = _decode_value(raw[start], raw, start + 1, stop, depth + 1)
        items.append(item)
    if start != stop:
        raise _Malformed("an item is longer than its array")
    return items, stop


def _text_or_bytes(value: bytes) -> str | bytes:
    """A long string is text by custom only."""
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        return value


def _finite(value: float) -> float:
    if not isfinite(value):
        raise _Malformed("a header is not a finite number")
    return value


def _at_most_64_signed_bits(value: int) -> int:
    if value >= 1 << 63:
        raise _Malformed("a timestamp among the headers is out of range")
    return value


def _decimal(scale: int, mantissa: int) -> str:
    return str(Decimal(f"{mantissa}e-{scale}"))  # arithmetic would round to the context of whoever asks


_NESTED_OR_LONG = frozenset(b"SxFA")
_SCALARS: dict[int, tuple[Struct, Callable[..., HeaderValue]]] = {
    ord("t"): (Struct(">?"), bool),
    ord("b"): (Struct(">b"), int),
    ord("B"): (Struct(">B"), int),
    ord("s"): (Struct(">h"), int),
    ord("u"): (Struct(">H"), int),
    ord("I"): (Struct(">i"), int),
    ord("i"): (Struct(">I"), int),
    ord("l"): (Struct(">q"), int),
    ord("L"): (Struct(">q"), int),
    ord("f"): (Struct(">f"), _finite),
    ord("d"): (Struct(">d"), _finite),
    ord("D"): (Struct(">Bi"), _decimal),
    ord("T"): (Struct(">Q"), _at_most_64_signed_bits),
}


def encode_headers(headers: Mapping[str, HeaderValue]) -> bytes:
    """The entries of a header table, without its length. Raises Unsendable."""
    if not headers:
        return b""
    if len(headers) > MAX_HEADERS:
        raise Unsendable(f"{len(headers)} headers; {MAX_HEADERS} is the limit")
    out: list[bytes] = []
    for name, value in headers.items():
        if type(value) is str:
            text = _utf8(value)
            out += (_text_entry(name), _u32.pack(len(text)), text)
        else:
            out.append(short_string(name))
            _encode_value(value, out, 1)
    entries = b"".join(out)
    if len(entries) > MAX_TABLE_BYTES:
        raise Unsendable(f"the headers take {len(entries)} bytes; {MAX_TABLE_BYTES} is the limit")
    return entries


@functools.lru_cache(maxsize=1024)
def _text_entry(name: str) -> bytes:
    """What comes before the length of a long string."""
    return short_string(name) + b"S"


def short_string(text: str) -> bytes:
    """A string of at most 255 bytes. Raises Unsendable."""
    data = _utf8(text)
    if len(data) > 255:
        raise Unsendable(f"{text[:40]!r}… takes {len(data)} bytes; 255 is the limit of AMQP")
    return bytes((len(data),)) + data


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as failure:
        raise Unsendable(f"{text[:40]!r} can't be written as UTF-8") from failure


def _encode_value(value: Any, out: list[bytes], depth: int) -> None:
    if isinstance(value, str):
        text = _utf8(value)
        out += (b"S", _u32.pack(len(text)), text)
    elif isinstance(value, bool):
        out.append(b"t\x01" if value else b"t\x00")
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise Unsendable(f"the header value {value} needs more than 64 bits")
        out.append(b"l" + _i64.pack(value))
    elif isinstance(value, float):
        if not isfinite(value):
            raise Unsendable(f"the header value {value} is not a finite number")  # RabbitMQ 3.10 closes the connection with 541
        out.append(b"d" + _f64.pack(value))
    elif value is None:
        out.append(b"V")
    elif isinstance(value, bytes):
        out += (b"x", _u32.pack(len(value)), value)
    else:
        _encode_nested(value, out, depth)


def _encode_nested(value: Any, out: list[bytes], depth: int) -> None:
    if depth == MAX_DEPTH:
        raise Unsendable(f"the headers are nested more than {MAX_DEPTH} deep")
    inner: list[bytes] = []
    if isinstance(value, Mapping):
        for name, item in value.items():
            inner.append(short_string(name))
            _encode_value(item, inner, depth + 1)
        kind = b"F"
    elif isinstance(value, Sequence):
        for item in value:
            _encode_value(item, inner, depth + 1)
        kind = b"A"
    else:
        raise Unsendable(f"a header can't hold a {type(value).__name__}")
    data = b"".join(inner)
    out += (kind, _u32.pack(len(data)), data)
