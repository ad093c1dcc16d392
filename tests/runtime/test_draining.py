"""A stop: started work finishes inside the grace time, the rest goes back, and the receipt says what happened."""

import anyio
import pytest

from orderbus import Bus, Retry, Tx, UsageError
from tests.runtime.world import Log, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


def slow(bus: Bus, log: Log, seconds: float = 5, **options: object) -> Bus:
    """A handler that takes its time, and says so when it begins and when it ends."""

    @bus.on(Placed, **options)
    async def handle(event: Placed, tx: Tx) -> None:
        log(("begun", event.n))
        tx.emit(Paid(order=event.order, n=event.n))
        await anyio.sleep(seconds)
        log(("ended", event.n))

    return bus


async def send(world: World, count: int) -> None:
    for n in range(count):
        await world.send(Placed(order=str(n), n=n))


async def test_what_runs_finishes_and_what_has_not_begun_goes_back_untouched(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log, concurrency=2, prefetch=6)

    async with bus:
        await send(world, 10)
        await until(lambda: bus.stats.received == 6)
        began = anyio.current_time()
        await bus.drain()
        took = anyio.current_time() - began

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.cancelled, receipt.clean) == (2, 4, 0, True)
    assert receipt.seconds == pytest.approx(5, abs=0.1)
    assert took == pytest.approx(5, abs=0.1)
    assert [what for what, _ in log.lines] == ["begun"] * 2 + ["ended"] * 2
    assert world.ready() == 8
    assert len(world.store.handled()) == 2


async def test_what_runs_longer_than_the_grace_time_is_cancelled_rolled_back_and_given_back(world: World) -> None:
    log = Log()
    bus = slow(world.bus(grace_s=3), log, seconds=50, concurrency=2, prefetch=4)

    async with bus:
        await send(world, 4)
        await until(lambda: bus.stats.received == 4)

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.cancelled, receipt.clean) == (0, 4, 2, False)
    assert receipt.seconds == pytest.approx(3, abs=0.1)
    assert [what for what, _ in log.lines] == ["begun"] * 2
    assert world.ready() == 4
    assert world.store.handled() == []
    assert world.store.outbox.rows() == []


def sweeping(bus: Bus, log: Log, seconds: float) -> Bus:
    """A periodic function that takes its time."""

    @bus.every(1)
    async def sweep(tx: Tx) -> None:
        log("begun")
        tx.emit(Paid(order="a"))
        await anyio.sleep(seconds)
        log("ended")

    @bus.on(Paid)
    async def paid(event: Paid) -> None: ...

    return bus


async def test_a_periodic_function_under_way_finishes_and_begins_no_other_round(world: World) -> None:
    log = Log()
    bus = sweeping(world.bus(grace_s=20), log, seconds=5)

    async with bus:
        await log.reached(1)

    receipt = receipt_of(bus)
    assert log.lines == ["begun", "ended"]
    assert (receipt.cancelled, receipt.clean) == (0, True)
    assert receipt.seconds == pytest.approx(5, abs=0.1)
    assert receipt.stats.relayed == 1


async def test_a_periodic_function_that_outlasts_the_grace_time_is_cancelled_rolled_back_and_told(world: World) -> None:
    log = Log()
    bus = sweeping(slow(world.bus(grace_s=3), log, seconds=2), log, seconds=50)

    async with bus:
        await log.reached(1)
        await send(world, 1)
        await log.reached(2)

    receipt = receipt_of(bus)
    assert log.lines == ["begun", ("begun", 0), ("ended", 0)]
    assert (receipt.finished, receipt.cancelled, receipt.clean, receipt.stats.failed) == (1, 1, False, 0)
    assert receipt.seconds == pytest.approx(3, abs=0.1)
    assert receipt.stats.emitted == 1


async def test_a_periodic_function_that_will_not_be_cancelled_makes_the_stop_unclean_and_does_not_hold_it(world: World) -> None:
    bus, log = world.bus(grace_s=3), Log()

    @bus.every(1)
    async def sweep() -> None:
        log("begun")
        with anyio.CancelScope(shield=True):
            await anyio.sleep(50)

    async with bus:
        await log.reached(1)
        await bus.drain()

    receipt = receipt_of(bus)
    assert (receipt.cancelled, receipt.clean) == (1, False)
    assert receipt.seconds == pytest.approx(8, abs=0.1)


async def test_a_periodic_function_that_waits_for_its_next_round_holds_up_no_stop(world: World) -> None:
    bus = world.bus()

    @bus.every(86_400)
    async def sweep() -> None: ...

    async with bus:
        await anyio.sleep(1)

    assert (receipt_of(bus).clean, receipt_of(bus).seconds) == (True, 0)


async def stop_by(error: BaseException, bus: Bus, world: World, log: Log) -> None:
    async with bus:
        await send(world, 1)
        await log.reached(1)
        raise error


async def test_nothing_is_lost_or_doubled_over_stops_and_starts(world: World) -> None:
    handled, started = Log(), Log()

    for round_ in range(4):
        bus = world.bus(grace_s=1)

        @bus.on(Placed, concurrency=3, prefetch=8)
        async def handle(event: Placed) -> Paid:
            started(event.n)
            await anyio.sleep(0.5 if event.n % 2 else 3)
            return Paid(order=event.order, n=event.n)

        @bus.on(Paid, concurrency=2)
        async def paid(event: Paid) -> None:
            handled(event.n)

        async with bus:
            if round_ == 0:
                await send(world, 20)
            await started.reached(4 * (round_ + 1))
            if round_ == 3:
                await handled.reached(20)
                await anyio.sleep(60)

    assert sorted(handled.lines) == list(range(20))
    assert world.parked() == []


