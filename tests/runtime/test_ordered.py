"""Order per key: across retries, redeliveries, lost connections and restarts; and no key waits for another."""

import anyio
import pytest

from orderbus import Delivery, Park, Retry, RetryLater, Tx, UnavailableError, new_id
from tests.runtime.world import Cancelled, Log, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio

QUEUE = "shop.ordered"


class CardRefused(Exception):
    pass


async def test_a_retry_blocks_its_own_key_and_no_other(world: World) -> None:
    bus, log = world.bus(), Log()
    failures = iter([True, True])

    @bus.on(Placed, ordered=True, retry=Retry.fixed(0.5, attempts=5))
    async def handle(event: Placed) -> None:
        if event.order == "a" and event.n == 0 and next(failures, False):
            raise CardRefused
        log(f"{event.order}{event.n}")

    async with bus:
        for n in range(3):
            await world.send(Placed(order="a", n=n))
            await world.send(Placed(order="b", n=n))
        await log.reached(6)

    assert [line for line in log.lines if line[0] == "a"] == ["a0", "a1", "a2"]
    assert log.lines[:3] == ["b0", "b1", "b2"]
    assert log.times[2] < 0.1 < 1 <= log.times[3]


async def test_long_retries_stay_in_the_process_too(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, retry=Retry.fixed(30, attempts=3))
    async def handle(event: Placed) -> None:
        log(event.n)
        if event.n == 0 and len(log.lines) < 3:
            raise CardRefused

    async with bus:
        for n in range(2):
            await world.send(Placed(order="a", n=n))
        await log.reached(4)

    assert log.lines == [0, 0, 0, 1]
    assert log.waits == pytest.approx([30, 30, 0], abs=0.05)
    assert world.ready("ob.retry.30000ms") == 0


async def test_a_parked_event_gives_up_its_place_to_the_next(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True)
    async def handle(event: Placed) -> None:
        log(event.n)
        if event.n == 0:
            raise Park("no")

    async with bus:
        for n in range(2):
            await world.send(Placed(order="a", n=n))
        await log.reached(2)
        await until(lambda: world.parked(QUEUE))

    assert log.lines == [0, 1]
    assert world.parked(QUEUE)[0].properties.headers["ob-handler"] == "shop.orders.placed"


async def test_handlers_of_several_events_keep_the_order_of_a_key_across_them(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True)
    async def placed(event: Placed) -> None:
        await anyio.sleep(5)
        log(f"placed {event.n}")

    @bus.on(Cancelled, ordered=True)
    async def cancelled(event: Cancelled) -> None:
        log(f"cancelled {event.n}")

    async with bus:
        for n in range(3):
            await world.send(Placed(order="a", n=n))
            await world.send(Cancelled(order="a", n=n))
        await log.reached(6)

    assert log.lines == [f"{what} {n}" for n in range(3) for what in ("placed", "cancelled")]


