"""Messages that leave their queue: exact in their bytes, and within what can be sent, whatever they came with."""

from typing import Any

import pytest
from hypothesis import given, strategies as st

from orderbus import Event, MessageError, Retry
from orderbus._core.handler import Handler, Options, Plan
from orderbus._core.leaving import error_text, kept_headers, parked_message, replayed_message, retry_message
from orderbus._core.message import Incoming, Properties, header_bytes
from orderbus._core.policy import LONGEST_DELAY_S
from orderbus._core.topology import RETRY_STEPS_S
from orderbus._core.work import Route, Work
from orderbus.adapters.memory.wire import received_properties

NOW = 1_800_000_000.0


class Placed(Event, topic="orders.placed", key="order"):
    order: str


async def handle(event: Placed) -> None: ...


ROUTE = Route(Handler("shop", handle, (Placed,), Options(Retry.none())), Plan(("event",), ()), Placed, limit_bytes=1 << 20)


def incoming(headers: dict[str, Any] | None = None, **properties: Any) -> Incoming:
    return Incoming(
        queue="shop.orders.placed",
        exchange="ob.events",
        routing_key="orders.placed.07",
        body=b'{"order":"a"}',
        tag=1,
        epoch=1,
        properties=Properties(message_id="id", type="orders.placed", headers=headers or {}, **properties),
    )


def work_of(message: Incoming, attempt: int = 1) -> Work:
    made = Work(message)
    made.route = ROUTE
    made.attempt = attempt
    return made


