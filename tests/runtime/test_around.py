"""What stands around handlers: resources, middleware, and work that nobody delivers."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import anyio
import pytest

from orderbus import (
    Batch,
    Delivery,
    Park,
    Retry,
    Tx,
    new_id,
)
from tests.runtime.world import Log, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class Pool:
    def __init__(self, name: str = "") -> None:
        self.name = name


class Mailer:
    pass


async def test_resources_open_in_order_are_injected_by_type_and_close_after_the_drain(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.resource
    async def pool() -> AsyncIterator[Pool]:
        log("pool opened")
        yield Pool("the pool")
        log("pool closed")

    @bus.resource
    async def mailer() -> AsyncIterator[Mailer]:
        log("mailer opened")
        yield Mailer()
        log("mailer closed")

    @bus.on(Placed)
    async def handle(event: Placed, pool: Pool, mailer: Mailer) -> None:
        log("begun")
        await anyio.sleep(1)
        log(f"ended with {pool.name}")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: "begun" in log.lines)

    assert log.lines == [
        "pool opened", "mailer opened", "begun", "ended with the pool", "mailer closed", "pool closed",
    ]  # fmt: skip


async def test_a_resource_that_can_not_be_opened_stops_the_start_and_closes_the_others(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.resource
    async def pool() -> AsyncIterator[Pool]:
        yield Pool()
        log("pool closed")

    @bus.resource
    async def mailer() -> AsyncIterator[Mailer]:
        if log.lines == []:
            raise ConnectionRefusedError("no mail today")
        yield Mailer()

    with pytest.raises(ConnectionRefusedError):
        await bus.__aenter__()
    assert bus.draining
    assert log.lines == ["pool closed"]
    async with bus:
        pass

    assert receipt_of(bus).clean


@pytest.mark.parametrize("how", ["raised", "cancelled"])
async def test_resources_are_closed_however_the_bus_ends(world: World, how: str) -> None:
    bus, log = world.bus(), Log()

    @bus.resource
    async def pool() -> AsyncIterator[Pool]:
        yield Pool()
        await anyio.sleep(1)
        log("closed")

    with anyio.move_on_after(5), contextlib.suppress(KeyError):
        async with bus:
            if how == "raised":
                raise KeyError
            await anyio.sleep(100)

    assert log.lines == ["closed"]


async def test_middleware_goes_around_every_unit_the_first_outermost(world: World) -> None:
    bus, log = world.bus(), Log()

    def around(name: str) -> Callable[..., Awaitable[None]]:
        async def middleware(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
            log(f"{name} before {[delivery.key for delivery in deliveries]}")
            await call_next()
            log(f"{name} after")

        return middleware

    bus.middleware(around("outer"))
    bus.middleware(around("inner"))

    @bus.on(Placed, fuse=2, concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.order)

    async with bus:
        await world.broker.publish([world.message(Placed(order=key), new_id()) for key in "ab"])
        await until(lambda: bus.stats.handled == 2)

    assert log.lines == [
        "outer before ['a', 'b']", "inner before ['a', 'b']", "a", "b", "inner after", "outer after",
    ]  # fmt: skip


async def test_middleware_sees_and_may_change_what_a_single_delivery_failed_with(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.middleware
    async def translate(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        try:
            await call_next()
        except ZeroDivisionError as error:
            log(repr(error))
            raise Park("can-not-divide") from error

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        1 / event.n

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == ["ZeroDivisionError('division by zero')"]
    assert world.parked()[0].properties.headers["ob-reason"] == "can-not-divide"


async def test_middleware_that_swallows_a_failure_changes_nothing_about_it(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.middleware
    async def swallow(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        try:
            await call_next()
        except ZeroDivisionError:
            log("swallowed")

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        1 / event.n

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == ["swallowed"]


async def test_middleware_that_fails_after_the_commit_repeats_no_effect(world: World) -> None:
    bus, log = world.bus(), Log()
    failures = iter([True])

    @bus.middleware
    async def late(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        await call_next()
        if next(failures, False):
            raise ZeroDivisionError

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == [0]


async def test_middleware_that_forgets_to_call_on_is_a_usage_error(world: World) -> None:
    bus = world.bus()

    @bus.middleware
    async def forgetful(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None: ...

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None: ...

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    headers = world.parked()[0].properties.headers
    assert headers["ob-error"] == "UsageError"
    assert "forgetful (" in headers["ob-error-text"]
    assert "returned without having called `call_next`; await call_next() in it" in headers["ob-error-text"]


async def test_middleware_goes_around_a_batch_too(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.middleware
    async def count(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
        log(len(deliveries))
        await call_next()

    @bus.on_batch(Placed)
    async def handle(batch: Batch[Placed]) -> None:
        batch.items[0].park("first")

    async with bus:
        await world.broker.publish([world.message(Placed(order="a", n=n), new_id()) for n in range(3)])
        await until(lambda: world.parked())

    assert log.lines == [3]
    assert receipt_of(bus).stats.handled == 2


async def test_periodic_work_runs_in_a_transaction_of_its_own_and_its_events_go_out(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.resource
    async def pool() -> AsyncIterator[Pool]:
        yield Pool("the pool")

    @bus.every(10)
    async def remind(tx: Tx, pool: Pool) -> Placed:
        tx.emit(Placed(order=pool.name, n=1))
        return Placed(order=pool.name, n=2)

    @bus.every(30)
    async def untold():
        return [Placed(order="untold", n=3)]

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log((event.order, event.n))

    async with bus:
        await anyio.sleep(31)

    assert sorted(log.lines) == [("the pool", 1)] * 3 + [("the pool", 2)] * 3 + [("untold", 3)]
    assert log.times[0] == pytest.approx(10, abs=0.5)


async def test_periodic_work_that_fails_or_hangs_is_rolled_back_logged_and_comes_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bus, log = world.bus(), Log()

    @bus.every(10, timeout=5)
    async def remind(tx: Tx) -> None:
        log("begun")
        tx.emit(Placed(order="ghost"))
        if len(log.lines) == 1:
            raise ZeroDivisionError
        if len(log.lines) == 2:
            await anyio.sleep(1000)

    async with bus:
        await anyio.sleep(50)

    assert log.waits[:2] == pytest.approx([10, 15], abs=0.1)
    assert receipt_of(bus).stats.failed == 2
    assert receipt_of(bus).stats.emitted == 2
    assert "remind (" in caplog.text
    failures = [vars(record) for record in caplog.records if record.exc_info]
    assert [failure["orderbus.periodic"].rpartition(".")[2] for failure in failures] == ["remind"] * 2
    assert "ZeroDivisionError" in caplog.text


async def test_periodic_work_does_not_begin_during_a_drain(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.every(1)
    async def tick() -> None:
        log("tick")

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log("begun")
        await anyio.sleep(10)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: "begun" in log.lines)

    assert log.lines.count("tick") <= 1
