"""Properties and publishes, against pamqp in both directions."""

from __future__ import annotations

import datetime
import math
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pamqp.encode
import pamqp.frame
import pytest
from hypothesis import given, settings, strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from orderbus._core.message import Outgoing
from orderbus.adapters.rabbitmq.encoder import MAX_BODY, PublishEncoder
from orderbus.adapters.rabbitmq.fields import SEQUENCE, Unsendable, decode_properties, encode_headers, sequence_of
from orderbus.errors import MessageError

INT64 = st.integers(-(2**63), 2**63 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda name: name != SEQUENCE)
SHORT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def nested(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAME, inner, max_size=4), max_leaves=8
    )


SENT_VALUE = nested(TEXT | INT64 | FINITE | st.booleans() | st.none() | st.binary(max_size=20))
FOREIGN_VALUE = nested(
    TEXT | INT64 | FINITE | st.booleans() | st.none() | st.binary(max_size=20).map(bytearray)
    | st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(2100, 1, 1), timezones=st.just(datetime.UTC))
)  # fmt: skip


def depth(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def frames_of(data: bytes) -> list[tuple[int, Any]]:
    frames = []
    while data:
        used, channel, frame = pamqp.frame.unmarshal(data)
        frames.append((channel, frame))
        data = data[used:]
    return frames


def as_pamqp_reads(value: Any) -> Any:
    if isinstance(value, bytes):
        return bytearray(value)
    if isinstance(value, dict):
        return {name: as_pamqp_reads(item) for name, item in value.items()}
    return [as_pamqp_reads(item) for item in value] if isinstance(value, list) else value


def as_we_read(value: Any) -> Any:
    """What pamqp writes, as it arrives: floats with 32 bits, times in whole seconds."""
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, datetime.datetime):
        return int(value.timestamp())
    if isinstance(value, float):
        return struct.unpack(">f", struct.pack(">f", value))[0]
    if isinstance(value, dict):
        return {name: as_we_read(item) for name, item in value.items()}
    return [as_we_read(item) for item in value] if isinstance(value, list) else value


@given(
    exchange=SHORT,
    key=SHORT,
    message_id=SHORT,
    kind=SHORT,
    content_type=SHORT,
    timestamp_s=st.none() | st.integers(0, 253402300799),
    headers=st.dictionaries(NAME, SENT_VALUE, max_size=6).filter(lambda headers: depth(headers) <= 8),
    body=st.binary(max_size=300),
    sequence=st.integers(1, 2**63 - 1),
)
def test_pamqp_reads_what_we_publish(
    exchange: str, key: str, message_id: str, kind: str, content_type: str, timestamp_s: int | None,
    headers: dict[str, Any], body: bytes, sequence: int,
) -> None:  # fmt: skip
    message = Outgoing(exchange, key, body, message_id, kind, content_type, timestamp_s, headers)
    data = PublishEncoder(7, 128).encode(message, sequence)
    frames = frames_of(data)
    assert {channel for channel, _ in frames} == {7}
    publish, header, *pieces = (frame for _, frame in frames)
    assert isinstance(publish, commands.Basic.Publish)
    assert (publish.exchange, publish.routing_key, publish.mandatory, publish.immediate) == (exchange, key, True, False)
    assert isinstance(header, ContentHeader)
    properties = header.properties
    assert header.body_size == len(body)
    assert properties.delivery_mode == 2
    assert (properties.message_id, properties.message_type, properties.content_type) == (message_id, kind, content_type)
    assert properties.headers == {SEQUENCE: sequence, **as_pamqp_reads(headers)}
    assert b"".join(piece.value for piece in pieces if isinstance(piece, ContentBody)) == body
    assert all(len(piece.value) <= 120 for piece in pieces)
    raw = raw_properties(data)
    assert sequence_of(raw) == sequence
    ours = decode_properties(raw)
    assert (ours.message_id, ours.type, ours.content_type, ours.timestamp_s) == (message_id, kind, content_type, timestamp_s)
    assert ours.headers == headers


def raw_properties(publish: bytes) -> bytes:
    method_length = struct.unpack_from(">xxxI", publish)[0]
    at = method_length + 8
    length = struct.unpack_from(">xxxI", publish, at)[0]
    return publish[at + 7 + 12 : at + 7 + length]


OPTIONAL = st.none() | SHORT


@given(
    st.builds(
        commands.Basic.Properties,
        content_type=OPTIONAL,
        content_encoding=OPTIONAL,
        headers=st.none()
        | st.dictionaries(NAME, FOREIGN_VALUE.filter(lambda value: not _overflows(value)), max_size=6).filter(
            lambda headers: depth(headers) <= 8
        ),
        delivery_mode=st.none() | st.sampled_from([1, 2]),
        priority=st.none() | st.integers(0, 255),
        correlation_id=OPTIONAL,
        reply_to=OPTIONAL,
        expiration=OPTIONAL,
        message_id=OPTIONAL,
        timestamp=st.none()
        | st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(9999, 1, 1), timezones=st.just(datetime.UTC)),
        message_type=OPTIONAL,
        user_id=OPTIONAL,
        app_id=OPTIONAL,
    )
)
def test_we_read_what_pamqp_writes(properties: commands.Basic.Properties) -> None:
    ours = decode_properties(properties.marshal())
    # pamqp leaves out an empty string.
    assert ours.message_id == (properties.message_id or None)
    assert ours.type == (properties.message_type or None)
    assert ours.content_type == (properties.content_type or None)
    assert ours.headers == as_we_read(properties.headers or {})
    assert ours.timestamp_s == (None if properties.timestamp is None else int(properties.timestamp.timestamp()))


