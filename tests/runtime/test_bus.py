"""What a bus offers beside handlers: transactions, ids, formats, signals, and the errors of its start."""

import gc
import os
import signal
from collections.abc import AsyncIterator
from datetime import datetime
from uuid import UUID

import anyio
import pytest

from orderbus import (
    Bus,
    Delivery,
    Event,
    Settings,
    SettingsError,
    TopologyError,
    UnavailableError,
    UsageError,
    collect_rarely,
    new_id,
    run_until_signalled,
)
from orderbus._core.ids import uuid7_time_ms
from orderbus._core.topology import QueueNeed, topology_for
from tests.runtime.world import Log, Noted, Paid, Placed, World, receipt_of
from tests.servers import free_port

pytestmark = pytest.mark.anyio


async def test_a_transaction_outside_handlers_commits_on_leaving(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.id)

    async with bus:
        async with bus.transaction() as tx:
            event_id = tx.emit(Placed(order="a"))
        await log.reached(1)
        with pytest.raises(UsageError, match="this tx has ended"):
            tx.emit(Placed(order="a"))

    assert log.lines == [event_id]


async def test_a_transaction_that_is_cancelled_leaves_nothing(world: World) -> None:
    bus = world.bus(relay=False)

    async with bus:
        with anyio.move_on_after(1):
            async with bus.transaction() as tx:
                tx.emit(Placed(order="a"))
                await anyio.sleep(1000)

    assert world.store.outbox.rows() == []


async def test_what_can_not_be_emitted_is_refused_when_it_is_emitted(world: World) -> None:
    bus = world.bus(relay=False, max_body_bytes=1024)

    class Bare(Event):
        n: int

    async with bus, bus.transaction() as tx:
        for event, text in [
            (Placed(order="a" * 201), r"event Placed \(.*\.py:\d+\): its key is 201 bytes; at most 200"),
            (Placed(order="lone \udcff"), "event Placed"),
            (Placed(order="nul \0"), "event Placed"),
            (
                Noted(text="x" * 2000),
                r"event Noted \(.*\.py:\d+\) is 20\d\d bytes, more than the limit of 1024 \(ORDERBUS_MAX_BODY_BYTES\)",
            ),
            (Bare(n=1), r"event class Bare \(.*test_bus\.py:\d+\) has no topic"),
            ("orders.placed", "is not an event class"),
            (Placed, "is not an event class"),
        ]:
            with pytest.raises(UsageError, match=text):
                tx.emit(event)
        with pytest.raises(UsageError, match="has no time zone; use datetime"):
            tx.emit(Placed(order="a"), due_at=datetime(2030, 1, 1))
        tx.emit(Placed(order="good"))

    assert len(world.store.outbox.rows()) == 1


async def test_a_transaction_emits_a_bounded_number_of_events(world: World) -> None:
    bus = world.bus(relay=False)

    async with bus, bus.transaction() as tx:
        for _ in range(10_000):
            tx.emit(Noted())
        with pytest.raises(UsageError, match="at most 10000 events; split the work"):
            tx.emit(Noted())


async def test_the_memory_store_says_that_it_has_no_sql(world: World) -> None:
    bus = world.bus(relay=False)

    async with bus:
        async with bus.transaction() as tx:
            with pytest.raises(UsageError, match="the memory store has no SQL; set ORDERBUS_DATABASE_URL"):
                await tx.execute("select 1")
            with pytest.raises(UsageError, match="no SQL"):
                tx.connection  # noqa: B018
        with pytest.raises(UsageError, match="no SQL"):
            await bus.enlist(None).__aenter__()


async def test_what_is_written_as_msgpack_is_read_as_such(world: World) -> None:
    bus, log = world.bus(format="msgpack"), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event)

    async with bus:
        await bus.publish(Placed(order="a", n=1))
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a", n=2))
        await log.reached(2)

    assert log.lines == [Placed(order="a", n=1), Placed(order="a", n=2)]


