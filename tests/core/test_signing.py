"""What a signature covers, what it leaves alone, and how keys are told, printed and rotated."""

from __future__ import annotations

import base64
import hashlib
import hmac
import random
import re
import struct
from typing import Any

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from orderbus import Settings, SettingsError
from orderbus._core.ids import uuid7
from orderbus._core.leaving import parked_message, replayed_message, retry_message
from orderbus._core.letter_record import edited_message, read_record, returned_message, write_record
from orderbus._core.message import ATTEMPT, KEY, Incoming, Outgoing, Properties
from orderbus._core.signing import SIGNATURE, SigningKeys, masked_keys, signing_keys
from orderbus._core.work import Work
from orderbus.errors import MessageError
from tests.core.test_leaving import ROUTE

OLD, NEW = base64.b64encode(b"o" * 32).decode(), base64.b64encode(b"n" * 48).decode()
TOPIC, ID = "orders.placed", "01890a5d-ac96-774b-bcce-b302099a8057"


def keys(text: str = f"2026b:{NEW},2026a:{OLD}") -> SigningKeys:
    made = signing_keys(text)
    assert made is not None
    return made


def signed(by: SigningKeys, *, key: str | None = "a", body: bytes = b"{}", **changes: Any) -> tuple[Properties, bytes]:
    headers = {SIGNATURE: by.sign(TOPIC, ID, key, "application/json", body)} | ({} if key is None else {KEY: key})
    return Properties(
        **{"message_id": ID, "type": TOPIC, "content_type": "application/json", "headers": headers, **changes}
    ), body


def reason_of(by: SigningKeys, topic: str, properties: Properties, body: bytes) -> str:
    try:
        by.check(topic, properties, body)
    except MessageError as error:
        return error.reason
    return "fine"


def test_the_signature_is_the_one_that_the_docs_describe() -> None:
    parts = [b"orders.placed", ID.encode(), b"a", b"application/json", b"{}"]
    expected = hmac.digest(b"n" * 48, b"".join(struct.pack(">I", len(part)) for part in parts) + b"".join(parts), "sha256")

    assert keys().sign(TOPIC, ID, "a", "application/json", b"{}") == f"2026b:{base64.b64encode(expected).decode()}"
    assert hashlib.sha256().digest_size == len(expected)


def test_the_first_key_signs_and_all_verify() -> None:
    before, during, after = keys(f"2026a:{OLD}"), keys(), keys(f"2026b:{NEW}")

    assert reason_of(during, TOPIC, *signed(before)) == "fine"
    assert reason_of(during, TOPIC, *signed(during)) == "fine"
    assert reason_of(after, TOPIC, *signed(during)) == "fine"
    assert reason_of(after, TOPIC, *signed(before)) == "bad-signature"


def test_nothing_that_a_consumer_acts_on_can_be_changed() -> None:
    by = keys()
    properties, body = signed(by)
    headers = dict(properties.headers)

    assert reason_of(by, TOPIC, properties, body) == "fine"
    assert reason_of(by, "orders.cancelled", properties, body) == "bad-signature"
    assert reason_of(by, TOPIC, properties, body + b" ") == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, message_id=ID[:-1] + "8"), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, message_id=ID.upper()), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, message_id=None), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, content_type="application/msgpack"), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, headers=headers | {KEY: "b"}), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, headers={SIGNATURE: headers[SIGNATURE]}), body) == "bad-signature"
    assert reason_of(by, TOPIC, replace(properties, headers=headers | {ATTEMPT: 7, "x-death": []}), body) == "fine"


def test_no_key_and_an_empty_key_are_not_the_same() -> None:
    by = keys()
    properties, body = signed(by, key=None)

    assert reason_of(by, TOPIC, properties, body) == "fine"
    properties.headers[KEY] = ""  # type: ignore[index]
    assert reason_of(by, TOPIC, properties, body) == "bad-signature"


text = st.text(max_size=8)


