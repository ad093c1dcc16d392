"""Servers that go and come back: consumers come back with them, nothing is lost, doubled or counted."""

import anyio
import pytest

from orderbus import Retry, Tx, UnavailableError, new_id
from orderbus._core.topology import Topology
from tests.runtime.faults import StoreFaults
from tests.runtime.world import Log, Noted, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio

QUEUE = "shop.orders.placed"


class CardRefused(Exception):
    pass


async def test_consuming_goes_on_after_every_lost_connection(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        for n in range(20):
            await world.send(Placed(order="a", n=n))
            await log.reached(n + 1)
            world.broker.drop_connections()
        await until(lambda: bus.stats.reconnects == 20)

    assert log.lines == list(range(20))
    assert receipt_of(bus).stats.reconnects == 20
    assert max(log.waits) < 0.2  # the back-off starts anew each time, for each life received something


async def test_coming_back_waits_longer_and_longer_while_it_fails(world: World) -> None:
    bus, log = world.bus(), Log()
    apply = world.broker.apply

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log("handled")

    async def away(topology: object) -> None:
        log("tried")
        if len(log.lines) < 9:
            raise UnavailableError("the broker is away")
        await apply(topology)

    async with bus:
        await until(lambda: bus.stats.received == 0)
        world.broker.apply = away
        world.broker.drop_connections()
        await log.reached(9)
        await world.send(Placed(order="a"))
        await log.reached(10)

    assert log.lines == ["tried"] * 9 + ["handled"]
    assert log.waits[0] < 0.5
    assert all(2.5 <= wait <= 5 for wait in log.waits[6:8])


async def test_a_bus_consumes_from_its_start_to_its_stop_but_for_the_time_that_a_queue_comes_back(world: World) -> None:
    bus, log = world.bus(), Log()
    apply = world.broker.apply

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        pass

    @bus.on(Paid)
    async def handle_paid(event: Paid) -> None:
        pass

    async def away(topology: object) -> None:
        log(bus.consuming)
        if len(log.lines) < 4:
            raise UnavailableError("the broker is away")
        await apply(topology)

    assert not bus.consuming
    async with bus:
        assert bus.consuming
        world.broker.apply = away
        world.broker.drop_connections()
        await log.reached(4)
        await until(lambda: bus.consuming)
    assert not bus.consuming
    assert log.lines == [False] * len(log.lines)


async def test_a_queue_in_trouble_keeps_no_other_away(world: World) -> None:
    bus, log = world.bus(), Log()
    apply = world.broker.apply

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log("placed")

    @bus.on(Paid)
    async def handle_paid(event: Paid) -> None:
        pass

    async def in_trouble(topology: Topology) -> None:
        if any(queue.name == "shop.orders.paid" for queue in topology.queues):
            raise UnavailableError("the queue has no leader")
        await apply(topology)

    async with bus:
        world.broker.apply = in_trouble
        world.broker.drop_connections()
        await until(lambda: bus.stats.reconnects >= 4)
        assert not bus.consuming
        await world.send(Placed(order="a"))
        await log.reached(1)


async def test_a_handler_that_runs_while_the_connection_is_lost_may_finish_and_is_not_repeated(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log("begun")
        await anyio.sleep(3)
        log("ended")

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(1)
        world.broker.drop_connections()
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == ["begun", "ended"]
    assert world.ready() == 0


async def test_a_handler_that_takes_too_long_for_a_lost_connection_is_rolled_back_and_run_again(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> Paid:
        log("begun")
        await anyio.sleep(8)
        return Paid(order="a")

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log("paid")

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(1)
        world.broker.drop_connections()
        await log.reached(3)
        await anyio.sleep(60)

    assert log.lines == ["begun", "begun", "paid"]


async def test_a_deleted_queue_is_declared_again_with_its_bindings(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        world.broker.delete_queue(QUEUE)
        await until(lambda: QUEUE in world.broker._queues)
        await world.send(Placed(order="a", n=1))
        await log.reached(1)

    assert log.lines == [1]


async def test_a_message_that_can_not_be_parked_stays_until_it_can(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        log(event.n)
        world.broker.refuse_publishes(4)
        raise CardRefused

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())
        await until(lambda: bus.stats.parked == 1)

    assert log.lines == [0]
    assert len(world.parked()) == 1
    assert world.ready() == 0
    assert receipt_of(bus).clean


async def test_while_a_broker_takes_no_publish_the_others_are_handled_and_what_failed_waits(world: World) -> None:
    """A memory alarm may end only when its queues are consumed; so those that can't leave must not keep the workers."""
    bus, log = world.bus(), Log()

    @bus.on(Placed, concurrency=1, prefetch=20, retry=Retry.none())
    async def handle(event: Placed) -> None:
        world.broker.block()
        log(event.n)
        if event.n % 10 == 0:
            raise CardRefused

    async with bus:
        await world.broker.publish([world.message(Placed(order="a", n=n), new_id()) for n in range(60)])
        await log.reached(60)
        await anyio.sleep(3600)
        assert (world.ready(), world.parked()) == (0, [])
        world.broker.unblock()
        await until(lambda: len(world.parked()) == 6)

    assert sorted(log.lines) == list(range(60))


async def test_a_message_that_can_not_be_moved_at_all_is_rejected_and_comes_again(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        log(event.n)
        world.broker.refuse_publishes(10 if len(log.lines) == 1 else 0)
        raise CardRefused

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert log.lines == [0, 0]
    assert world.ready() == 0
    assert receipt_of(bus).stats.parked == 1  # and not two: it was in the dead letters once


async def test_a_deleted_dead_letter_queue_is_declared_again_before_anything_is_dropped(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        raise CardRefused

    async with bus:
        world.broker.delete_queue(f"{QUEUE}.dlq")
        await world.send(Placed(order="a"))
        await until(lambda: f"{QUEUE}.dlq" in world.broker._queues and world.parked())

    assert len(world.parked()) == 1


async def test_a_deleted_step_of_the_ladder_is_declared_again_too(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed) -> None:
        log(event.n)
        if len(log.lines) == 1:
            raise CardRefused

    async with bus:
        world.broker.delete_queue("ob.retry.2000ms")
        await world.send(Placed(order="a"))
        await log.reached(2)

    assert log.waits[0] >= 2


async def test_a_retry_whose_confirm_was_lost_may_come_twice_and_is_handled_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=3))
    async def handle(event: Placed) -> None:
        if not log.lines:
            log("failed")
            world.broker.lose_confirms(1)
            raise CardRefused
        log("done")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == ["failed", "done"]
    assert world.ready() == 0


async def test_publishing_right_away_says_when_it_is_not_confirmed(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    async with bus:
        world.broker.refuse_publishes(1)
        with pytest.raises(UnavailableError, match=r"did not confirm event .*: refused"):
            await bus.publish(Placed(order="a"))
        world.broker.lose_confirms(1)
        with pytest.raises(UnavailableError, match=r"did not confirm event .*: unknown"):
            await bus.publish(Placed(order="a"))
        with pytest.raises(UnavailableError, match=r"no queue is bound to 'orders.paid': start its consumers first"):
            await bus.publish(Paid(order="a"))
        await bus.publish(Noted())
        await bus.publish(Placed(order="a"))

    assert receipt_of(bus).stats.published == 1


async def test_a_database_that_is_away_is_waited_for_without_counting(world: World) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        faults.is_away = True
        for n in range(40):
            await world.send(Placed(order="a", n=n))
        await anyio.sleep(300)
        assert log.lines == []
        faults.is_away = False
        await log.reached(40)

    assert sorted(log.lines) == list(range(40))
    assert world.parked() == []
    assert receipt_of(bus).stats.failed == 0
    assert receipt_of(bus).stats.waited > 40


async def test_an_outage_is_told_of_once_for_all_that_wait_then_every_ten_seconds_and_at_its_end(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none(), fuse=10)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        for outage in (1, 2):
            faults.is_away = True
            for n in range(40):
                await world.send(Placed(order="a", n=n))
            await anyio.sleep(60)
            faults.is_away = False
            await log.reached(41 * outage - 1)
            await anyio.sleep(5)
            await world.send(Placed(order="a"))
            await log.reached(41 * outage)

    told = [record.getMessage() for record in caplog.records if record.name == "orderbus.consumer"]
    assert 2 * 5 <= len(told) <= 2 * 8
    assert "UnavailableError: the database is away; again in 0.1 s" in told[0]
    assert "tries in 1" in told[1]
    assert sum("goes on" in line for line in told) == 2


async def test_an_outage_is_polled_with_back_off_and_not_spun_on(world: World) -> None:
    bus, faults = world.bus(), StoreFaults(world.store)
    asked = Log()

    def counted() -> None:
        asked("asked")
        if faults.is_away:
            raise UnavailableError("the database is away")

    faults.check = counted

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    async with bus:
        faults.is_away = True
        await world.send(Placed(order="a"))
        before = len(asked.lines)
        await anyio.sleep(100)
        faults.is_away = False

    assert 2 * 20 <= len(asked.lines) - before <= 2 * 50


async def test_a_commit_that_was_lost_before_it_was_done_is_run_again(world: World) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> Paid:
        log("placed")
        return Paid(order="a")

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log("paid")

    async with bus:
        faults.lose_before_commit = 1
        await world.send(Placed(order="a"))
        await log.reached(3)
        await anyio.sleep(60)

    assert log.lines == ["placed", "placed", "paid"]


async def test_a_commit_whose_answer_was_lost_is_not_repeated(world: World) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> Paid:
        log("placed")
        return Paid(order="a")

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log("paid")

    async with bus:
        faults.lose_after_commit = 1
        await world.send(Placed(order="a"))
        await log.reached(2)
        await anyio.sleep(60)

    assert log.lines == ["placed", "paid"]
    assert receipt_of(bus).stats.duplicates == 1


async def test_deadlocks_are_run_again_at_once_and_do_not_count(world: World) -> None:
    bus, log, faults = world.bus(relay=False), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none(), fuse=5, concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        faults.transient = 6
        await world.broker.publish([world.message(Placed(order="a", n=n), new_id()) for n in range(3)])
        await log.reached(3)

    assert sorted(log.lines) == [0, 1, 2]
    assert log.times[-1] < 0.5
    assert world.parked() == []


async def test_one_message_that_drives_the_database_away_does_not_hold_up_those_it_shared_a_unit_with(world: World) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)

    @bus.on(Placed, retry=Retry.none(), fuse=10, concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        poison = new_id()
        faults.driven_away_by = {poison}
        await world.broker.publish(
            [world.message(Placed(order="a", n=n), poison if n == 4 else new_id()) for n in range(10)],
        )
        await log.reached(9)
        assert log.times[-1] < 5
        await world.send(Placed(order="a", n=10))
        await log.reached(10)
        faults.driven_away_by = set()
        await log.reached(11)

    assert sorted(log.lines[:9]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert log.lines[9:] == [10, 4]
    assert world.parked() == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_future_inside_a_handler_is_that_messages_failure_and_ends_no_worker(world: World) -> None:
    import asyncio

    bus, log = world.bus(), Log()

    @bus.on(Placed, concurrency=2, retry=Retry.none())
    async def handle(event: Placed) -> None:
        log(event.n)
        if event.n < 6:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future

    async with bus:
        for n in range(7):
            await world.send(Placed(order="a", n=n))
        with anyio.fail_after(10):
            await log.reached(7)
            await until(lambda: len(world.parked()) == 6)

    assert "was cancelled; catch CancelledError" in str(world.parked()[0].properties.headers["ob-error-text"])


async def test_an_error_of_the_bus_itself_ends_it_loudly(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async def broken(batch: object) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(BaseExceptionGroup) as raised:
        await run_until_broken(bus, world, broken)

    assert raised.group_contains(ZeroDivisionError)


async def run_until_broken(bus: object, world: World, broken: object) -> None:
    async with bus:
        publish, world.broker.publish = world.broker.publish, broken
        await publish([world.message(Placed(order="a"), new_id(), body=b"x")])
        await anyio.sleep(1000)
