"""The relay: what is committed is published, confirmed and deleted, in the order of each key, whoever dies meanwhile."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import anyio
import pytest

from orderbus import Bus, UnavailableError
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import topology_for
from tests.runtime.faults import StoreFaults
from tests.runtime.relaying import QUEUE, emit, heard, listen, numbers, relay
from tests.runtime.world import Log, Noted, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


def count_publishes(world: World) -> list[list[Outgoing]]:
    """Every batch that is handed to the broker from now on."""
    batches: list[list[Outgoing]] = []
    publish = world.broker.publish

    async def counted(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        batches.append(list(batch))
        return await publish(batch)

    world.broker.publish = counted
    return batches


async def test_what_is_committed_is_published_with_all_it_needs_and_then_deleted(world: World) -> None:
    bus = world.bus()
    await listen(world)

    async with bus:
        async with bus.transaction() as tx:
            event_id = tx.emit(Placed(order="a", n=7))
            assert heard(world) == []
        await until(lambda: heard(world))
        await until(lambda: not world.store.outbox.rows())

    (message,) = world.broker.messages(QUEUE)
    assert message.properties.message_id == str(event_id)
    assert message.properties.type == "orders.placed"
    assert message.properties.timestamp_s == (event_id.int >> 80) // 1000
    assert message.routing_key.startswith("orders.placed.")
    assert message.properties.headers == {"ob-key": "a"}
    assert receipt_of(bus).stats.relayed == 1


async def test_a_commit_wakes_the_relay_of_its_process(world: World) -> None:
    bus = world.bus()
    await listen(world)

    async with bus:
        for n in range(5):
            await anyio.sleep(10)
            async with bus.transaction() as tx:
                tx.emit(Placed(order="a", n=n))
            committed_at = anyio.current_time()
            await until(lambda n=n: len(heard(world)) == n + 1)
            assert anyio.current_time() - committed_at <= 0.06


async def test_what_is_committed_while_a_read_is_under_way_is_not_slept_over(world: World) -> None:
    await listen(world)
    read = world.store.outbox.read

    async with relay(world) as made:

        async def slow(*arguments: object) -> object:
            page = await read(*arguments)
            if not page.rows and not world.store.outbox.rows():
                world.store.outbox.read = read
                await emit(world, Placed(order="a"))
                made.wake()
            return page

        await anyio.sleep(10)
        world.store.outbox.read = slow
        await until(lambda: world.store.outbox.read is read)
        committed_at = anyio.current_time()
        await until(lambda: heard(world))

    assert anyio.current_time() - committed_at <= 0.06


async def emit_and_raise(bus: Bus, error: Exception) -> None:
    async with bus.transaction() as tx:
        tx.emit(Placed(order="ghost"))
        raise error


async def test_events_of_a_transaction_that_rolled_back_are_never_published(world: World) -> None:
    bus = world.bus()
    await listen(world)

    async with bus:
        with pytest.raises(KeyError):
            await emit_and_raise(bus, KeyError())
        await anyio.sleep(60)

    assert heard(world) == []
    assert receipt_of(bus).stats.emitted == 0


async def test_events_of_one_key_come_out_in_the_order_of_their_commits_one_at_a_time(world: World) -> None:
    await listen(world)
    batches = count_publishes(world)
    for n in range(10):
        await emit(world, *(Placed(order=key, n=n) for key in "abc"))

    async with relay(world):
        await until(lambda: len(heard(world)) == 30)

    for key in "abc":
        assert numbers(world, key) == list(range(10))
    for batch in batches:
        keys = [message.headers["ob-key"] for message in batch]
        assert len(keys) == len(set(keys))


async def test_a_key_with_many_rows_costs_a_read_for_a_page_and_not_for_each(world: World) -> None:
    await listen(world)
    calls: list[str] = []
    read, delete = world.store.outbox.read, world.store.outbox.delete

    async def counted_read(*arguments: object, **named: object) -> object:
        page = await read(*arguments, **named)
        if page.rows:
            calls.append("read")
        return page

    async def counted_delete(*arguments: object) -> int:
        calls.append("delete")
        return await delete(*arguments)

    world.store.outbox.read, world.store.outbox.delete = counted_read, counted_delete
    await emit(world, *(Placed(order="hot", n=n) for n in range(1000)), Placed(order="cold", n=1))

    async with relay(world, relay_batch=500):
        await until(lambda: not world.store.outbox.rows())

    assert numbers(world, "hot") == list(range(1000))
    assert numbers(world, "cold") == [1]
    assert calls == ["read", "delete", "read", "read", "delete"]


async def test_a_stop_ends_a_page_after_the_round_under_way(world: World) -> None:
    await listen(world)
    await emit(world, *(Placed(order="hot", n=n) for n in range(100)))
    publish = world.broker.publish

    async with relay(world) as made:

        async def stopping(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
            if len(heard(world)) == 10:
                made.stop()
            return await publish(batch)

        world.broker.publish = stopping
        await until(lambda: len(world.store.outbox.rows()) < 100)
        await anyio.sleep(60)

    assert numbers(world, "hot") == list(range(11))
    assert [row.body[-3:-1] for row in world.store.outbox.rows()][:2] == [b"11", b"12"]


@pytest.mark.parametrize("batch", [500, 8], ids=["one page", "page after page, read ahead"])
async def test_order_is_kept_while_the_broker_refuses_and_loses_at_random(world: World, batch: int) -> None:
    await listen(world)
    chance = random.Random(7)
    for n in range(30):
        await emit(world, *(Placed(order=key, n=n) for key in "abcd"))
    publish = world.broker.publish

    async def unreliable(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        receipts = []
        for message in batch:
            roll = chance.random()
            if roll < 0.2:
                receipts.append(Receipt.REFUSED)
            elif roll < 0.3:
                receipts.append(Receipt.UNKNOWN)
            else:
                receipts += await publish([message])
        return receipts

    world.broker.publish = unreliable
    async with relay(world, relay_batch=batch):
        await until(lambda: len(heard(world)) == 120, within_s=5000)
        await until(lambda: not world.store.outbox.rows() and not world.store.outbox.stuck())

    for key in "abcd":
        assert numbers(world, key) == list(range(30))


async def test_a_row_whose_confirm_was_lost_is_published_again_and_handled_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        world.broker.lose_confirms(1)
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a", n=1))
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == [1]
    assert world.store.outbox.rows() == []


async def test_rows_that_were_published_but_not_deleted_are_published_again_and_handled_once(world: World) -> None:
    bus, log, faults = world.bus(), Log(), StoreFaults(world.store)
    delete = world.store.outbox.delete

    async def away(rows: object) -> int:
        world.store.outbox.delete = delete
        raise UnavailableError("the database is away")

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        world.store.outbox.delete = away
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a", n=1))
        await until(lambda: bus.stats.duplicates == 1)

    assert faults.is_away is False
    assert log.lines == [1]


async def test_an_event_nobody_is_bound_to_waits_in_the_stuck_table_until_somebody_is(world: World) -> None:
    await emit(world, Placed(order="a", n=1), Placed(order="a", n=2), Placed(order="b", n=3))
    await world.broker.apply(topology_for([]))

    async with relay(world):
        await until(lambda: len(world.store.outbox.stuck()) >= 2)
        stuck = {item.row.body[-2:-1]: item for item in world.store.outbox.stuck()}
        assert stuck[b"1"].reason == stuck[b"3"].reason == "unroutable"
        assert stuck[b"1"].retry_in_s is not None
        await anyio.sleep(100)
        await listen(world)
        await until(lambda: len(heard(world)) == 3, within_s=500)

    assert numbers(world, "a") == [1, 2]
    assert world.store.outbox.stuck() == []
    assert world.store.outbox.rows() == []


async def test_a_stuck_row_is_tried_again_less_and_less_often(world: World) -> None:
    await world.broker.apply(topology_for([]))
    await emit(world, Placed(order="a"))
    log = Log()
    publish = world.broker.publish

    async def logged(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        log(len(batch))
        return await publish(batch)

    world.broker.publish = logged
    async with relay(world):
        await log.reached(7)

    for n, wait in enumerate(log.waits):
        assert 2**n <= wait <= 2**n * 1.5 + 0.6


async def test_a_stuck_row_holds_up_its_own_key_only(world: World) -> None:
    await listen(world, "orders.placed")
    await emit(world, Paid(order="a", n=1), Placed(order="a", n=2), Placed(order="b", n=3))

    async with relay(world):
        await until(lambda: heard(world))
        await anyio.sleep(30)
        assert numbers(world, "b") == [3]
        assert numbers(world, "a") == []
        await listen(world)
        await until(lambda: len(heard(world)) == 3, within_s=500)

    assert numbers(world, "a") == [1, 2]


async def test_an_event_of_a_class_that_says_drop_is_let_go_and_counted(world: World) -> None:
    bus = world.bus()

    async with bus:
        async with bus.transaction() as tx:
            tx.emit(Noted())
        await until(lambda: bus.stats.dropped == 1)
        await until(lambda: not world.store.outbox.rows())

    assert world.store.outbox.stuck() == []
    assert receipt_of(bus).stats.relayed == 0


async def test_an_event_that_is_due_later_comes_out_then(world: World) -> None:
    bus = world.bus()
    await listen(world)

    async with bus:
        async with bus.transaction() as tx:
            due_at = datetime.fromtimestamp(world.now(), UTC) + timedelta(minutes=10)
            tx.emit(Placed(order="a", n=1), due_at=due_at)
            tx.emit(Placed(order="a", n=2))
        await anyio.sleep(590)
        assert numbers(world, "a") == [2]
        await anyio.sleep(20)

    assert numbers(world, "a") == [2, 1]