async def test_fused_units_hold_one_event_of_each_key(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log((tx, event.order, event.n))

    async with bus:
        await world.broker.publish([world.message(Placed(order=key, n=n), new_id()) for n in range(4) for key in "abc"])
        await log.reached(12)

    for key in "abc":
        assert [n for _, order, n in log.lines if order == key] == [0, 1, 2, 3]
        transactions = [tx for tx, order, _ in log.lines if order == key]
        assert len(set(transactions)) == 4
    assert len({tx for tx, _, _ in log.lines}) < 12


async def test_a_lost_connection_changes_no_order_and_repeats_nothing(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, concurrency=4)
    async def handle(event: Placed) -> None:
        await anyio.sleep(0.3)
        log((event.order, event.n))

    async with bus:
        for n in range(12):
            for key in "ab":
                await world.send(Placed(order=key, n=n))
        for reached in (3, 9, 15):
            await log.reached(reached)
            world.broker.drop_connections()
        await log.reached(24)
        await until(lambda: bus.stats.handled + bus.stats.duplicates >= 24)

    for key in "ab":
        assert [n for order, n in log.lines if order == key] == list(range(12))
    assert receipt_of(bus).stats.reconnects == 3
    assert world.ready(QUEUE) == 0


async def test_a_failing_head_keeps_its_place_over_a_lost_connection(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, retry=Retry.fixed(20, attempts=10))
    async def handle(event: Placed) -> None:
        log(event.n)
        if event.n == 0 and len(log.lines) < 3:
            raise CardRefused

    async with bus:
        for n in range(3):
            await world.send(Placed(order="a", n=n))
        await log.reached(1)
        await anyio.sleep(5)
        world.broker.drop_connections()
        await log.reached(5)

    assert log.lines == [0, 0, 0, 1, 2]


async def test_only_one_of_two_buses_takes_the_ordered_queue_and_the_other_takes_over(world: World) -> None:
    first, second, log = world.bus(), world.bus(), Log()
    for name, bus in (("first", first), ("second", second)):

        def register(name: str = name, bus=bus) -> None:
            @bus.on(Placed, ordered=True, concurrency=4)
            async def handle(event: Placed) -> None:
                await anyio.sleep(0.1)
                log((name, event.n))

        register()

    async with first, second:
        for n in range(20):
            await world.send(Placed(order="a", n=n))
        await log.reached(5)
        await first.drain()
        await log.reached(20)

    assert [n for _, n in log.lines] == list(range(20))
    names = [name for name, _ in log.lines]
    assert names == sorted(names)
    assert 5 <= names.count("first") < 20


async def test_a_drain_finishes_what_runs_and_the_next_bus_goes_on_in_order(world: World) -> None:
    log = Log()

    def make() -> object:
        bus = world.bus()

        @bus.on(Placed, ordered=True, concurrency=2)
        async def handle(event: Placed) -> None:
            await anyio.sleep(1)
            log((event.order, event.n))

        return bus

    first = make()
    async with first:
        for n in range(4):
            for key in "abc":
                await world.send(Placed(order=key, n=n))
        await log.reached(2)
    finished = len(log.lines)
    async with make():
        await log.reached(12)

    assert receipt_of(first).stats.handled == finished
    assert receipt_of(first).clean
    for key in "abc":
        assert [n for order, n in log.lines if order == key] == [0, 1, 2, 3]


async def test_a_head_that_fails_for_long_is_parked_before_its_followers_hold_up_the_other_keys(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, prefetch=8, retry=Retry.exponential(first=0.5, factor=2, attempts=8))
    async def handle(event: Placed) -> None:
        log((event.order, event.n))
        if event.order == "poison" and event.n == 0:
            raise CardRefused("no")

    async with bus:
        for n in range(20):
            await world.send(Placed(order="poison", n=n))
        await world.send(Placed(order="innocent"))
        await log.reached(20)
        await until(lambda: {("innocent", 0), ("poison", 19)} <= {*log.lines})

    (letter,) = world.parked(QUEUE)
    assert letter.properties.headers["ob-reason"] == "held-up-others"
    assert letter.properties.headers["ob-error-text"] == "no"
    assert log.lines.count(("poison", 0)) >= 3
    assert [n for order, n in log.lines if order == "poison" and n] == list(range(1, 20))
    assert log.times[log.lines.index(("innocent", 0))] < 3


async def test_followers_that_trickle_in_crowd_out_a_waiting_head_too(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, prefetch=8, retry=Retry.fixed(100, attempts=3))
    async def handle(event: Placed) -> None:
        log(event.n)
        if event.n == 0:
            raise CardRefused("no")

    async with bus:
        await world.send(Placed(order="a", n=0))
        await log.reached(1)
        for n in range(1, 6):
            await world.send(Placed(order="a", n=n))
        await log.reached(6)

    assert log.lines == [0, 1, 2, 3, 4, 5]
    assert log.times[-1] < 1
    assert world.parked(QUEUE)[0].properties.headers["ob-reason"] == "held-up-others"


async def test_a_head_is_never_parked_because_a_server_is_away(world: World) -> None:
    bus, log, began = world.bus(), Log(), anyio.current_time()

    @bus.on(Placed, ordered=True, prefetch=8)
    async def handle(event: Placed) -> None:
        if anyio.current_time() < began + 300:
            raise UnavailableError("the bank's line is dead")
        log(event.n)

    async with bus:
        for n in range(20):
            await world.send(Placed(order="a", n=n))
        await log.reached(20)

    assert log.lines == list(range(20))
    assert world.parked(QUEUE) == []


async def test_ordered_handlers_wait_no_longer_than_the_broker_waits_for_an_ack(world: World) -> None:
    bus, log = world.bus(relay=False), Log()

    @bus.on(Placed, ordered=True, retry=Retry.fixed(1, attempts=3))
    async def handle(event: Placed) -> None:
        log(event.n)
        if len(log.lines) == 1:
            raise RetryLater(7200)

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(2)

    assert log.waits == [900]


async def test_events_without_a_key_have_no_order_and_do_not_wait(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True, retry=Retry.fixed(10, attempts=3))
    async def handle(event: Placed, delivery: Delivery) -> None:
        if event.n == 0 and delivery.attempt == 1:
            raise CardRefused
        log(event.n)

    async with bus:
        for n in range(3):
            await world.send(Placed(order="a", n=n), headers={})
        await log.reached(3)

    assert sorted(log.lines[:2]) == [1, 2]
    assert log.lines[2] == 0


async def test_unreadable_messages_of_a_key_give_up_their_place_at_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, ordered=True)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        good = [world.message(Placed(order="a", n=n), new_id()) for n in range(3)]
        bad = [
            world.message(Placed(order="a"), new_id(), **change)
            for change in ({"body": b"x"}, {"type": "what"}, {"message_id": "y"})
        ]
        await world.broker.publish([bad[0], good[0], bad[1], good[1], bad[2], good[2]])
        await log.reached(3)
        await until(lambda: len(world.parked(QUEUE)) == 3)

    assert log.lines == [0, 1, 2]