@given(one=st.tuples(text, text, st.none() | text, text, st.binary(max_size=8)), other=st.data())
def test_different_messages_have_different_signatures_wherever_the_borders_lie(one: Any, other: st.DataObject) -> None:
    joined = "".join(part or "" for part in one[:4])
    cuts = sorted(other.draw(st.lists(st.integers(0, len(joined)), min_size=3, max_size=3)))
    moved = (joined[: cuts[0]], joined[cuts[0] : cuts[1]], joined[cuts[1] : cuts[2]], joined[cuts[2] :], one[4])

    assert (keys().sign(*one) == keys().sign(*moved)) == (one == moved)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "unsigned"),
        ("", "bad-signature"),
        ("2026b", "bad-signature"),
        ("2026b:", "bad-signature"),
        ("2026b:AAAA", "bad-signature"),
        ("2026b:\udcffé☃", "bad-signature"),
        ("\udcff" * 5_000, "bad-signature"),
        (f"stranger:{base64.b64encode(b'x' * 32).decode()}", "bad-signature"),
        (b"2026b:AAAA", "bad-signature"),
        (7, "bad-signature"),
        ({"2026b": "AAAA"}, "bad-signature"),
    ],
)
def test_whatever_stands_in_the_header_is_refused_with_its_reason(header: Any, reason: str) -> None:
    properties, body = signed(keys())
    headers = dict(properties.headers) | {SIGNATURE: header}

    assert reason_of(keys(), TOPIC, Properties(message_id=ID, type=TOPIC, headers=headers), body) == reason


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "the message has no header ob-signature, and ORDERBUS_SIGNING_KEYS asks for one"),
        (7, "the header ob-signature is no text"),
        ("stranger:AAAA", "it is signed with the key 'stranger'; ORDERBUS_SIGNING_KEYS has 2026b, 2026a"),
        ("s" * 33, f"it is signed with the key {'s' * 32!r}; ORDERBUS_SIGNING_KEYS has 2026b, 2026a"),
        ("2026a:AA:AA", "it was not signed as it is with the key '2026a': topic, id, key, content type or body differ"),
    ],
)
def test_a_refused_message_says_what_is_wrong_with_its_signature(header: Any, said: str) -> None:
    with pytest.raises(MessageError) as raised:
        keys().check(TOPIC, Properties(message_id=ID, type=TOPIC, headers={SIGNATURE: header}), b"{}")

    assert str(raised.value) == said


def test_text_that_no_utf_8_could_carry_is_signed_and_checked_like_any_other() -> None:
    by, odd = keys(), "\udcff"

    headers = {SIGNATURE: by.sign(odd, odd, odd, odd, b""), KEY: odd}
    assert reason_of(by, odd, Properties(message_id=odd, type=odd, content_type=odd, headers=headers), b"") == "fine"


def test_a_message_without_an_id_or_a_content_type_is_signed_as_one_with_no_id_and_json() -> None:
    by = keys()
    headers = {SIGNATURE: by.sign(TOPIC, "", None, "application/json", b"{}")}

    assert reason_of(by, TOPIC, Properties(type=TOPIC, headers=headers), b"{}") == "fine"


def test_a_key_that_is_no_text_counts_as_none() -> None:
    by = keys()
    headers = {SIGNATURE: by.sign(TOPIC, ID, None, "application/json", b"{}"), KEY: 7}

    assert reason_of(by, TOPIC, Properties(message_id=ID, type=TOPIC, headers=headers), b"{}") == "fine"


def test_a_message_without_a_key_is_signed_with_a_length_that_no_key_has() -> None:
    parts = [TOPIC.encode(), ID.encode(), b"", b"application/json", b"{}"]
    lengths = [13, 36, 0xFFFFFFFF, 16, 2]
    expected = hmac.digest(b"n" * 48, struct.pack(">5I", *lengths) + b"".join(parts), "sha256")

    assert keys().sign(TOPIC, ID, None, "application/json", b"{}") == f"2026b:{base64.b64encode(expected).decode()}"


def test_the_unsigned_are_refused_unless_the_settings_say_otherwise() -> None:
    assert SigningKeys({"a": b"k" * 32}).takes_unsigned is False
    assert keys().takes_unsigned is False
    assert keys(f"2026a:{OLD}, unsigned").takes_unsigned is True


def test_up_to_16_keys_with_ids_of_up_to_32_characters_are_taken() -> None:
    many = keys(",".join(f"{n:032}:{OLD}" for n in range(16)))

    assert many.sign(TOPIC, ID, "a", "application/json", b"{}").startswith(f"{0:032}:")
    with pytest.raises(ValueError, match="entry 1 is not"):
        signing_keys(f"{0:033}:{OLD}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3cret", "entry 1 is not `id:base64`, where an id is 1 to 32 letters, digits, dots, dashes"),
        ("unsigned", "there are 0 keys; it takes 1 to 16"),
        ("a:%%%", "the key 'a' is not base64; make one with `openssl rand -base64 32`"),
        (f"a:{OLD}:{OLD}", "the key 'a' is not base64; make one with `openssl rand -base64 32`"),
        (f"a:{OLD}%", "the key 'a' is not base64; make one with `openssl rand -base64 32`"),
        ("a:czNjcmV0", "the key 'a' has 6 bytes; at least 32: make one with `openssl rand -base64 32`"),
        (f"a:{OLD},a:{NEW}", "the key id 'a' is there twice"),
    ],
)
def test_a_refused_key_is_told_with_its_fix(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        signing_keys(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"2026b:{NEW}, 2026a:{OLD}, unsigned", "2026b:***,2026a:***,unsigned"),
        ("s3cret", "***"),
        ("a:s3cret:more", "a:***"),
        ("not an id:s3cret", "***"),
    ],
)
def test_keys_are_masked_down_to_what_is_surely_an_id(text: str, shown: str) -> None:
    assert masked_keys(text) == shown


