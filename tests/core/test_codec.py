"""Bodies: what is written can be read, in both formats, by older and newer readers; the rest is a MessageError."""

import datetime
import decimal
from enum import Enum
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, strategies as st

from orderbus import Event, MessageError, UsageError
from orderbus._core.codec import BodyDecoder, body_hash, encode
from orderbus._core.ids import uuid7, uuid7_time_ms
from orderbus._core.message import JSON, MSGPACK
from orderbus._core.topology import BUCKETS, RETRY_STEPS_S, bucket_of, retry_step, routing_key

LIMIT = 1 << 20
TYPES = {"json": JSON, "msgpack": MSGPACK}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Line(msgspec.Struct, frozen=True):
    sku: str
    amount: int


class Everything(Event, topic="everything"):
    text: str
    number: int
    fraction: float
    flag: bool
    id: UUID
    at: datetime.datetime
    price: decimal.Decimal
    colour: Colour
    raw: bytes
    lines: list[Line]
    maybe: str | None = None


events = st.builds(
    Everything,
    text=st.text(st.characters(codec="utf-8")),
    number=st.integers(-(1 << 63), (1 << 63) - 1),
    fraction=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    id=st.uuids(),
    at=st.datetimes(timezones=st.just(datetime.UTC)),
    price=st.decimals(allow_nan=False, allow_infinity=False, places=2),
    colour=st.sampled_from(Colour),
    raw=st.binary(),
    lines=st.lists(st.builds(Line, sku=st.text(st.characters(codec="utf-8")), amount=st.integers(0, 1000))),
    maybe=st.none() | st.text(st.characters(codec="utf-8")),
)


@given(events, st.sampled_from(["json", "msgpack"]))
def test_what_is_written_can_be_read(event: Everything, form: str) -> None:
    assert BodyDecoder(Everything, limit_bytes=LIMIT).decode(encode(event, form, limit_bytes=LIMIT), TYPES[form]) == event


@given(st.binary(max_size=300), st.sampled_from([JSON, MSGPACK, None, "text/plain", "application/json; x=y", ""]))
def test_any_bytes_are_an_event_or_a_message_error(body: bytes, content_type: str | None) -> None:
    reasons = []
    try:
        BodyDecoder(Line2, limit_bytes=200).decode(body, content_type)
    except MessageError as error:
        reasons.append(error.reason)

    assert set(reasons) <= {"body-too-large", "undecodable", "wrong-type", "unknown-content-type"}


class Line2(Event, topic="lines"):
    sku: str = ""


class Picky(Event, topic="picky"):
    size: int

    def __post_init__(self) -> None:
        [1, 2, 3][self.size]


def test_an_event_that_stumbles_over_its_own_fields_is_a_message_error() -> None:
    with pytest.raises(MessageError, match="Picky refuses the body: IndexError"):
        BodyDecoder(Picky, limit_bytes=LIMIT).decode(b'{"size":9}', JSON)


def test_a_body_at_its_limit_is_written_and_read_and_one_byte_more_is_not() -> None:
    event = Line2(sku="x" * 100)
    body = encode(event, limit_bytes=LIMIT)

    assert encode(event, limit_bytes=len(body)) == body
    assert BodyDecoder(Line2, limit_bytes=len(body)).decode(body, JSON) == event
    with pytest.raises(UsageError, match=r"ORDERBUS_MAX_BODY_BYTES\); send a reference") as raised:
        encode(event, limit_bytes=len(body) - 1)
    assert raised.value.code == "OB210"
    with pytest.raises(MessageError, match="the limit is"):
        BodyDecoder(Line2, limit_bytes=len(body) - 1).decode(body, JSON)


class Custom:
    pass


class WithCustom(Event, topic="custom"):
    custom: Custom


class A(msgspec.Struct):
    x: int


class B(msgspec.Struct):
    y: int


class Ambiguous(Event, topic="ambiguous"):
    which: A | B


def test_a_value_that_has_no_encoding_is_the_programmers_error() -> None:
    for form in ("json", "msgpack"):
        with pytest.raises(UsageError, match=rf"event WithCustom \(.*test_codec\.py:\d+\) can't be encoded as {form}") as raised:
            encode(WithCustom(custom=Custom()), form, limit_bytes=LIMIT)
        assert raised.value.code == "OB209"


