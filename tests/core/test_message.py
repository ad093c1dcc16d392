"""Messages at the broker's border: properties that are read when somebody asks, and what a header takes on the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orderbus._core.message import BodyNotKept, Incoming, Properties, header_bytes
from orderbus.errors import MessageError


def incoming(**fields: Any) -> Incoming:
    return Incoming(
        **{"queue": "q", "exchange": "x", "routing_key": "r", "body": b"body", "tag": 7, "epoch": 3, "raw": b"raw", **fields}
    )


def test_a_delivery_is_what_the_adapter_handed_over() -> None:
    message = incoming(redelivered=True)

    assert (message.queue, message.exchange, message.routing_key, message.body) == ("q", "x", "r", b"body")
    assert (message.tag, message.epoch, message.redelivered, message.raw) == (7, 3, True, b"raw")


def test_a_delivery_is_the_first_and_without_raw_bytes_unless_the_adapter_says_so() -> None:
    message = Incoming(queue="q", exchange="", routing_key="r", body=b"", tag=1, epoch=1)

    assert message.redelivered is False
    assert message.raw == b""


def test_properties_are_decoded_from_the_raw_bytes_once() -> None:
    decoded: list[bytes] = []

    def decode(raw: bytes) -> Properties:
        decoded.append(raw)
        return Properties(message_id="m")

    message = incoming(decode=decode)
    assert decoded == []
    assert message.properties is message.properties
    assert (message.properties.message_id, decoded) == ("m", [b"raw"])


def _fails_with(error: Exception) -> Callable[[bytes], Properties]:
    def decode(raw: bytes) -> Properties:
        raise error

    return decode


@pytest.mark.parametrize(
    ("error", "reason", "said"),
    [
        (MessageError("of-its-own", "as it is"), "of-its-own", "as it is"),
        (ValueError("no length"), "malformed-properties", "ValueError: no length"),
    ],
)
def test_whatever_a_decoder_stumbles_over_is_an_error_of_this_message(error: Exception, reason: str, said: str) -> None:
    with pytest.raises(MessageError) as raised:
        _ = incoming(decode=_fails_with(error)).properties

    assert (raised.value.reason, str(raised.value)) == (reason, said)


@pytest.mark.parametrize(("header", "count"), [({}, 0), ({"x-delivery-count": 3}, 3), ({"x-delivery-count": "3"}, 0)])
def test_the_delivery_count_is_the_brokers_header_where_that_is_a_number(header: dict[str, Any], count: int) -> None:
    assert incoming(properties=Properties(headers=header)).delivery_count == count


def test_a_delivery_is_printed_without_its_body() -> None:
    assert repr(incoming()) == "Incoming(queue='q', tag=7, epoch=3, 4 bytes)"


def test_a_body_that_was_not_kept_is_too_large() -> None:
    error = BodyNotKept("5 MiB")

    assert (error.reason, str(error)) == ("body-too-large", "5 MiB")


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        (None, 9),
        (True, 9),
        (1 << 40, 9),
        (1.5, 9),
        ("", 5),
        ("é", 7),
        ("\udcff", 6),
        (b"abc", 8),
        ([], 5),
        ([1, "a"], 5 + 9 + 6),
        ({}, 5),
        ({"é": 1, "\udcff": "ab"}, 5 + (1 + 2 + 9) + (1 + 1 + 7)),
        ([{"a": [b"x"]}], 5 + 5 + (1 + 1) + (5 + 6)),
    ],
)
def test_a_header_takes_its_length_and_that_of_all_that_is_in_it(value: Any, size_bytes: int) -> None:
    assert header_bytes(value) == size_bytes