async def test_a_topology_that_differs_stops_the_start_and_is_named(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    await world.broker.apply(topology_for([QueueNeed("shop.orders.placed", ("orders.placed",), ordered=True)]))

    with pytest.raises(TopologyError, match=r"queue 'shop.orders.placed' exists with single_active_consumer=True"):
        await bus.__aenter__()


async def test_a_broker_that_is_away_at_the_start_is_said(world: World) -> None:
    bus = world.bus()

    async def away(topology: object) -> None:
        raise UnavailableError("nothing listens there")

    world.broker.apply = away
    with pytest.raises(UnavailableError, match="nothing listens there"):
        await bus.__aenter__()
    assert bus.draining


async def test_wrong_settings_stop_the_start(monkeypatch: pytest.MonkeyPatch, anyio_backend: object) -> None:
    monkeypatch.setenv("ORDERBUS_POOLSIZE", "5")

    with pytest.raises(SettingsError, match=r"ORDERBUS_POOLSIZE: there is no such setting; did you mean ORDERBUS_POOL_SIZE"):
        await Bus("shop", settings=Settings(broker_url="memory://")).__aenter__()


async def test_ids_are_of_now_and_in_order() -> None:
    ids = [new_id() for _ in range(1000)]

    assert len(set(ids)) == 1000
    assert all(isinstance(made, UUID) and uuid7_time_ms(made) for made in ids)
    times = [uuid7_time_ms(made) for made in ids]
    assert times == sorted(times)


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_buses_run_until_a_signal_and_are_drained_together(anyio_backend: str) -> None:
    buses = [Bus(group, settings=Settings(broker_url="memory://signalled")) for group in ("first", "second")]
    log = Log()

    @buses[0].on(Placed)
    async def handle(event: Placed) -> None:
        log("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        while not all(bus.draining for bus in buses):  # noqa: ASYNC110 - draining has no event
            await anyio.sleep(0.001)
        log("ended")

    @buses[1].every(0.05)
    async def kick() -> None:
        await buses[1].publish(Placed(order="a"))

    receipts = await run_until_signalled(*buses)

    assert [receipt.clean for receipt in receipts] == [True, True]
    assert log.lines.count("ended") == log.lines.count("begun") >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_signal_before_all_buses_are_open_cancels_the_opening_and_drains_those_that_are(
    anyio_backend: str, number: signal.Signals
) -> None:
    first, second = [Bus(group, settings=Settings(broker_url="memory://halfway")) for group in ("first", "second")]
    closed = Log()

    @second.resource
    async def never() -> AsyncIterator[Log]:
        os.kill(os.getpid(), number)
        try:
            await anyio.sleep_forever()
            yield closed
        finally:
            closed("second")

    with anyio.fail_after(30):
        receipts = await run_until_signalled(first, second)

    assert [receipt.clean for receipt in receipts] == [True]
    assert receipts[0] is first.receipt
    assert second.receipt is None
    assert closed.lines == ["second"]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_bus_that_can_not_start_ends_the_others_and_its_error_comes_out_as_it_was(anyio_backend: str) -> None:
    first = Bus("first", settings=Settings(broker_url="memory://halfway"))
    second = Bus("second", settings=Settings(broker_url=f"amqp://guest:guest@127.0.0.1:{free_port()}/"))

    with pytest.raises(UnavailableError, match="the bus 'second' can't start"):
        await run_until_signalled(first, second)

    assert receipt_of(first).clean


async def test_many_events_published_at_once_arrive_in_order(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="none", concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        ids = await bus.publish_many([Placed(order="a", n=n) for n in range(50)])
        await log.reached(50)
        assert await bus.publish_many([]) == []
        assert bus.stats.published == 50

    assert log.lines == list(range(50))
    assert len(set(ids)) == 50


async def test_many_events_of_which_one_reaches_nobody_say_so(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    async with bus:
        with pytest.raises(
            UnavailableError, match=r"2 of 4 events were not confirmed; the first: no queue is bound to 'orders.paid'"
        ):
            await bus.publish_many([Placed(order="a"), Paid(order="a"), Paid(order="b"), Noted()])


def test_a_process_that_collects_rarely_still_finds_cycles() -> None:
    before = gc.get_threshold()
    try:
        collect_rarely()
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] == 20_000
        circle: list[object] = []
        circle.append(circle)
        del circle
        assert gc.collect() > 0
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
