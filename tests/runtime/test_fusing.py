"""Many messages in one transaction: if anything fails, everything is rolled back and run again one by one."""

import anyio
import pytest

from orderbus import Batch, Park, Retry, Tx, UsageError, new_id
from tests.runtime.world import Cancelled, Log, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


async def send_together(world: World, *events: Placed) -> None:
    await world.broker.publish([world.message(event, new_id()) for event in events])


async def test_messages_that_wait_together_share_one_transaction_in_the_order_of_their_keys(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log((tx, event.order, event.n))

    async with bus:
        await send_together(world, *(Placed(order=key, n=n) for n, key in enumerate("cabac")))
        await log.reached(5)

    assert len({tx for tx, _, _ in log.lines}) == 1
    assert [(order, n) for _, order, n in log.lines] == [("a", 1), ("a", 3), ("b", 2), ("c", 0), ("c", 4)]


async def test_a_unit_takes_no_more_than_fuse_says(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=4, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log(tx)

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(10)))
        await log.reached(10)
        await until(lambda: bus.stats.handled == 10)

    assert max(log.lines.count(tx) for tx in log.lines) == 4


async def test_only_the_failing_one_of_a_unit_is_tried_again(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1, retry=Retry.fixed(0.1, attempts=3))
    async def handle(event: Placed, tx: Tx) -> None:
        log(event.n)
        if event.n == 2:
            raise CardRefused

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(5)))
        await until(lambda: world.parked())

    assert log.lines == [0, 1, 2, 0, 1, 2, 3, 4, 2, 2]
    assert receipt_of(bus).stats.handled == 4
    assert receipt_of(bus).stats.failed == 3
    assert world.parked()[0].body.count(b'"n":2') == 1


async def test_events_of_what_was_rolled_back_are_never_sent(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1, retry=Retry.fixed(0.1, attempts=2))
    async def handle(event: Placed, tx: Tx) -> Paid:
        if event.n == 3:
            tx.emit(Paid(order="ghost"))
            raise CardRefused
        return Paid(order=event.order, n=event.n)

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log((event.order, event.n))

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(5)))
        await log.reached(4)
        await until(lambda: world.parked())
        await anyio.sleep(60)

    assert sorted(log.lines) == [("a", 0), ("a", 1), ("a", 2), ("a", 4)]
    assert receipt_of(bus).stats.emitted == 4


async def test_the_same_event_twice_in_one_unit_is_handled_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log(event.n)

    async with bus:
        event_id = new_id()
        await world.broker.publish([world.message(Placed(order="a"), event_id)] * 3)
        await until(lambda: bus.stats.duplicates == 2)

    assert log.lines == [0]
    assert world.ready() == 0


async def test_a_conflict_in_a_unit_parks_that_one_and_handles_the_others(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log(event.n)

    async with bus:
        event_id = new_id()
        await world.broker.publish(
            [
                world.message(Placed(order="a", n=1), event_id),
                world.message(Placed(order="a", n=2), event_id),
                world.message(Placed(order="a", n=3), new_id()),
            ]
        )
        await until(lambda: world.parked() and len(log.lines) == 2)

    assert log.lines == [1, 3]
    assert [letter.properties.headers["ob-reason"] for letter in world.parked()] == ["id-reused"]


async def test_an_unreadable_one_in_a_unit_is_parked_and_the_others_share_their_transaction(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        log(tx)

    async with bus:
        good = [world.message(Placed(order="a", n=n), new_id()) for n in range(3)]
        await world.broker.publish([good[0], world.message(Placed(order="a"), new_id(), body=b"x"), *good[1:]])
        await until(lambda: world.parked() and len(log.lines) == 3)

    assert len(set(log.lines)) == 1


async def test_a_fused_unit_over_its_time_is_rerun_one_by_one(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, fuse=10, concurrency=1, timeout=1, retry=Retry.none())
    async def handle(event: Placed, tx: Tx) -> None:
        await anyio.sleep(0.4)
        log(event.n)

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(5)))
        await until(lambda: bus.stats.handled == 5)

    assert log.lines == [0, 1, 0, 1, 2, 3, 4]