async def test_a_retry_that_waits_in_the_process_goes_back_and_counts_as_released(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(0.9, attempts=5))
    async def handle(event: Placed) -> None:
        log(event.n)
        raise CardRefused

    async with bus:
        await send(world, 1)
        await log.reached(1)
        await anyio.sleep(0.1)

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.clean) == (0, 1, True)
    assert world.ready() == 1


async def test_what_fails_during_the_drain_and_would_wait_goes_back(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(0.9, attempts=5))
    async def handle(event: Placed) -> None:
        log(event.n)
        await anyio.sleep(1)
        raise CardRefused

    async with bus:
        await send(world, 1)
        await log.reached(1)

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.clean) == (0, 1, True)
    assert world.ready() == 1


async def test_what_fails_during_the_drain_for_the_ladder_or_for_good_is_moved_there(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(5, attempts=2).never(KeyError))
    async def handle(event: Placed) -> None:
        log(event.n)
        await anyio.sleep(1)
        raise KeyError if event.n else CardRefused

    async with bus:
        await send(world, 2)
        await log.reached(2)

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.clean) == (2, 0, True)
    assert world.ready("ob.retry.5000ms") == 1
    assert len(world.parked()) == 1


async def test_a_second_drain_waits_for_the_first(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log)

    async with bus:
        await send(world, 1)
        await log.reached(1)

        async def stop(name: str) -> None:
            await bus.drain()
            log(name)

        async with anyio.create_task_group() as drains:
            drains.start_soon(stop, "first")
            drains.start_soon(stop, "second")
        assert bus.draining

    assert log.lines[:2] == [("begun", 0), ("ended", 0)]
    assert sorted(log.lines[2:]) == ["first", "second"]
    assert receipt_of(bus).finished == 1


async def test_a_drain_is_not_cut_short_by_a_cancellation(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log)

    with anyio.move_on_after(1):
        async with bus:
            await send(world, 1)
            await anyio.sleep(1000)

    assert log.lines == [("begun", 0), ("ended", 0)]
    assert receipt_of(bus).clean


async def test_a_body_that_raises_is_drained_too_and_its_error_comes_out_as_it_was(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log)

    with pytest.raises(CardRefused):
        await stop_by(CardRefused(), bus, world, log)

    assert log.lines == [("begun", 0), ("ended", 0)]
    assert receipt_of(bus).finished == 1


async def test_a_body_that_exits_the_program_is_drained_too(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log)

    with pytest.raises(SystemExit):
        await stop_by(SystemExit(3), bus, world, log)

    assert log.lines == [("begun", 0), ("ended", 0)]


async def test_a_drain_while_the_broker_is_away_ends_in_time_and_is_not_clean_where_acks_are_owed(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log, seconds=2)

    async with bus:
        await send(world, 1)
        await log.reached(1)
        world.broker.drop_connections()

    receipt = receipt_of(bus)
    assert receipt.seconds < 10
    assert world.ready() == 1
    assert not receipt.clean


async def test_an_idle_bus_stops_at_once_and_clean(world: World) -> None:
    bus = slow(world.bus(), Log())

    async with bus:
        assert not bus.draining

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.released, receipt.cancelled, receipt.clean, receipt.seconds) == (0, 0, 0, True, 0)


async def test_a_drain_ends_while_the_broker_takes_no_publishes(world: World) -> None:
    bus, log = world.bus(grace_s=4), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        world.broker.block()
        log(event.n)
        raise CardRefused

    async with bus:
        await send(world, 1)
        await log.reached(1)

    receipt = receipt_of(bus)
    assert (receipt.finished, receipt.cancelled, receipt.clean) == (0, 1, False)
    assert receipt.seconds < 15
    assert world.ready() == 1
    assert world.parked() == []


async def test_a_bus_that_has_stopped_can_be_opened_again(world: World) -> None:
    log = Log()
    bus = slow(world.bus(), log, seconds=0)

    for n in range(2):
        async with bus:
            await send(world, 1)
            await log.reached(2 * (n + 1))

    assert receipt_of(bus).stats.handled == 1


async def test_a_closed_bus_says_how_to_use_it(world: World) -> None:
    bus = world.bus()

    assert bus.draining
    with pytest.raises(UsageError, match=r"the bus 'shop' \(.*\.py:\d+\) is not open; use it inside `async with bus:`"):
        await bus.drain()
    with pytest.raises(UsageError, match="is not open"):
        await bus.publish(Placed(order="a"))
    async with bus:
        with pytest.raises(UsageError, match="is open already; register everything before"):
            bus.on(Placed)(slow)
        with pytest.raises(UsageError, match="is open already"):
            await bus.__aenter__()
        with pytest.raises(UsageError, match="is open already"):
            bus.middleware(None)
    assert receipt_of(bus).clean


async def test_what_a_lost_queue_had_on_its_way_out_is_not_counted_as_cancelled(world: World) -> None:
    bus, log = world.bus(grace_s=1), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        world.broker.refuse_publishes(10)
        log("failed")
        raise CardRefused

    @bus.on(Paid)
    async def handle_paid(event: Paid) -> None:
        log("begun")
        await anyio.sleep(50)

    async with bus:
        await world.send(Paid(order="a"))
        await world.send(Placed(order="a"))
        await log.reached(2)
        world.broker.drop_connections()

    receipt = receipt_of(bus)
    assert (receipt.released, receipt.cancelled, receipt.clean) == (2, 1, False)