def test_while_signing_is_introduced_the_unsigned_are_taken_and_the_forged_are_not() -> None:
    by = keys(f"2026a:{OLD},unsigned")
    properties, body = signed(by)

    assert reason_of(by, TOPIC, properties, body) == "fine"
    assert reason_of(by, TOPIC, Properties(message_id=ID, type=TOPIC), body) == "fine"
    assert reason_of(by, TOPIC, properties, b"[]") == "bad-signature"


def test_a_signature_outlives_retry_parking_replay_export_and_import() -> None:
    by = keys()
    properties, body = signed(by)

    def arrives(message: Outgoing, queue: str) -> Incoming:
        return Incoming(
            queue=queue,
            exchange=message.exchange,
            routing_key=message.routing_key,
            body=message.body,
            tag=1,
            epoch=1,
            properties=Properties(message.message_id, message.type, message.content_type, message.timestamp_s, message.headers),
        )

    first = Incoming(queue="q", exchange="", routing_key="", body=body, tag=1, epoch=1, properties=properties)
    work = Work(first)
    work.route = ROUTE
    again = arrives(retry_message(work, 1.0, counted=True, now_s=1.0), "q")
    parked = arrives(parked_message(again, "retries-exhausted", ValueError(), work=work, now_s=2.0), "q.dlq")
    restored = arrives(returned_message(read_record(write_record(parked))), "q.dlq")
    replayed = arrives(replayed_message(restored, "q"), "q")

    for one in (first, again, parked, restored, replayed):
        assert reason_of(by, TOPIC, one.properties, one.body) == "fine"
    edited = arrives(
        edited_message(restored, "q", b"[]", event_id=uuid7(1_700_000_000_000, random.getrandbits(74)), signing=by), "q"
    )
    assert reason_of(by, TOPIC, edited.properties, edited.body) == "fine"
    forged = arrives(edited_message(restored, "q", b"[]", event_id=uuid7(1_700_000_000_000, random.getrandbits(74))), "q")
    assert reason_of(by, TOPIC, forged.properties, forged.body) == "bad-signature"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3cret", "entry 1 is not `id:base64`"),
        (f"a b:{OLD}", "entry 1 is not `id:base64`"),
        (f"2026a:{OLD},", "entry 2 is not `id:base64`"),
        (f"unsigned,2026a:{OLD}", "entry 1 is not `id:base64`"),
        ("unsigned", "there are 0 keys"),
        ("2026a:s3cret!", "is not base64"),
        ("2026a:☃s3cret", "is not base64"),
        ("2026a:czNjcmV0", "has 6 bytes; at least 32"),
        (f"2026a:{OLD},2026a:{NEW}", "is there twice"),
        (",".join(f"k{n}:{OLD}" for n in range(17)), "there are 17 keys"),
    ],
)
def test_keys_that_would_not_protect_are_refused_without_being_shown(text: str, why: str) -> None:
    for settings in ({"ORDERBUS_SIGNING_KEYS": text}, {}):
        with pytest.raises(SettingsError) as raised:
            Settings.load({"ORDERBUS_BROKER_URL": "memory://", **settings}, None if settings else Settings(signing_keys=text))

        assert f"ORDERBUS_SIGNING_KEYS: {raised.value.mistakes[0].partition(': ')[2]}" == raised.value.mistakes[0]
        assert why in str(raised.value)
        assert not any(secret in str(raised.value) for secret in ("s3cret", "czNjcmV0", OLD, NEW))


@pytest.mark.parametrize("value", [f"2026b:{NEW}, 2026a:{OLD},unsigned", NEW, f":{NEW}", f"{NEW}:x", b"s3cret", ""])
def test_keys_are_printed_by_their_ids_alone(value: Any) -> None:
    shown = repr(Settings(signing_keys=value))

    assert not any(secret in shown for secret in ("s3cret", OLD, NEW))
    assert "2026b:***,2026a:***,unsigned" in shown or "***" in shown
    with_bytes = {"ORDERBUS_BROKER_URL": "memory://"}
    if isinstance(value, bytes):
        with pytest.raises(SettingsError) as raised:
            Settings.load(with_bytes, Settings(signing_keys=value))  # type: ignore[arg-type]
        assert "s3cret" not in str(raised.value)


def test_an_empty_variable_means_no_signing() -> None:
    assert Settings.load({"ORDERBUS_BROKER_URL": "memory://", "ORDERBUS_SIGNING_KEYS": ""}).signing_keys is None
    assert signing_keys(None) is None