def _overflows(value: Any) -> bool:
    if isinstance(value, float):
        try:
            struct.pack(">f", value)
        except OverflowError:
            return True
        return False
    if isinstance(value, dict):
        return any(map(_overflows, value.values()))
    return isinstance(value, list) and any(map(_overflows, value))


@given(st.binary(max_size=200))
def test_any_bytes_are_properties_or_malformed(raw: bytes) -> None:
    with suppress(MessageError):
        encode_headers(decode_properties(raw).headers)


@settings(max_examples=300)
@given(st.dictionaries(NAME, SENT_VALUE, max_size=5), st.data())
def test_a_damaged_byte_is_properties_or_malformed(headers: dict[str, Any], data: st.DataObject) -> None:
    encoder = PublishEncoder(1, 131072)
    try:
        raw = bytearray(raw_properties(encoder.encode(Outgoing("x", "k", b"", "id", "t", headers=headers), 1)))
    except Unsendable:
        return
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    with suppress(MessageError):
        encode_headers(decode_properties(bytes(raw)).headers)


def table(entries: bytes) -> bytes:
    return struct.pack(">HI", 1 << 13, len(entries)) + entries


def deep(levels: int) -> bytes:
    inner = b""
    for _ in range(levels):
        inner = b"\x01nF" + struct.pack(">I", len(inner)) + inner
    return inner


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "end in the middle"),
        (struct.pack(">H", 1 << 7) + b"\x02\xff\xfe", "not UTF-8"),
        (struct.pack(">HQ", 1 << 6, 1 << 60), "past the year 9999"),
        (table(deep(8)), "nested more than 8"),
        (table(deep(500)), "nested more than 8"),
        (table(b"".join(b"\x03%03db\x01" % n for n in range(65))), "65 headers"),
        (table(b"\x01aS" + struct.pack(">I", 30_000) + b"x" * 30_000), "16384 is the limit"),
        (table(b"\x01aS" + struct.pack(">I", 9) + b"x"), "longer than its table"),
        (table(b"\x01aZ"), "unknown type"),
        (table(b"\x01ad" + struct.pack(">d", math.nan)), "not a finite number"),
        (struct.pack(">H", 0) + b"more", "do not end where"),
        (struct.pack(">H", 1), "undefined property flags"),
    ],
)
def test_a_malformed_header_is_named(raw: bytes, words: str) -> None:
    with pytest.raises(MessageError, match=words) as caught:
        decode_properties(raw)
    assert caught.value.reason == "malformed-properties"


def test_headers_of_the_broker_do_not_count() -> None:
    names = [b"\x04k%03d" % n for n in range(64)] + [b"\x06x-%04d" % n for n in range(20)] + [b"\x06ob-seq"]
    assert len(decode_properties(table(b"".join(name + b"b\x01" for name in names))).headers) == 84


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"body": b"x" * (MAX_BODY + 1)}, "is the limit"),
        ({"routing_key": "k" * 256}, "255 is the limit"),
        ({"exchange": "é" * 128}, "255 is the limit"),
        ({"message_id": "i" * 256}, "255 is the limit"),
        ({"message_id": "\ud800"}, "UTF-8"),
        ({"timestamp_s": -1}, "not between"),
        ({"headers": {"n": math.nan}}, "not a finite number"),
        ({"headers": {"n": [{"deep": -math.inf}]}}, "not a finite number"),
        ({"headers": {"n": 2**63}}, "64 bits"),
        ({"headers": {"n" * 256: 1}}, "255 is the limit"),
        ({"headers": {str(n): 1 for n in range(65)}}, "64 is the limit"),
        ({"headers": {"n": "x" * 16384}}, "16384 is the limit"),
        ({"headers": {"n": [[[[[[[[1]]]]]]]]}}, "nested"),
        ({"headers": {"n": object()}}, "can't hold a object"),
    ],
)
def test_what_amqp_does_not_take_is_refused(changes: dict[str, Any], words: str) -> None:
    fields = {"exchange": "x", "routing_key": "k", "body": b"", "message_id": "i", "type": "t", **changes}
    with pytest.raises(Unsendable, match=words):
        PublishEncoder(1, 131072).encode(Outgoing(**fields), 1)


def test_a_second_sequence_header_is_left_out() -> None:
    message = Outgoing("x", "k", b"", "i", "t", headers={SEQUENCE: 99, "a": 1})
    raw = raw_properties(PublishEncoder(1, 131072).encode(message, 5))
    assert sequence_of(raw) == 5
    assert decode_properties(raw).headers == {"a": 1}