texts = st.text(st.characters(), max_size=40)
values = st.recursive(
    st.one_of(
        texts, st.binary(max_size=40), st.booleans(), st.none(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(-1e9, 1e9)
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
tables = st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), values, max_size=64)


@given(tables, texts, texts, st.integers(1, 1000))
def test_whatever_was_received_can_be_parked(headers: dict[str, Any], reason: str, text: str, attempt: int) -> None:
    message = incoming(headers)
    if received_properties(retry_message(work_of(message), 5, counted=True, now_s=NOW)) is None:
        return  # what could not be sent was not received either

    parked = parked_message(message, reason, ValueError(text), work=work_of(message, attempt), now_s=NOW)

    assert received_properties(parked) is not None
    assert parked.body == message.body
    assert parked.routing_key == "shop.orders.placed.dlq"


@pytest.mark.parametrize("count", [0, 40, 48, 56, 63, 64])
@pytest.mark.parametrize("size", [1, 200, 1000])
def test_what_has_no_room_beside_the_reason_is_left_out_and_counted(count: int, size: int) -> None:
    headers = {"ob-key": "a", **{f"h{n:02}": "x" * size for n in range(count)}}

    parked = parked_message(incoming(headers), "failed", ValueError("e" * 5000), work=None, now_s=NOW)

    kept = [name for name in parked.headers if name.startswith("h")]
    assert received_properties(parked) is not None
    assert parked.headers["ob-key"] == "a"
    assert parked.headers["ob-reason"] == "failed"
    assert len(kept) + int(parked.headers.get("ob-left-out", 0)) == count
    assert kept == sorted(kept)


def test_a_parked_message_says_all_that_the_person_on_call_will_ask() -> None:
    message = incoming({"ob-key": "a"}, timestamp_s=5, content_type="application/msgpack")
    work = work_of(message, attempt=3)
    work.first_failed_at = NOW - 60

    parked = parked_message(message, "failed", ValueError("no stock"), work=work, now_s=NOW)

    assert parked.headers == {
        "ob-key": "a",
        "ob-reason": "failed",
        "ob-error": "ValueError",
        "ob-error-text": "no stock",
        "ob-handler": "shop.orders.placed",
        "ob-queue": "shop.orders.placed",
        "ob-attempt": 3,
        "ob-first-failed-at": NOW - 60,
        "ob-parked-at": NOW,
    }
    assert (parked.exchange, parked.routing_key) == ("", "shop.orders.placed.dlq")
    assert (parked.message_id, parked.type, parked.body) == ("id", "orders.placed", message.body)
    assert (parked.content_type, parked.timestamp_s) == ("application/msgpack", 5)


def test_a_first_failure_was_now_and_what_had_no_handler_has_none() -> None:
    message = incoming()
    message._properties = Properties()

    known = parked_message(message, "failed", None, work=work_of(message), now_s=NOW)
    unknown = parked_message(message, "unknown-topic", None, work=None, now_s=NOW)

    assert known.headers["ob-first-failed-at"] == NOW
    assert (known.message_id, known.type, known.content_type) == ("", "orders.placed", "application/json")
    assert unknown.headers == {"ob-reason": "unknown-topic", "ob-queue": "shop.orders.placed", "ob-parked-at": NOW}
    assert unknown.type == ""


def test_our_own_headers_are_the_last_to_be_left_out_and_a_large_one_keeps_no_small_one_out() -> None:
    headers = {**{f"h{n:02}": "x" * 500 for n in range(40)}, "ob-mine": "x" * 500, "z": 1}

    kept = parked_message(incoming(headers), "failed", None, work=None, now_s=NOW).headers

    assert (kept["ob-mine"], kept["z"]) == ("x" * 500, 1)
    assert [name for name in kept if name.startswith("h")] == [f"h{n:02}" for n in range(28)]
    assert kept["ob-left-out"] == 12


def test_a_header_that_just_fits_is_kept() -> None:
    why = parked_message(incoming(), "failed", ValueError("e" * 500), work=None, now_s=NOW).headers
    just = "x" * (15 * 1024 - header_bytes(why) - header_bytes({"a": ""}))

    kept, left_out = (
        parked_message(incoming({"a": text}), "failed", ValueError("e" * 500), work=None, now_s=NOW).headers
        for text in (just, just + "x")
    )

    assert kept == {**why, "a": just}
    assert left_out == {**why, "ob-left-out": 1}


def test_why_it_was_parked_replaces_what_the_message_said_and_the_rest_stays() -> None:
    work = work_of(incoming({"ob-attempt": 2, "mine": 1}), attempt=3)

    headers = parked_message(work.incoming, "failed", None, work=work, now_s=NOW).headers

    assert (headers["ob-attempt"], headers["mine"]) == (3, 1)


@pytest.mark.parametrize(("delay", "step", "returns_by_itself"), [(1801, 3600, True), (3600, 3600, True), (3600.5, 3600, False)])
def test_a_retry_says_until_when_only_where_the_ladder_is_too_short(delay: float, step: int, returns_by_itself: bool) -> None:
    message = retry_message(work_of(incoming()), delay, counted=True, now_s=NOW)

    assert message.exchange == f"ob.retry.{step}000ms"
    assert ("ob-not-before" not in message.headers) is returns_by_itself


def test_a_parked_message_has_64_headers_at_most_of_which_one_counts_what_was_left_out() -> None:
    full = parked_message(incoming({f"h{n:02}": 1 for n in range(61)}), "failed", None, work=None, now_s=NOW).headers
    fits = parked_message(incoming({f"h{n:02}": 1 for n in range(60)}), "failed", None, work=None, now_s=NOW).headers

    assert (len(full), full["ob-left-out"]) == (64, 1)
    assert (len(fits), "ob-left-out" in fits) == (63, False)


def test_text_that_utf_8_can_not_write_is_replaced_and_the_rest_is_kept() -> None:
    parked = parked_message(incoming(), "bad \udcff", ValueError("é \udcff"), work=None, now_s=NOW)

    assert (parked.headers["ob-reason"], parked.headers["ob-error-text"]) == ("bad ?", "é ?")
    assert error_text(ValueError("x" * 1001)) == "x" * 1000


def test_a_dead_letter_of_a_stranger_can_be_replayed_though_it_has_no_attempts() -> None:
    assert replayed_message(incoming({"mine": 1}), "shop.orders.placed").headers == {"mine": 1}


def test_a_message_whose_properties_can_not_be_read_is_parked_with_their_bytes() -> None:
    def decode(raw: bytes) -> Properties:
        raise MessageError("malformed-properties", "no")

    raw = b"\xff" * 100_000
    message = Incoming(queue="q", exchange="", routing_key="", body=b"body", tag=1, epoch=1, raw=raw, decode=decode)

    parked = parked_message(message, "malformed-properties", None, work=None, now_s=NOW)

    assert received_properties(parked) is not None
    assert parked.body == b"body"
    assert parked.headers["ob-raw-properties"] == raw[:8192]


@given(st.floats(0, LONGEST_DELAY_S))
def test_a_retry_waits_at_least_as_long_as_asked_in_one_hop_or_says_until_when(delay: float) -> None:
    message = retry_message(work_of(incoming()), delay, counted=True, now_s=NOW)
    step_s = int(message.exchange.removeprefix("ob.retry.").removesuffix("ms")) / 1000

    assert step_s in RETRY_STEPS_S
    assert message.routing_key == "shop.orders.placed"
    if "ob-not-before" in message.headers:
        assert message.headers["ob-not-before"] == NOW + delay
        assert step_s == RETRY_STEPS_S[-1] < delay
    else:
        assert step_s >= delay


@pytest.mark.parametrize(("counted", "attempt"), [(True, 3), (False, 2)])
def test_a_retry_carries_its_attempts_and_the_time_of_its_first_failure(counted: bool, attempt: int) -> None:
    work = work_of(incoming({"ob-key": "a", "traceparent": "t"}), attempt=3)
    work.first_failed_at = NOW - 60

    headers = retry_message(work, 5, counted=counted, now_s=NOW).headers

    assert headers == {"ob-key": "a", "traceparent": "t", "ob-attempt": attempt, "ob-first-failed-at": NOW - 60}


def test_headers_that_would_be_obeyed_or_would_grow_are_stripped() -> None:
    stripped = {
        "CC": ["other"],
        "BCC": ["other"],
        "x-death": [{"count": 1}],
        "x-first-death-queue": "q",
        "x-last-death-reason": "r",
        "x-delivery-count": 3,
        "ob-seq": 7,
        "ob-not-before": NOW,
    }

    assert kept_headers({**stripped, "x-mine": 1, "cc": "text"}) == {"x-mine": 1, "cc": "text"}


def test_a_replay_counts_anew_and_keeps_nothing_of_its_parking() -> None:
    message = incoming({"ob-key": "a", "traceparent": "t"})
    work = work_of(message, attempt=8)
    work.first_failed_at = NOW
    parked = parked_message(message, "failed", ValueError("no"), work=work, now_s=NOW)
    letter = Incoming(
        queue="shop.orders.placed.dlq", exchange="", routing_key="shop.orders.placed.dlq", body=parked.body, tag=2, epoch=1,
        properties=Properties(message_id=parked.message_id, type=parked.type, headers=parked.headers),
    )  # fmt: skip

    replayed = replayed_message(letter, "shop.orders.placed")

    assert replayed.headers == {"ob-key": "a", "traceparent": "t"}
    assert (replayed.message_id, replayed.type, replayed.body) == ("id", "orders.placed", message.body)
    assert (replayed.exchange, replayed.routing_key) == ("", "shop.orders.placed")


def test_a_type_that_was_missing_is_filled_in_from_the_handler() -> None:
    message = incoming()
    message._properties = Properties(message_id="id")

    assert retry_message(work_of(message), 5, counted=True, now_s=NOW).type == "orders.placed"


@given(texts)
def test_an_errors_text_is_bounded_and_can_be_sent(text: str) -> None:
    assert error_text(ValueError(text * 100)).encode() == error_text(ValueError(text * 100)).encode()
    assert len(error_text(ValueError(text * 100))) <= 1000


def test_an_error_that_can_not_be_printed_has_a_text_all_the_same() -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert error_text(BrokenError()) == "BrokenError can't say what it is about"


@given(values)
def test_the_size_of_a_header_is_never_guessed_too_small(value: Any) -> None:
    from orderbus.adapters.rabbitmq.fields import Unsendable, encode_headers

    try:
        encoded = encode_headers({"name": value})
    except Unsendable:
        return
    assert header_bytes({"name": value}) >= len(encoded)
