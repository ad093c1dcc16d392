"""What becomes of a message: handled once, tried again by policy, or parked with its reason."""

import anyio
import msgspec
import pytest

from orderbus import Delivery, HandlerTimeout, Park, Retry, RetryLater, UnavailableError, new_id
from orderbus._core.ids import uuid7
from orderbus._core.message import MSGPACK
from tests.runtime.world import Log, Noted, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


async def test_an_event_is_handled_once_and_acknowledged(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed, delivery: Delivery) -> None:
        log((event, delivery.id, delivery.topic, delivery.key, delivery.attempt))

    async with bus:
        event_id = await world.send(Placed(order="a", n=7))
        await log.reached(1)

    assert log.lines == [(Placed(order="a", n=7), event_id, "orders.placed", "a", 1)]
    assert world.ready() == 0
    assert receipt_of(bus).clean
    assert receipt_of(bus).stats.handled == 1


async def test_a_redelivered_event_is_not_handled_again(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        event_id = await world.send(Placed(order="a", n=1))
        await world.send(Placed(order="a", n=1), event_id=event_id)
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == [1]
    assert world.ready() == 0


async def test_the_same_id_with_another_body_is_parked_and_not_taken_for_a_duplicate(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        event_id = await world.send(Placed(order="a", n=1))
        await log.reached(1)
        await world.send(Placed(order="a", n=2), event_id=event_id)
        await until(lambda: world.parked())

    assert log.lines == [1]
    assert world.parked()[0].properties.headers["ob-reason"] == "id-reused"


async def test_both_formats_are_read_whatever_the_bus_writes(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        await world.send(Placed(order="a", n=1), content_type="application/json; charset=utf-8")
        await log.reached(1)
        await world.send(Placed(order="a"), body=msgspec.msgpack.encode(Placed(order="a", n=2)), content_type=MSGPACK)
        await log.reached(2)

    assert log.lines == [1, 2]


async def test_unknown_fields_of_a_newer_version_are_ignored(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event)

    async with bus:
        await world.send(Placed(order="a"), body=b'{"order":"a","n":3,"colour":{"deep":[1]}}')
        await log.reached(1)

    assert log.lines == [Placed(order="a", n=3)]


async def test_quick_retries_happen_in_the_process_with_the_delays_of_the_policy(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.exponential(first=0.1, attempts=4))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt < 4:
            raise CardRefused

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(4)

    assert log.lines == [1, 2, 3, 4]
    assert log.waits == pytest.approx([0.1, 0.2, 0.4], abs=0.02)
    assert receipt_of(bus).stats.retried == 3


async def test_longer_retries_go_over_the_ladder_rounded_up_to_its_steps(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.exponential(first=1.5, factor=3, limit=40, attempts=5))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        raise CardRefused("no")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [1, 2, 3, 4, 5]
    assert log.waits == pytest.approx([2, 5, 20, 60], abs=0.05)


async def test_attempts_are_counted_over_both_kinds_of_retries(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.exponential(first=0.4, factor=2, attempts=5))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        raise CardRefused("no")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [1, 2, 3, 4, 5]
    assert log.waits == pytest.approx([0.4, 0.8, 2, 5], abs=0.05)
    assert world.parked()[0].properties.headers["ob-attempt"] == 5


async def test_what_waits_for_its_retry_holds_up_nobody(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, concurrency=1, prefetch=2, retry=Retry.fixed(0.9, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(event.n)
        if event.n == 0 and delivery.attempt == 1:
            raise CardRefused

    async with bus:
        for n in range(4):
            await world.send(Placed(order="a", n=n))
        await log.reached(5)

    assert log.lines == [0, 1, 2, 3, 0]


async def test_a_parked_message_says_why_where_and_when_and_keeps_its_exact_bytes(world: World) -> None:
    bus = world.bus()
    body = b'{ "order" : "a",  "n" : 7, "extra": [] }'

    @bus.on(Placed, name="charge", retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed) -> None:
        raise CardRefused("the bank said no")

    async with bus:
        began = world.now()
        event_id = await world.send(
            Placed(order="a"), body=body, timestamp_s=1234, headers={"ob-key": "a", "traceparent": "00-1-2-01"}
        )
        await until(lambda: world.parked("shop.charge"))

    (letter,) = world.parked("shop.charge")
    headers = letter.properties.headers
    assert letter.body == body
    assert letter.properties.message_id == str(event_id)
    assert letter.properties.type == "orders.placed"
    assert letter.properties.timestamp_s == 1234
    assert headers["traceparent"] == "00-1-2-01"
    assert headers["ob-key"] == "a"
    assert headers["ob-reason"] == "retries-exhausted"
    assert headers["ob-error"] == "CardRefused"
    assert headers["ob-error-text"] == "the bank said no"
    assert headers["ob-handler"] == "shop.charge"
    assert headers["ob-queue"] == "shop.charge"
    assert headers["ob-attempt"] == 2
    assert headers["ob-first-failed-at"] == pytest.approx(began, abs=0.1)
    assert headers["ob-parked-at"] == pytest.approx(began + 2, abs=0.1)
    assert not {name for name in headers if name.startswith("x-")}


async def test_never_parks_at_the_first_failure(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.exponential(attempts=8).never(CardRefused))
    async def handle(event: Placed) -> None:
        log(event.n)
        raise CardRefused("no")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [0]
    assert world.parked()[0].properties.headers["ob-reason"] == "never-retried"


async def test_an_error_out_of_a_handlers_task_group_is_judged_as_if_it_were_bare(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.exponential(attempts=8).never(CardRefused))
    async def handle(event: Placed) -> None:
        log(event.n)

        async def ask_the_bank() -> None:
            raise CardRefused("no")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask_the_bank)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [0]
    assert world.parked()[0].properties.headers["ob-error"] == "CardRefused"


async def test_park_sends_it_away_with_the_handlers_own_reason(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        raise Park("fraud-suspected")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert world.parked()[0].properties.headers["ob-reason"] == "fraud-suspected"


@pytest.mark.parametrize("reason", [None, 5, "x" * 5000, "lone surrogate \udcff"])
async def test_a_reason_of_any_kind_parks(world: World, reason: object) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        raise Park(reason)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert str(world.parked()[0].properties.headers["ob-reason"])[:4] == str(reason)[:4]


@pytest.mark.parametrize("retry", [Retry.none(), Retry.exponential(attempts=3)])
async def test_retry_later_overrules_the_policys_delay(world: World, retry: Retry) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=retry)
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        raise RetryLater(10)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    tries = 1 if retry == Retry.none() else 3
    assert log.lines == list(range(1, tries + 1))
    assert log.waits == pytest.approx([10] * (tries - 1), abs=0.05)
    assert world.parked()[0].properties.headers["ob-reason"] == "retries-exhausted"


async def test_an_uncounted_retry_uses_up_no_attempt(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if len(log.lines) < 6:
            raise RetryLater(0.5 if len(log.lines) % 2 else 30, counted=False)

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(6)

    assert log.lines == [1] * 6
    assert log.waits == pytest.approx([0.5, 30, 0.5, 30, 0.5], abs=0.05)
    assert world.parked() == []


async def test_a_delay_of_hours_takes_several_hops_that_do_not_count(world: World) -> None:
    bus, log = world.bus(relay=False), Log()

    @bus.on(Placed, retry=Retry.exponential(attempts=3))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt == 1:
            raise RetryLater(2.75 * 3600)

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(2)

    assert log.lines == [1, 2]
    assert 2.75 * 3600 <= log.waits[0] <= 3 * 3600 + 1
    assert receipt_of(bus).stats.failed == 1


async def test_a_handler_over_its_time_is_cancelled_and_its_failure_follows_the_policy(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, timeout=5, retry=Retry.fixed(0.5, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(round(delivery.deadline - anyio.current_time(), 3))
        try:
            await anyio.sleep(1000)
        finally:
            log("ended")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [5.0, "ended", 5.0, "ended"]
    assert log.waits == pytest.approx([5, 0.5, 5], abs=0.02)
    headers = world.parked()[0].properties.headers
    assert headers["ob-error"] == "HandlerTimeout"
    assert "handle (" in str(headers["ob-error-text"])
    assert "timeout of 5 s" in str(headers["ob-error-text"])


async def test_a_timeout_can_have_a_rule_of_its_own(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, timeout=1, retry=Retry.exponential(attempts=8).never(HandlerTimeout))
    async def handle(event: Placed) -> None:
        log(0)
        await anyio.sleep(1000)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [0]


async def test_a_time_limit_of_the_handlers_own_is_a_plain_failure(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        with anyio.fail_after(1):
            await anyio.sleep(1000)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert world.parked()[0].properties.headers["ob-error"] == "TimeoutError"


async def test_a_server_that_a_handler_misses_is_waited_for_without_counting(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if len(log.lines) < 12:
            raise UnavailableError("the bank's line is dead")

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(12)

    assert log.lines == [1] * 12
    assert all(0.05 <= wait <= 5.05 for wait in log.waits)
    assert log.waits[-1] > log.waits[0]
    assert world.parked() == []
    assert (receipt_of(bus).stats.waited, receipt_of(bus).stats.failed) == (11, 0)


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


@pytest.mark.parametrize(
    "error", [NoText(), ValueError("name \udcff"), ValueError("x" * 100_000), ExceptionGroup("two", [ValueError(), KeyError()])]
)
async def test_an_error_of_any_kind_can_be_parked(world: World, error: Exception) -> None:
    bus = world.bus()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        raise error

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert world.parked()[0].properties.headers["ob-error"] == type(error).__name__


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": b"not json"}, "undecodable"),
        ({"body": b""}, "undecodable"),
        ({"body": b"\xff\xfe"}, "undecodable"),
        ({"body": b'{"x":' + b"[" * 100_000}, "undecodable"),
        ({"body": b'{"order": 5}'}, "wrong-type"),
        ({"body": b'{"n": 5}'}, "wrong-type"),
        ({"body": b'{"order": "a", "n": 1e999}'}, "wrong-type"),
        ({"body": b'{"order":"' + b"x" * (1 << 20) + b'"}'}, "body-too-large"),
        ({"content_type": "text/plain"}, "unknown-content-type"),
        ({"content_type": MSGPACK}, "wrong-type"),
        ({"message_id": ""}, "no-event-id"),
        ({"message_id": "order-5"}, "no-event-id"),
        ({"type": "orders.unheard-of"}, "unknown-topic"),
        ({"headers": {"ob-attempt": "many"}}, "malformed-attempt"),
        ({"headers": {"ob-attempt": -1}}, "malformed-attempt"),
        ({"headers": {"ob-attempt": True}}, "malformed-attempt"),
        ({"headers": {f"h{n}": "x" for n in range(49)}}, "too-many-headers"),
        ({"headers": {f"h{n}": "x" for n in range(64)}}, "too-many-headers"),
        ({"headers": {f"h{n}": "x" * 700 for n in range(20)}}, "headers-too-large"),
        ({"message_id": str(uuid7(1_000_000, 1))}, "older-than-window"),
    ],
)
async def test_what_can_not_be_read_is_parked_at_once_and_harms_nobody_else(world: World, changes: dict, reason: str) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        poison = world.message(Placed(order="a"), new_id(), **changes)
        await world.broker.publish([poison, world.message(Placed(order="b", n=1), new_id())])
        await log.reached(1)
        await until(lambda: world.parked())

    (letter,) = world.parked()
    assert letter.body == poison.body
    assert letter.properties.headers["ob-reason"] == reason
    assert letter.properties.headers["ob-error-text"]
    assert log.lines == [1]
    assert receipt_of(bus).stats.parked == 1


async def test_an_event_that_refuses_its_own_fields_is_parked(world: World) -> None:
    bus = world.bus()

    @bus.on(Picky)
    async def handle(event: Picky) -> None: ...

    async with bus:
        await world.send(Picky(size=1), body=b'{"size":-1}')
        await world.send(Picky(size=1), body=b'{"size":0}')
        await until(lambda: len(world.parked("shop.picky")) == 2)

    assert [letter.properties.headers["ob-reason"] for letter in world.parked("shop.picky")] == ["wrong-type"] * 2


class Picky(Noted, topic="picky"):
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("negative")
        {1: "one"}[self.size]


async def test_sixty_bytes_short_of_the_limit_of_headers_a_message_is_still_retried_and_parked(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(len(delivery.headers))
        raise CardRefused("ü" * 5000)

    async with bus:
        await world.send(Placed(order="a"), headers={"ob-key": "a", **{f"h{n}": "x" * 200 for n in range(48)}})
        await until(lambda: world.parked())

    headers = world.parked()[0].properties.headers
    assert len(log.lines) == 2
    assert headers["ob-reason"] == "retries-exhausted"
    assert headers["ob-key"] == "a"
    assert headers["h0"] == "x" * 200
    assert len(headers) + int(headers.get("ob-left-out", 0)) >= 57


@pytest.mark.parametrize("name", ["ob-not-before", "ob-first-failed-at"])
@pytest.mark.parametrize("value", [1e300, -1e300, "soon", True, None, 1 << 62])
async def test_a_time_in_a_strangers_header_that_is_none_is_ignored(world: World, name: str, value: object) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt == 1:
            raise CardRefused

    async with bus:
        await world.send(Placed(order="a"), headers={name: value})
        await log.reached(2)

    assert log.lines == [1, 2]


async def test_a_message_without_a_type_is_the_queues_only_event_also_after_the_ladder(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, name="charge", retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        raise CardRefused

    async with bus:
        await world.send(Placed(order="a"), type="")
        await until(lambda: world.parked("shop.charge"))

    assert log.lines == [1, 2]
    assert world.parked("shop.charge")[0].properties.type == "orders.placed"


async def test_two_handlers_of_a_group_each_get_the_event(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def first(event: Placed) -> None:
        log("first")

    @bus.on(Placed, name="second")
    async def second(event: Placed) -> None:
        log("second")

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(2)

    assert sorted(log.lines) == ["first", "second"]


async def test_two_groups_each_get_the_event_and_the_buses_of_one_group_share_it(world: World) -> None:
    log = Log()
    buses = [world.bus("shop"), world.bus("shop"), world.bus("audit")]
    for bus in buses:

        def register(group: str, bus=bus) -> None:
            @bus.on(Placed)
            async def handle(event: Placed) -> None:
                log((group, event.n))

        register(bus.group)

    async with buses[0], buses[1], buses[2]:
        for n in range(10):
            await world.send(Placed(order="a", n=n))
        await log.reached(20)
        await anyio.sleep(10)

    assert sorted(log.lines) == sorted((group, n) for group in ("shop", "audit") for n in range(10))


async def test_no_more_run_at_a_time_than_the_concurrency_says(world: World) -> None:
    bus, log = world.bus(), Log()
    running = most = 0

    @bus.on(Placed, concurrency=3)
    async def handle(event: Placed) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(1)
        running -= 1
        log(event.n)

    async with bus:
        for n in range(10):
            await world.send(Placed(order=str(n), n=n))
        await log.reached(10)

    assert most == 3


async def test_no_more_are_taken_from_the_broker_than_the_prefetch_says(world: World) -> None:
    bus, gate = world.bus(), anyio.Event()

    @bus.on(Placed, concurrency=2, prefetch=4)
    async def handle(event: Placed) -> None:
        await gate.wait()

    async with bus:
        for n in range(50):
            await world.send(Placed(order=str(n), n=n))
        await until(lambda: bus.stats.received == 4)
        await anyio.sleep(30)
        held = bus.stats.received
        gate.set()
        await until(lambda: bus.stats.handled == 50)

    assert held == 4


async def test_a_handler_that_runs_while_the_bus_opens_may_use_it(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        log(await bus.publish(Noted()))

    async with bus:
        pass  # the queue is there now
    await world.send(Placed(order="a"))
    async with bus:
        await log.reached(1)

    assert world.parked() == []