def test_fields_that_no_decoder_can_tell_apart_are_the_programmers_error() -> None:
    with pytest.raises(
        UsageError, match=r"event class Ambiguous \(.*test_codec\.py:\d+\): its fields can't be read from a message"
    ) as raised:
        BodyDecoder(Ambiguous, limit_bytes=LIMIT)
    assert raised.value.code == "OB208"


@pytest.mark.parametrize(
    ("body", "content_type", "reason", "said"),
    [
        (b"{", JSON, "undecodable", f"the body can't be read as {JSON}: "),
        (b"{", None, "undecodable", f"the body can't be read as {JSON}: "),
        (b"\xc1", MSGPACK, "undecodable", f"the body can't be read as {MSGPACK}: "),
        (b'{"other":' + b"[" * 100_000, JSON, "undecodable", "the body is nested too deeply"),
        (b'{"size":"x"}', JSON, "wrong-type", "the body is not a Picky: Expected `int`, got `str` - at `$.size`"),
        (b'{"size":9}', JSON, "wrong-type", "Picky refuses the body: IndexError: list index out of range"),
        (b"{}", "text/plain", "unknown-content-type", f"content type 'text/plain' is neither {JSON} nor {MSGPACK}"),
        (b"{}", "x" * 81, "unknown-content-type", f"content type {'x' * 80!r} is neither"),
    ],
)
def test_a_body_that_can_not_be_read_says_why(body: bytes, content_type: str | None, reason: str, said: str) -> None:
    with pytest.raises(MessageError) as raised:
        BodyDecoder(Picky, limit_bytes=LIMIT).decode(body, content_type)

    assert raised.value.reason == reason
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8; x=y", "Application/JSON", " application/json ;"])
def test_json_is_known_by_its_name_whatever_stands_beside_it(content_type: str) -> None:
    assert BodyDecoder(Line2, limit_bytes=LIMIT).decode(b'{"sku":"tea"}', content_type) == Line2(sku="tea")


@given(st.binary())
def test_a_bodys_hash_fits_a_bigint(body: bytes) -> None:
    assert -(1 << 63) <= body_hash(body) < 1 << 63


def test_a_bodys_hash_is_the_same_in_every_version() -> None:
    assert body_hash(b"orders") == -3049803464231846067


@given(st.integers(0, (1 << 48) - 1), st.integers(0, (1 << 80) - 1))
def test_an_id_is_a_uuid_of_version_7_that_knows_its_time(time_ms: int, random80: int) -> None:
    made = uuid7(time_ms, random80)

    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert uuid7_time_ms(made) == time_ms


def test_the_randomness_of_an_id_is_all_in_it_beside_version_and_variant() -> None:
    assert str(uuid7(0, 0)) == "00000000-0000-7000-8000-000000000000"
    assert str(uuid7(0, (1 << 74) - 1)) == "00000000-0000-7fff-bfff-ffffffffffff"
    assert str(uuid7(0, 1 << 62)) == "00000000-0000-7001-8000-000000000000"
    assert str(uuid7(0, 1 << 61)) == "00000000-0000-7000-a000-000000000000"


@given(st.uuids(version=4))
def test_an_id_of_another_version_has_no_time(other: UUID) -> None:
    assert uuid7_time_ms(other) is None


@given(st.integers(0, (1 << 48) - 2), st.integers(0, (1 << 80) - 1), st.integers(0, (1 << 80) - 1))
def test_ids_sort_by_their_time(time_ms: int, one: int, other: int) -> None:
    assert uuid7(time_ms, one) < uuid7(time_ms + 1, other)


@given(st.text(st.characters(codec="utf-8")))
def test_a_key_has_one_bucket_and_the_routing_key_two_digits(key: str) -> None:
    bucket = bucket_of(key)

    assert 0 <= bucket < BUCKETS
    assert routing_key("orders.placed", bucket) == f"orders.placed.{bucket:02}"


def test_buckets_are_those_of_crc_32_for_every_language_to_agree() -> None:
    assert [bucket_of(key) for key in ("", "a", "order-1")] == [0, 0xE8B7BE43 % 64, 47]


@given(st.floats(0, 10_000_000))
def test_a_delay_is_rounded_up_to_a_step_or_takes_the_longest(delay: float) -> None:
    step = retry_step(delay)

    assert step in RETRY_STEPS_S
    assert step >= min(delay, RETRY_STEPS_S[-1])
    assert all(shorter < delay for shorter in RETRY_STEPS_S if shorter < step)
