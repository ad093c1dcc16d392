"""What becomes of a message that is handled: once, by whom, beside how many others."""

import anyio
import msgspec
import pytest

from orderbus import Delivery, Retry
from orderbus._core.message import MSGPACK
from tests.runtime.world import Log, Noted, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


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
