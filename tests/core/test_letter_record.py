"""Dead letters on file: whatever a queue held comes back, and what is not a letter is refused with a reason."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given, strategies as st

from orderbus._core.ids import uuid7, uuid7_time_ms
from orderbus._core.leaving import PARKED_AT, QUEUE, RAW_PROPERTIES, REASON
from orderbus._core.letter_record import (
    EDITED_FROM,
    edited_id,
    edited_message,
    fingerprint,
    read_record,
    returned_message,
    write_record,
)
from orderbus._core.message import ATTEMPT, KEY, Incoming, Properties
from orderbus._core.parked import read_parked
from orderbus._core.signing import SIGNATURE, SigningKeys
from orderbus.errors import MessageError, UsageError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | text
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


def incoming(body: bytes = b"{}", headers: Any = None, **properties: Any) -> Incoming:
    return Incoming(
        queue="shop.orders.dlq",
        exchange="",
        routing_key="shop.orders.dlq",
        body=body,
        tag=1,
        epoch=1,
        raw=b"\x00raw",
        properties=Properties(headers=headers or {}, **properties),
    )


@given(st.binary(max_size=50), st.dictionaries(text, values, max_size=5), st.none() | text, st.none() | st.integers(0, 1 << 40))
def test_every_letter_comes_back_as_it_was(body: bytes, headers: Any, message_id: str | None, timestamp_s: int | None) -> None:
    before = incoming(body, headers, message_id=message_id, type="t", content_type="c", timestamp_s=timestamp_s)
    line = write_record(before)
    after = read_record(line)
    assert line.count(b"\n") == 1
    assert (after.properties, after.body, after.raw, after.queue) == (before.properties, body, b"\x00raw", before.queue)
    assert (after.exchange, after.routing_key) == (before.exchange, before.routing_key)
    assert fingerprint(after) == fingerprint(before)


def test_letters_are_the_same_by_their_events_id_and_their_body() -> None:
    one = fingerprint(incoming(b"a", message_id="m"))
    assert one == fingerprint(incoming(b"a", {"mine": 1}, message_id="m"))
    assert one != fingerprint(incoming(b"b", message_id="m"))
    assert one != fingerprint(incoming(b"a", message_id="n"))
    assert len(one[1]) == 16


def test_a_letter_whose_properties_can_not_be_read_is_the_same_by_its_body_alone() -> None:
    def decode(raw: bytes) -> Properties:
        raise MessageError("malformed-properties", "bad")

    bad = Incoming(queue="q.dlq", exchange="", routing_key="q.dlq", body=b"a", tag=1, epoch=1, raw=b"\xff", decode=decode)
    assert fingerprint(bad) == fingerprint(incoming(b"a"))


def test_an_edited_id_is_the_same_in_every_version() -> None:
    assert (
        str(edited_id(UUID("0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f"), "shop.orders.dlq")) == "0199f3c2-7b1e-7e99-838c-673bd7d4e413"
    )


def test_numbers_that_json_does_not_have() -> None:
    after = read_record(write_record(incoming(headers={"a": float("inf"), "b": 1.0, "c": 1})))
    assert repr(after.properties.headers) == repr({"a": float("inf"), "b": 1.0, "c": 1})


def test_properties_that_can_not_be_read_are_kept_raw() -> None:
    def decode(raw: bytes) -> Properties:
        raise MessageError("malformed-properties", "bad")

    bad = Incoming(queue="q.dlq", exchange="", routing_key="q.dlq", body=b"x", tag=1, epoch=1, raw=b"\xff\xfe", decode=decode)
    after = read_record(write_record(bad))
    assert after.raw == b"\xff\xfe"
    assert returned_message(after).headers[RAW_PROPERTIES] == b"\xff\xfe"


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"{", "OB709", "is no dead letter"),
        (b"[]", "OB709", "is no dead letter"),
        (b"\xff", "OB709", "is no dead letter"),
        (b"[" * 100_000, "OB709", "is no dead letter"),
        (write_record(incoming()).replace(b"shop.orders.dlq", b"shop.orders"), "OB701", "which is not a dead letter queue"),
        (write_record(incoming()).replace(b"letter-1", b"letter-9"), "OB709", "is of kind 'orderbus-dead-letter-9'"),
        (write_record(incoming(headers={"a": b"x"})).replace(b'"base64"', b'"base65"'), "OB709", r"a header is \['base65'\]"),
        (write_record(incoming(headers={"a": b"x"})).replace(b'"eA=="', b'"%%%"'), "OB709", "is no dead letter"),
    ],
)
def test_what_is_no_letter_is_refused(line: bytes, code: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        read_record(line.strip())
    assert raised.value.code == code


def test_what_only_the_broker_said_is_kept_as_ours() -> None:
    death = {"reason": "delivery_limit", "queue": "shop.orders", "time": 1_700_000_000}
    back = returned_message(incoming(headers={"x-death": [death], "x-delivery-count": 3, "mine": "kept"}, message_id="m"))
    assert (back.exchange, back.routing_key, back.message_id) == ("", "shop.orders.dlq", "m")
    assert back.headers == {REASON: "delivery-limit", QUEUE: "shop.orders", PARKED_AT: 1_700_000_000.0, "mine": "kept"}
    again = incoming(headers=back.headers, message_id="m")
    assert read_parked(again).reason == "delivery-limit"


def test_a_returned_letter_has_the_properties_that_it_came_with() -> None:
    back = returned_message(incoming(b"body", message_id="m", type="t", content_type="application/msgpack", timestamp_s=7))
    assert (back.body, back.message_id, back.type, back.content_type, back.timestamp_s) == (
        b"body", "m", "t", "application/msgpack", 7
    )  # fmt: skip


def test_a_returned_letter_that_said_nothing_of_itself_is_json_of_no_type() -> None:
    back = returned_message(incoming())
    assert (back.message_id, back.type, back.content_type, back.timestamp_s) == ("", "", "application/json", None)


@pytest.mark.parametrize("key", ["a", None, 7])
def test_an_edited_letter_is_signed_as_what_it_is_now(key: Any) -> None:
    keys = SigningKeys({"k": b"k" * 32})
    headers = {SIGNATURE: "k:old"} | ({} if key is None else {KEY: key})
    letter = incoming(b"old", headers, message_id=str(uuid7(1_000, 1)), type="t", content_type="application/msgpack")
    message = edited_message(letter, "shop.orders", b"new", event_id=uuid7(1_000, 2), signing=keys)
    keys.check("t", Properties(message.message_id, message.type, message.content_type, None, message.headers), b"new")
    with pytest.raises(MessageError):
        keys.check("t", Properties(message.message_id, message.type, message.content_type, None, message.headers), b"old")


def test_an_edited_letter_says_which_it_was_and_its_attempts_are_counted_anew() -> None:
    old, new = uuid7(1_000, 1), uuid7(1_000, 2)
    letter = incoming(headers={REASON: "x", ATTEMPT: 8, "mine": "kept"}, message_id=str(old), type="t")
    message = edited_message(letter, "shop.orders", b"new", event_id=new)
    assert (message.routing_key, message.body, message.message_id) == ("shop.orders", b"new", str(new))
    assert message.headers == {"mine": "kept", EDITED_FROM: str(old)}
    assert edited_message(letter, "shop.orders", b"new", event_id=old).headers == {"mine": "kept"}


@given(st.integers(0, (1 << 48) - 1), st.integers(0, (1 << 80) - 1))
def test_an_edited_id_is_the_same_each_time_another_than_the_old_and_of_the_same_age(time_ms: int, random80: int) -> None:
    old = uuid7(time_ms, random80)
    new = edited_id(old, "q.dlq")
    assert new == edited_id(old, "q.dlq")
    assert len({old, new, edited_id(old, "other.dlq"), edited_id(new, "q.dlq")}) == 4
    assert uuid7_time_ms(new) == time_ms


def test_an_id_of_another_version_can_be_edited_too() -> None:
    old = uuid4()
    assert edited_id(old, "q") == edited_id(old, "q") != old
    assert isinstance(edited_id(old, "q"), UUID)


def test_a_line_is_json_that_others_can_read() -> None:
    read = msgspec.json.decode(write_record(incoming(b"hi", {"a": b"\x00"}, message_id="m")))
    assert (read["message_id"], read["body"], read["headers"]) == ("m", "aGk=", {"a": {"base64": "AA=="}})
