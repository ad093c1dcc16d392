"""What follows a failure: tries in the process, over the ladder, or the dead letters, with the delays of the policy."""

import anyio
import pytest

from orderbus import Delivery, HandlerTimeout, Park, Retry, RetryLater, UnavailableError
from tests.runtime.world import Log, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


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
