"""What a consumer reads of a delivery before its handler may see it; what can't be read is refused with a reason, and is parked."""

from __future__ import annotations

import math
from typing import Any
from uuid import UUID, uuid4

import pytest

from orderbus import Event, InvariantError, MessageError, Retry, UsageError
from orderbus._core.codec import body_hash
from orderbus._core.delivery import State, Step
from orderbus._core.handler import Handler, Options, Plan
from orderbus._core.ids import uuid7
from orderbus._core.message import Incoming, Properties
from orderbus._core.policy import LONGEST_DELAY_S
from orderbus._core.signing import SigningKeys
from orderbus._core.work import Route, Work, check_tx_result

NOW = 1_800_000_000.0
WINDOW_S = 7 * 86_400.0
ID = uuid7(int(NOW * 1000), 5)
BODY = b'{"order":"a"}'


class Placed(Event, topic="orders.placed", key="order"):
    order: str


class Paid(Event, topic="orders.paid"):
    order: str


async def handle(event: Placed) -> None: ...


HANDLER = Handler("shop", handle, (Placed,), Options(Retry.none()))
PLAN = Plan(("event",), ())


def route(event: type[Event] = Placed, **options: Any) -> Route:
    return Route(HANDLER, PLAN, event, limit_bytes=100, **options)


ROUTES = {"orders.placed": route(), "orders.paid": route(Paid)}


def read(
    headers: dict[str, Any] | None = None, *, routes: dict[str, Route] | None = None, body: bytes = BODY, **given: Any
) -> Work:
    """A delivery that was read; its properties are those of a good one but for what is given."""
    raw = given.pop("raw", b"")
    routing_key = given.pop("routing_key", "orders.placed.07")
    properties = Properties(**{"message_id": str(ID), "type": "orders.placed", **given}, headers=headers or {})
    work = Work(
        Incoming(
            queue="shop.orders.placed", exchange="ob.events", routing_key=routing_key, body=body, tag=1, epoch=1, raw=raw,
            properties=properties,
        )
    )  # fmt: skip
    work.read(ROUTES if routes is None else routes, now_s=NOW, window_s=WINDOW_S)
    return work


def refused(*arguments: Any, **given: Any) -> tuple[str, str]:
    """Reason and detail of a refusal."""
    with pytest.raises(MessageError) as raised:
        read(*arguments, **given)
    return raised.value.reason, str(raised.value)


def test_a_good_delivery_has_its_route_id_key_attempt_and_event() -> None:
    work = read({"ob-key": "a", "ob-attempt": 2, "ob-first-failed-at": NOW - 60})

    assert work.route is ROUTES["orders.placed"]
    assert (work.route.handler, work.route.plan, work.route.topic) == (HANDLER, PLAN, "orders.placed")
    assert (work.id, work.key, work.attempt, work.first_failed_at, work.not_before) == (ID, "a", 3, NOW - 60, None)
    assert work.event == Placed(order="a")
    assert work.hash == body_hash(BODY)


def test_a_route_is_a_handler_its_plan_and_the_topic_of_one_of_its_events() -> None:
    made = route(Paid)

    assert (made.handler, made.plan, made.topic, made.signing) == (HANDLER, PLAN, "orders.paid", None)


def test_a_first_delivery_without_headers_is_attempt_one_and_has_no_key() -> None:
    work = read()

    assert (work.key, work.attempt, work.first_failed_at, work.not_before) == (None, 1, None, None)


@pytest.mark.parametrize("content_type", [None, "application/json", "application/json; charset=utf-8"])
def test_the_body_is_read_as_what_its_content_type_says(content_type: str | None) -> None:
    assert read(content_type=content_type).event == Placed(order="a")
    assert refused(content_type="text/plain")[0] == "unknown-content-type"


def test_the_topic_is_that_of_the_type_or_else_of_the_routing_key_without_its_bucket() -> None:
    assert isinstance(read(type="orders.paid").event, Paid)
    assert isinstance(read(type=None, routing_key="orders.paid.63").event, Paid)


def test_a_strangers_message_without_a_topic_goes_to_the_only_handler_there_is() -> None:
    only = {"orders.placed": ROUTES["orders.placed"]}

    assert read(type=None, routing_key="", routes=only).route is only["orders.placed"]
    assert refused(type="other", routes=only) == (
        "unknown-topic",
        "topic 'other' is not handled by this queue (orders.placed)",
    )
    assert refused(type=None, routing_key="x" * 500 + ".07") == (
        "unknown-topic",
        f"topic {'x' * 120!r} is not handled by this queue (orders.placed, orders.paid)",
    )


def test_a_message_is_checked_against_the_keys_of_its_route_and_topic() -> None:
    keys = SigningKeys({"k": b"secret" * 8})
    signed = {"orders.placed": route(signing=keys)}
    signature = keys.sign("orders.placed", str(ID), None, "application/json", BODY)

    assert read({"ob-signature": signature}, routes=signed).event == Placed(order="a")
    assert refused(routes=signed)[0] == "unsigned"
    assert refused({"ob-signature": signature}, routes=signed, body=b'{"order":"b"}')[0] == "bad-signature"


def test_a_body_beyond_the_limit_of_its_route_is_refused() -> None:
    assert refused(body=b'{"order":"' + b"x" * 100 + b'"}') == ("body-too-large", "the body is 112 bytes; the limit is 100")


