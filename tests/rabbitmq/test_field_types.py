"""Every field type and every property of AMQP 0-9-1, as RabbitMQ uses them, against pamqp in both directions."""

from __future__ import annotations

import datetime
import math
import struct
from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from typing import Any

import pamqp.decode
import pamqp.encode
import pytest
from hypothesis import given, settings, strategies as st
from pamqp import commands
from pamqp.common import Struct

from orderbus.adapters.rabbitmq.fields import (
    HEADERS,
    LAST_TIMESTAMP_S,
    MAX_DEPTH,
    SEQUENCE,
    TIMESTAMP,
    Unsendable,
    decode_properties,
    encode_headers,
    sequence_of,
)
from orderbus.errors import MessageError

LAST_SECOND_OF_PAMQP = 0xFFFFFFFF
"""It takes a later timestamp for milliseconds."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
NAME = TEXT.filter(lambda name: name != SEQUENCE and len(name.encode()) <= 128)  # a longer one is cut by pamqp
FLOAT32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
DECIMAL = st.builds(
    lambda mantissa, scale: Decimal(f"{mantissa}e-{scale}"), st.integers(-(2**31), 2**31 - 1), st.integers(0, 255)
)
SECOND = st.integers(0, LAST_SECOND_OF_PAMQP).map(lambda second: datetime.datetime.fromtimestamp(second, datetime.UTC))


def integer(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


Kind = tuple[st.SearchStrategy[Any], Callable[[Any], bytes]]
SCALARS: dict[str, Kind] = {
    "t": (st.booleans(), pamqp.encode.boolean),
    "b": (integer(8, signed=True), Struct.short_short_int.pack),
    "B": (integer(8, signed=False), pamqp.encode.octet),
    "s": (integer(16, signed=True), pamqp.encode.short_int),
    "u": (integer(16, signed=False), pamqp.encode.short_uint),
    "I": (integer(32, signed=True), pamqp.encode.long_int),
    "i": (integer(32, signed=False), pamqp.encode.long_uint),
    "l": (integer(64, signed=True), pamqp.encode.long_long_int),
    "L": (integer(64, signed=True), pamqp.encode.long_long_int),
    "f": (FLOAT32, pamqp.encode.floating_point),
    "d": (FINITE, pamqp.encode.double),
    "D": (DECIMAL, pamqp.encode.decimal),
    "S": (TEXT, pamqp.encode.long_string),
    "T": (SECOND, pamqp.encode.timestamp),
    "x": (st.binary(max_size=30).map(bytearray), pamqp.encode.byte_array),
    "V": (st.none(), lambda _: b""),
}


def length_and(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def written(kind: str) -> st.SearchStrategy[tuple[Any, bytes]]:
    values, encode = SCALARS[kind]
    return values.map(lambda value: (value, kind.encode() + encode(value)))


def array(items: list[tuple[Any, bytes]]) -> tuple[list[Any], bytes]:
    return [value for value, _ in items], b"A" + length_and(b"".join(data for _, data in items))


def table(items: dict[str, tuple[Any, bytes]]) -> tuple[dict[str, Any], bytes]:
    return {name: value for name, (value, _) in items.items()}, b"F" + length_and(entries(items))


def entries(items: dict[str, tuple[Any, bytes]]) -> bytes:
    return b"".join(pamqp.encode.short_string(name) + data for name, (_, data) in items.items())


def containing(inner: st.SearchStrategy[tuple[Any, bytes]]) -> st.SearchStrategy[tuple[Any, bytes]]:
    return st.lists(inner, max_size=4).map(array) | st.dictionaries(NAME, inner, max_size=4).map(table)


ANY_SCALAR = st.one_of([written(kind) for kind in SCALARS])
ANY = st.recursive(ANY_SCALAR, containing, max_leaves=12)
"""A value, and what pamqp writes for it. Types that pamqp itself would never choose (B, L, d) are among them."""


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def as_we_read(value: Any) -> Any:
    match value:
        case bytearray():
            return bytes(value)
        case datetime.datetime():
            return int(value.timestamp())
        case Decimal():
            return str(value)
        case dict():
            return {name: as_we_read(item) for name, item in value.items()}
        case list():
            return [as_we_read(item) for item in value]
    return value


def same(first: Any, second: Any) -> bool:
    """Equal in type, too: True is not 1 here, and -0.0 is not 0.0."""
    return repr(first) == repr(second)


def headers(raw: bytes) -> bytes:
    return struct.pack(">H", HEADERS) + length_and(raw)


def read(field: bytes) -> Any:
    return decode_properties(headers(b"\x01n" + field)).headers["n"]


@pytest.mark.parametrize("kind", SCALARS)
def test_each_type_is_read_as_pamqp_wrote_it_and_as_pamqp_reads_it(kind: str) -> None:
    @settings(max_examples=40)
    @given(written(kind))
    def check(case: tuple[Any, bytes]) -> None:
        value, field = case
        assert same(read(field), as_we_read(value))
        assert same(as_we_read(pamqp.decode.embedded_value(field)[1]), as_we_read(value))

    check()


@settings(max_examples=150)
@given(ANY)
def test_nested_tables_and_arrays_are_read_as_pamqp_wrote_them(case: tuple[Any, bytes]) -> None:
    value, field = case
    if depth(value) >= MAX_DEPTH:
        with pytest.raises(MessageError, match="nested"):
            read(field)
        return
    assert same(read(field), as_we_read(value))
    used, theirs = pamqp.decode.embedded_value(field)
    assert (used, as_we_read(theirs)) == (len(field), as_we_read(value))


@settings(max_examples=150)
@given(st.dictionaries(NAME, ANY.filter(lambda case: depth(case[0]) < MAX_DEPTH), max_size=6))
def test_what_was_read_can_be_written_again_and_pamqp_reads_the_same(items: dict[str, tuple[Any, bytes]]) -> None:
    ours = decode_properties(headers(entries(items))).headers
    again = encode_headers(ours)
    used, theirs = pamqp.decode.field_table(length_and(again))
    assert used == len(again) + 4
    assert same(as_we_read(theirs), ours)
    assert same(decode_properties(headers(again)).headers, ours)


@settings(max_examples=200)
@given(st.dictionaries(NAME, ANY, max_size=5), st.data())
def test_where_a_damaged_table_is_read_by_both_it_is_read_alike(items: dict[str, tuple[Any, bytes]], data: st.DataObject) -> None:
    raw = bytearray(entries(items))
    for _ in range(data.draw(st.integers(1, 3)) if raw else 0):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from(b"tbBsuIilLfdDSATFVx\x00\x01\x02\x04\xff"))
    try:
        ours = decode_properties(headers(bytes(raw))).headers
    except MessageError:
        return
    # pamqp reads a timestamp in milliseconds as another number, and knows no such second as 2 ** 62.
    try:
        _, theirs = pamqp.decode.field_table(length_and(bytes(raw)))
    except (ValueError, OverflowError):
        assert "T" in map(chr, raw)
        return
    theirs.pop(SEQUENCE, None)
    if b"T" not in raw:
        assert same(as_we_read(theirs), ours)


@given(st.integers(0, 2**64 - 1))
def test_a_timestamp_among_the_headers_is_a_number_that_can_be_sent_again(second: int) -> None:
    field = b"T" + struct.pack(">Q", second)
    if second < 2**63:
        assert read(field) == second
        assert encode_headers({"n": read(field)}) == b"\x01nl" + struct.pack(">q", second)
    else:
        with pytest.raises(MessageError, match="out of range"):
            read(field)


@given(st.binary(max_size=20))
def test_a_long_string_that_is_no_text_is_bytes(data: bytes) -> None:
    value = read(b"S" + length_and(data))
    assert (value.encode() if isinstance(value, str) else value) == data
    assert same(value, pamqp.decode.long_str(length_and(data))[1])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "layout"), [(b"f", ">f"), (b"d", ">d")])
@pytest.mark.parametrize(
    "wrap", [bytes, lambda field: b"A" + length_and(field), lambda field: b"F" + length_and(b"\x01m" + field)]
)
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(
    number: float, kind: bytes, layout: str, wrap: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(MessageError, match="not a finite number"):
        read(wrap(kind + struct.pack(layout, number)))


def test_no_other_type_is_read() -> None:
    for kind in set(range(256)) - {ord(kind) for kind in (*SCALARS, "A", "F")}:
        with pytest.raises(MessageError, match="unknown type"):
            read(bytes([kind]) + bytes(20))


@given(DECIMAL)
def test_a_decimal_keeps_all_its_digits_whatever_the_context_of_the_reader(value: Decimal) -> None:
    field = b"D" + pamqp.encode.decimal(value)
    with localcontext(Context(prec=2)):
        text = read(field)
    assert Decimal(text).as_tuple() == value.as_tuple()


@pytest.mark.parametrize(("kind", "nest"), [("A", lambda inner: inner), ("F", lambda inner: b"\x01n" + inner)])
def test_nesting_is_read_and_written_to_the_same_depth(kind: str, nest: Callable[[bytes], bytes]) -> None:
    field = b"V"
    for _ in range(MAX_DEPTH - 1):
        field = kind.encode() + length_and(nest(field))
    value = read(field)
    assert encode_headers({"n": value}) == b"\x01n" + field
    with pytest.raises(MessageError, match="nested"):
        read(kind.encode() + length_and(nest(field)))
    with pytest.raises(Unsendable, match="nested"):
        encode_headers({"n": [value]})


# Properties

SHORT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
HEADER_TABLE = st.dictionaries(NAME, ANY.filter(lambda case: depth(case[0]) < MAX_DEPTH), max_size=3)
short = SHORT.map(lambda text: (text, pamqp.encode.short_string(text)))
octet = st.integers(0, 255).map(lambda number: (number, bytes([number])))
second = st.integers(0, LAST_TIMESTAMP_S).map(lambda number: (number, struct.pack(">Q", number)))
header_table = HEADER_TABLE.map(lambda items: (table(items)[0], table(items)[1][1:]))

PROPERTIES: dict[str, tuple[int, st.SearchStrategy[tuple[Any, bytes]]]] = {
    "content_type": (15, short),
    "content_encoding": (14, short),
    "headers": (13, header_table),
    "delivery_mode": (12, octet),
    "priority": (11, octet),
    "correlation_id": (10, short),
    "reply_to": (9, short),
    "expiration": (8, short),
    "message_id": (7, short),
    "timestamp": (6, second),
    "message_type": (5, short),
    "user_id": (4, short),
    "app_id": (3, short),
    "cluster_id": (2, short),
}
"""The bit of each, in the order of the wire."""


@st.composite
def properties(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    chosen = draw(st.sets(st.sampled_from(list(PROPERTIES))))
    flags, values, data = 0, {}, b""
    for name, (bit, strategy) in PROPERTIES.items():
        if name in chosen:
            value, written = draw(strategy)
            values[name] = value
            flags |= 1 << bit
            data += written
    return values, struct.pack(">H", flags) + data


@settings(max_examples=200)
@given(properties())
def test_any_choice_of_properties_is_read_as_pamqp_reads_it(case: tuple[dict[str, Any], bytes]) -> None:
    values, raw = case
    ours = decode_properties(raw)
    assert (ours.message_id, ours.type) == (values.get("message_id"), values.get("message_type"))
    assert (ours.content_type, ours.timestamp_s) == (values.get("content_type"), values.get("timestamp"))
    assert same(ours.headers, as_we_read(values.get("headers", {})))
    if values.get("timestamp", 0) > LAST_SECOND_OF_PAMQP:
        return
    theirs = commands.Basic.Properties()
    theirs.unmarshal(struct.unpack_from(">H", raw)[0], raw[2:])
    assert theirs.message_id == values.get("message_id")
    assert theirs.message_type == values.get("message_type")
    assert theirs.content_type == values.get("content_type")
    assert as_we_read(theirs.timestamp) == values.get("timestamp")
    assert same(as_we_read(theirs.headers or {}), ours.headers)


@given(properties(), st.integers(1, 200))
def test_properties_cut_short_are_malformed(case: tuple[dict[str, Any], bytes], missing: int) -> None:
    _, raw = case
    with pytest.raises(MessageError) as caught:
        decode_properties(raw[: -min(missing, len(raw))])
    assert caught.value.reason == "malformed-properties"


@given(properties(), st.binary(min_size=1, max_size=20))
def test_properties_with_something_behind_them_are_malformed(case: tuple[dict[str, Any], bytes], more: bytes) -> None:
    with pytest.raises(MessageError, match="do not end where"):
        decode_properties(case[1] + more)


@given(properties(), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_the_sequence_number_is_found_whatever_stands_around_it(
    case: tuple[dict[str, Any], bytes], sequence: int, is_first: bool
) -> None:
    values, raw = case
    assert sequence_of(raw) is None
    if "headers" not in values:
        return
    ours = pamqp.encode.short_string(SEQUENCE) + b"l" + struct.pack(">q", sequence)
    at = 2
    for name in ("content_type", "content_encoding"):
        if name in values:
            at += 1 + raw[at]
    (length,) = struct.unpack_from(">I", raw, at)
    table = raw[at + 4 : at + 4 + length]
    with_sequence = raw[:at] + length_and(ours + table if is_first else table + ours) + raw[at + 4 + length :]
    assert sequence_of(with_sequence) == sequence
    assert same(decode_properties(with_sequence).headers, decode_properties(raw).headers)


@given(st.integers(0, 2**64 - 1))
def test_a_timestamp_past_the_year_9999_is_malformed(second: int) -> None:
    raw = struct.pack(">HQ", TIMESTAMP, second)
    if second <= LAST_TIMESTAMP_S:
        assert decode_properties(raw).timestamp_s == second
    else:
        with pytest.raises(MessageError, match="past the year 9999"):
            decode_properties(raw)
