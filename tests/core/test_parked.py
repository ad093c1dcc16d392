"""What a dead letter says of itself, whatever a stranger wrote into it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, strategies as st

from orderbus._core.ids import uuid7
from orderbus._core.leaving import ERROR, ERROR_TEXT, HANDLER, PARKED_AT, QUEUE, RAW_PROPERTIES, REASON
from orderbus._core.message import ATTEMPT, FIRST_FAILED_AT, KEY, Incoming, Properties
from orderbus._core.parked import Parked, Wanted, is_dead_letter_queue, read_parked, refusal
from orderbus.errors import MessageError

ID = "0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f"


def delivery(
    headers: dict[str, Any] | None = None, *, queue: str = "g.h.dlq", routing_key: str = "g.h.dlq", message_id: str | None = ID
) -> Incoming:
    properties = Properties(message_id=message_id, type="a.b", headers=headers or {})
    return Incoming(queue=queue, exchange="", routing_key=routing_key, body=b"{}", tag=1, epoch=1, properties=properties)


def letter(**fields: Any) -> Parked:
    return Parked(**{"queue": "g.h.dlq", "origin": "g.h", "reason": "broken", "body": b"", "event_id": ID, **fields})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([REASON, ERROR, HANDLER, QUEUE, PARKED_AT, ATTEMPT, "x-death", "ob-raw-properties", "ob-key", "other"])


@given(headers=st.dictionaries(names, values), queue=st.sampled_from(["g.h.dlq", "ob.lost"]))
def test_no_header_of_a_stranger_stops_a_listing(headers: dict[str, Any], queue: str) -> None:
    found = read_parked(delivery(headers, queue=queue))
    assert found.reason
    assert found.event_id == ID
    Wanted(reasons=("x",), since_s=0.0).matches(found)


def test_a_letter_says_all_that_its_headers_said() -> None:
    headers = {
        REASON: "broken",
        ERROR: "ValueError",
        ERROR_TEXT: "no",
        HANDLER: "g.h",
        PARKED_AT: 20,
        ATTEMPT: 3,
        FIRST_FAILED_AT: 10.5,
        KEY: "k",
        RAW_PROPERTIES: b"raw",
        "mine": 1,
    }
    properties = Properties(message_id=ID, type="a.b", content_type="application/json", headers=headers)
    found = read_parked(
        Incoming(queue="g.h.dlq", exchange="", routing_key="r", body=b"body", tag=1, epoch=1, properties=properties)
    )
    assert found == Parked(
        queue="g.h.dlq",
        origin="g.h",
        reason="broken",
        body=b"body",
        event_id=ID,
        topic="a.b",
        key="k",
        handler="g.h",
        error="ValueError",
        error_text="no",
        attempts=3,
        first_failed_at_s=10.5,
        parked_at_s=20.0,
        content_type="application/json",
        headers={"mine": 1},
        raw_properties=b"raw",
    )


def test_what_is_said_in_a_wrong_type_is_not_said() -> None:
    said = {ERROR: 1, ERROR_TEXT: b"no", HANDLER: [], KEY: 7, PARKED_AT: True, FIRST_FAILED_AT: "10", RAW_PROPERTIES: "raw"}
    for attempts in (True, "3", 3.0):
        found = read_parked(delivery({**said, ATTEMPT: attempts, QUEUE: 5, REASON: 6}, queue="ob.lost", routing_key="r"))
        assert (found.origin, found.reason, found.attempts, found.parked_at_s) == ("r", "lost", None, None)
        assert (found.error, found.error_text, found.handler, found.key) == (None, None, None, None)
        assert (found.first_failed_at_s, found.raw_properties) == (None, None)


def test_a_letter_in_the_lost_queue_comes_from_where_its_header_says() -> None:
    assert read_parked(delivery({QUEUE: "g.h"}, queue="ob.lost", routing_key="r")).origin == "g.h"


def test_unreadable_properties_are_a_letter_with_its_raw_bytes() -> None:
    def fail(raw: bytes) -> Properties:
        raise MessageError("malformed-properties", "no")

    raw = Incoming(queue="g.h.dlq", exchange="", routing_key="", body=b"b", tag=1, epoch=1, raw=b"\xff", decode=fail)
    found = read_parked(raw)
    assert (found.reason, found.raw_properties, found.body, found.event_id) == ("malformed-properties", b"\xff", b"b", None)
    assert (found.queue, found.origin, found.error_text) == ("g.h.dlq", "g.h", "no")
    assert (refusal(found, now_s=0) or "").startswith("its properties could not be read")


def test_unreadable_properties_in_the_lost_queue_leave_the_routing_key_to_say_where_from() -> None:
    def fail(raw: bytes) -> Properties:
        raise MessageError("malformed-properties", "no")

    lost = Incoming(queue="ob.lost", exchange="", routing_key="g.h", body=b"b", tag=1, epoch=1, raw=b"\xff", decode=fail)
    assert read_parked(lost).origin == "g.h"


@pytest.mark.parametrize(
    ("headers", "queue", "origin", "reason"),
    [
        ({REASON: "broken", QUEUE: "forged"}, "g.h.dlq", "g.h", "broken"),
        ({"x-death": [{"reason": "delivery_limit", "queue": "g.h", "time": 7}]}, "g.h.dlq", "g.h", "delivery-limit"),
        ({}, "g.h.dlq", "g.h", "unknown"),
        ({"x-death": [{"reason": "expired", "queue": "ob.retry.1000ms"}]}, "ob.lost", "gone.queue", "lost"),
    ],
)
def test_where_it_came_from_and_why(headers: dict[str, Any], queue: str, origin: str, reason: str) -> None:
    found = read_parked(delivery(headers, queue=queue, routing_key="gone.queue"))
    assert (found.origin, found.reason) == (origin, reason)


def test_the_broker_knows_when_it_buried_a_message() -> None:
    assert read_parked(delivery({"x-death": [{"reason": "delivery_limit", "time": 7}]})).parked_at_s == 7.0
    assert read_parked(delivery({"x-death": [{"time": 7}], PARKED_AT: 8})).parked_at_s == 8.0


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        (Wanted(), True),
        (Wanted(reasons=("other", "bro*")), True),
        (Wanted(reasons=("bro",)), False),
        (Wanted(reasons=("broken",), errors=("KeyError",)), False),
        (Wanted(ids=(ID.upper(),)), True),
        (Wanted(ids=(ID.replace("-", ""),)), True),
        (Wanted(ids=("not-an-id",)), False),
        (Wanted(since_s=5.0, before_s=11.0), True),
        (Wanted(errors=("Value*",), handlers=("g.?",), keys=("k",)), True),
        (Wanted(handlers=("g.h.i",)), False),
        (Wanted(keys=("K",)), False),
        (Wanted(since_s=10.0), True),
        (Wanted(before_s=10.0), False),
        (Wanted(since_s=10.0, before_s=10.0), False),
        (Wanted(since_s=10.5), False),
    ],
)
def test_the_wanted_match_one_of_each_list(wanted: Wanted, matches: bool) -> None:
    assert wanted.matches(letter(parked_at_s=10.0, error="ValueError", handler="g.h", key="k")) is matches


def test_a_letter_that_does_not_say_what_is_asked_for_is_not_wanted() -> None:
    for wanted in (Wanted(errors=("*",)), Wanted(handlers=("*",)), Wanted(keys=("*",)), Wanted(ids=(ID,))):
        assert not wanted.matches(letter(event_id=None))


def test_a_letter_without_a_time_is_neither_before_nor_since() -> None:
    assert not Wanted(since_s=0.0).matches(letter())
    assert not Wanted(before_s=1e12).matches(letter())


@pytest.mark.parametrize(
    ("queue", "is_one"), [("a.dlq", True), ("ob.lost", True), (".dlq", False), ("a", False), ("a.dlq.b", False)]
)
def test_only_dead_letter_queues_are_looked_into(queue: str, is_one: bool) -> None:
    assert is_dead_letter_queue(queue) is is_one


@pytest.mark.parametrize(
    ("value", "wanted", "matches"),
    [
        ("x", "x", True),
        ("x", "y", False),
        (True, "true", True),
        (False, "false", True),
        (True, "True", False),
        (7, "7", True),
        (7.5, "7.5", True),
        (b"x", "*", False),
        (None, "*", False),
        ([1], "*", False),
    ],
)
def test_a_header_is_compared_as_people_write_its_value(value: Any, wanted: str, matches: bool) -> None:
    assert Wanted(headers=(("mine", wanted),)).matches(letter(headers={"mine": value})) is matches


def test_all_wanted_headers_must_match_and_a_missing_one_matches_nothing() -> None:
    both = letter(headers={"a": "1", "b": "2"})

    assert Wanted(headers=(("a", "1"), ("b", "?"))).matches(both)
    assert not Wanted(headers=(("a", "1"), ("b", "3"))).matches(both)
    assert not Wanted(headers=(("c", "*"),)).matches(both)


@pytest.mark.parametrize("event_id", [None, "", "not-an-id"])
def test_a_letter_without_an_event_id_can_not_be_replayed(event_id: str | None) -> None:
    assert refusal(letter(event_id=event_id), now_s=0) == (
        "it has no event id (a UUID), without which its consumer parks it again at once"
    )


def test_a_letter_as_old_as_the_window_may_be_replayed_and_an_older_one_is_told_the_window_in_days() -> None:
    old = letter(event_id=str(uuid7(1_000_000, 1)))

    assert refusal(old, now_s=1_000.0 + 7 * 86_400, window_s=7 * 86_400.0) is None
    assert (refusal(old, now_s=1_001.0 + 7 * 86_400, window_s=7 * 86_400.0) or "").startswith(
        "the event is older than the dedupe window of 7 days: its consumer can't know"
    )


@pytest.mark.parametrize(
    ("event_id", "age_s", "is_refused"),
    [
        (uuid7(1_000_000, 1), 50.0, False),
        (uuid7(1_000_000, 1), 101.0, True),
        (UUID("6f1ed002-ab5f-4e3c-9d0c-3a3b1f2d7a11"), 1e9, False),
    ],
)
def test_an_event_older_than_the_window_is_refused_where_its_age_is_known(event_id: UUID, age_s: float, is_refused: bool) -> None:
    why = refusal(letter(event_id=str(event_id)), now_s=1_000.0 + age_s, window_s=100.0)
    assert (why is not None) is is_refused
    assert refusal(letter(event_id=str(event_id)), now_s=1_000.0 + age_s) is None