@pytest.mark.parametrize("text", ["", "5", "x" * 100, str(ID) + "0"])
def test_an_id_that_is_no_uuid_is_refused(text: str) -> None:
    assert refused(message_id=text) == ("no-event-id", f"message_id {text[:60]!r} is not a UUID")
    assert refused(message_id=None) == ("no-event-id", "the message has no message_id; it must be the event's UUID")


def test_an_event_older_than_the_window_is_not_guessed_at() -> None:
    at_the_edge = uuid7(int((NOW - WINDOW_S) * 1000), 5)
    too_old = uuid7(int((NOW - WINDOW_S) * 1000) - 1, 5)

    assert read(message_id=str(at_the_edge)).id == at_the_edge
    assert refused(message_id=str(too_old)) == (
        "older-than-window",
        "the event is older than the dedupe window of 604800 s, so it may have been handled",
    )


def test_an_id_without_a_time_has_no_age() -> None:
    foreign = uuid4()

    assert read(message_id=str(foreign)).id == foreign
    assert read(message_id=str(UUID(int=0))).id == UUID(int=0)


@pytest.mark.parametrize("key", [5, None, True, ["a"], b"a"])
def test_a_key_that_is_no_text_is_none(key: Any) -> None:
    assert read({"ob-key": key}).key is None


@pytest.mark.parametrize("attempt", [-1, 1_000_000, True, 1.0, "1", None, ["x"] * 20])
def test_an_attempt_that_is_no_count_is_refused(attempt: Any) -> None:
    assert refused({"ob-attempt": attempt}) == ("malformed-attempt", f"header ob-attempt is {str(attempt)[:40]!r}, not a count")
    assert read({"ob-attempt": 999_999}).attempt == 1_000_000
    assert read({"ob-attempt": 0}).attempt == 1


@pytest.mark.parametrize("value", ["soon", None, math.inf, math.nan, b"", [1.0]])
def test_a_time_that_is_none_is_passed_over(value: Any) -> None:
    work = read({"ob-first-failed-at": value, "ob-not-before": value})

    assert (work.first_failed_at, work.not_before) == (None, None)


def test_a_time_in_whole_seconds_is_a_time() -> None:
    work = read({"ob-first-failed-at": int(NOW) - 5, "ob-not-before": int(NOW) + 60})

    assert (work.first_failed_at, work.not_before) == (NOW - 5, NOW + 60)
    assert type(work.first_failed_at) is float


@pytest.mark.parametrize(
    ("ahead_s", "is_waited_for"),
    [
        (-1.0, False),
        (0.5, False),
        (0.75, True),
        (3600.0, True),
        (LONGEST_DELAY_S + 86_399, True),
        (LONGEST_DELAY_S + 86_400, False),
    ],
)
def test_what_came_back_before_its_time_waits_for_it_unless_no_policy_could_have_said_so(
    ahead_s: float, is_waited_for: bool
) -> None:
    assert read({"ob-not-before": NOW + ahead_s}).not_before == (NOW + ahead_s if is_waited_for else None)


def test_a_sender_may_use_48_headers_and_what_the_broker_and_we_add_does_not_count() -> None:
    most = {f"h{n}": 1 for n in range(48)}
    added = {"ob-key": "a", "x-death": [], "x-delivery-count": 1, "x-first-death-queue": "q", "x-last-death-queue": "q"}

    assert read({**most, **added}).key == "a"
    assert refused({**most, "h48": 1}) == ("too-many-headers", "the message has 49 headers; the limit is 48")


def test_a_sender_may_use_12_kib_of_headers() -> None:
    """Each takes a byte and its name, and five bytes and its text; the table five more."""
    fits = {"a": "x" * (12 * 1024 - 5 - 2 - 5)}

    assert read(fits, raw=b"x" * 20_000).event == Placed(order="a")
    assert refused({"a": fits["a"] + "x"}, raw=b"x" * 20_000) == (
        "headers-too-large",
        "the headers take 12289 bytes; the limit is 12288",
    )


def test_headers_are_measured_only_where_there_are_many_or_their_bytes_are() -> None:
    large = {"a": "x" * 13_000}

    assert read(large, raw=b"x" * 12 * 1024).key is None
    assert refused(large, raw=b"x" * (12 * 1024 + 1))[0] == "headers-too-large"
    assert read({**large, **{f"h{n}": 1 for n in range(15)}}).key is None
    assert refused({**large, **{f"h{n}": 1 for n in range(16)}})[0] == "headers-too-large"


def test_a_delivery_takes_only_the_steps_of_the_table() -> None:
    work = read()
    work.take(Step.START)
    assert work.state is State.RUNNING
    work.take(Step.FINISH)
    assert work.state is State.ACKED
    with pytest.raises(InvariantError):
        work.take(Step.FINISH)


def test_a_handler_may_return_nothing_an_event_or_events() -> None:
    events = [Placed(order="a"), Paid(order="b")]

    assert check_tx_result(None, "here") == ()
    assert check_tx_result(events[0], "here") == (events[0],)
    assert check_tx_result(events, "here") is events
    assert check_tx_result(tuple(events), "here") == tuple(events)
    assert check_tx_result([], "here") == []


@pytest.mark.parametrize("result", [5, "text", {}, [5], [Placed(order="a"), None], iter([])])
def test_anything_else_that_a_handler_returns_is_the_programmers_error(result: object) -> None:
    with pytest.raises(UsageError) as raised:
        check_tx_result(result, "handler pay (shop.py:7)")

    assert raised.value.code == "OB307"
    assert raised.value.text == (
        f"handler pay (shop.py:7): returned {type(result).__name__}; a handler returns None, an event, or a sequence of events"
    )