async def test_a_batch_is_handled_in_one_call_sorted_by_key(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on_batch(Placed, most=10)
    async def handle(batch: Batch[Placed], tx: Tx) -> list[Paid]:
        log([(item.event.order, item.event.n, item.delivery.key, item.delivery.attempt) for item in batch])
        return [Paid(order=event.order, n=event.n) for event in batch.events]

    async with bus:
        await send_together(world, Placed(order="b", n=0), Placed(order="a", n=1), Placed(order="b", n=2))
        await log.reached(1)

    assert log.lines == [[("a", 1, "a", 1), ("b", 0, "b", 1), ("b", 2, "b", 1)]]
    assert receipt_of(bus).stats.emitted == 3


async def test_a_batch_of_several_events_comes_from_one_queue_and_each_failure_keeps_its_topic(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on_batch(name="answers", most=10)
    async def handle(batch: Batch[Placed | Paid | Cancelled]) -> None:
        log([(type(item.event).__name__, item.event.order, item.delivery.topic) for item in batch])
        for item in batch:
            if isinstance(item.event, Cancelled):
                item.park("no-such-order")

    async with bus:
        await send_together(world, Paid(order="b"), Placed(order="a"), Cancelled(order="c"), Placed(order="b"))
        await log.reached(1)
        await until(lambda: bus.stats.parked == 1)

    assert log.lines == [
        [
            ("Placed", "a", "orders.placed"),
            ("Paid", "b", "orders.paid"),
            ("Placed", "b", "orders.placed"),
            ("Cancelled", "c", "orders.cancelled"),
        ]
    ]
    [letter] = world.parked("shop.answers")
    assert letter.properties.type == "orders.cancelled"


async def test_single_items_of_a_batch_park_or_come_again_and_the_rest_is_done(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on_batch(Placed, most=10, retry=Retry.exponential(first=0.2, attempts=3).never(CardRefused))
    async def handle(batch: Batch[Placed]) -> None:
        for item in batch:
            log((item.event.n, item.delivery.attempt))
            if item.delivery.attempt == 1:
                match item.event.n:
                    case 1:
                        item.park("no-such-customer")
                    case 2:
                        item.retry(0.5)
                    case 3:
                        item.retry(ValueError("try again"))
                    case 4:
                        item.retry(CardRefused())
                    case 5:
                        item.retry(2)

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(6)))
        await until(lambda: bus.stats.handled == 4)

    reasons = {letter.body[-2:-1]: letter.properties.headers["ob-reason"] for letter in world.parked()}
    assert reasons == {b"1": "no-such-customer", b"4": "never-retried"}
    assert log.lines == [*((n, 1) for n in range(6)), (3, 2), (2, 2), (5, 2)]
    assert log.waits[5:] == pytest.approx([0.2, 0.3, 1.5], abs=0.05)
    assert len(world.store.handled()) == 4


async def test_a_batch_that_raises_is_rerun_one_by_one(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on_batch(Placed, most=10, retry=Retry.none())
    async def handle(batch: Batch[Placed]) -> Paid | None:
        log([event.n for event in batch.events])
        if any(event.n == 1 for event in batch.events):
            raise Park("bad")
        return None

    async with bus:
        await send_together(world, *(Placed(order="a", n=n) for n in range(3)))
        await until(lambda: bus.stats.handled == 2)

    assert log.lines == [[0, 1, 2], [0], [1], [2]]
    assert [letter.properties.headers["ob-reason"] for letter in world.parked()] == ["bad"]


async def test_a_batch_that_needs_no_transaction_is_guarded_all_the_same(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on_batch(Placed, most=10, guard="none")
    async def handle(batch: Batch[Placed]) -> None:
        log(len(batch))

    @bus.on_batch(Placed, most=10, name="claimed", guard="claims")
    async def claimed(batch: Batch[Placed]) -> None:
        log(len(batch))

    async with bus:
        await send_together(world, Placed(order="a"), Placed(order="b"))
        await log.reached(2)

    assert log.lines == [2, 2]


async def test_a_tx_that_has_ended_refuses_everything(world: World) -> None:
    bus, kept = world.bus(), []

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> None:
        kept.append(tx)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: bus.stats.handled == 1)
        tx = kept[0]
        for use in (lambda: tx.emit(Paid(order="a")), lambda: tx.defer("select 1"), lambda: tx.connection):
            with pytest.raises(UsageError, match="this tx has ended; use it only inside the handler"):
                use()
        for call in (tx.execute, tx.fetch_one, tx.fetch_all):
            with pytest.raises(UsageError, match="this tx has ended"):
                await call("select 1")
        await anyio.sleep(30)

    assert receipt_of(bus).stats.emitted == 0


async def test_what_a_handler_returns_that_is_no_event_is_an_error_that_names_it(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        return [event, 5]

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    text = str(world.parked()[0].properties.headers["ob-error-text"])
    assert "handle (" in text
    assert "returned list; a handler returns None, an event, or a sequence of events" in text


async def test_events_come_out_whether_returned_or_emitted_and_in_that_transaction_only(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> tuple[Paid, ...]:
        tx.emit(Paid(order="emitted"))
        return Paid(order="returned", n=1), Paid(order="returned", n=2)

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log((event.order, event.n))

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(3)

    assert sorted(log.lines) == [("emitted", 0), ("returned", 1), ("returned", 2)]
