"""Consuming from a real RabbitMQ: nothing is lost, and nobody suffers for a neighbour."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence

import anyio
import pytest

from orderbus import Bus, Event, Retry, Settings
from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._core.topology import DELIVERY_LIMIT, Queue, Topology
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from orderbus.adapters.rabbitmq.connection import Connection
from orderbus.adapters.rabbitmq.content import DeliverySink
from orderbus.adapters.rabbitmq.frames import CHANNEL_CLOSE_OK, ack
from orderbus.adapters.rabbitmq.subscription import DOUBTED_AFTER, Subscription
from orderbus.errors import InvariantError, UnavailableError, UsageError
from tests.rabbitmq.conftest import Place, delete_queue, have_closed
from tests.servers import Rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]
CONSUME_OK, CLOSE_OK = (60 << 16 | 21).to_bytes(4, "big"), CHANNEL_CLOSE_OK.to_bytes(4, "big")
ACK, RELEASE, REJECT = Settlement.ACK, Settlement.RELEASE, Settlement.REJECT


class Placed(Event, topic=f"orders.{secrets.token_hex(4)}", key="order"):
    order: str


@pytest.fixture(autouse=True)
async def within_a_minute() -> AsyncIterator[None]:
    with anyio.fail_after(60):
        yield


async def fill(broker: RabbitBroker, queue: str, count: int) -> None:
    batch = [Outgoing("", queue, b"%d" % number, "m", "test") for number in range(count)]
    assert await broker.publish(batch) == [Receipt.CONFIRMED] * count


async def take(subscription: Subscription, count: int) -> list[Incoming]:
    taken: list[Incoming] = []
    while len(taken) < count:
        taken += await subscription.receive()
    return taken


def numbers(deliveries: Sequence[Incoming]) -> list[int]:
    return [int(delivery.body) for delivery in deliveries]


async def ready(broker: RabbitBroker, queue: str, count: int) -> None:
    """Wait until so many messages are ready."""
    while await broker.depth(queue) != count:
        await anyio.lowlevel.checkpoint()


async def test_prefetch_bounds_what_is_unsettled(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 10)
    async with broker.subscribe(place.queue, prefetch=4) as subscription:
        first = await take(subscription, 4)
        assert numbers(first) == [0, 1, 2, 3]
        await subscription.flush()
        with anyio.move_on_after(0) as scope:
            await subscription.receive()
        assert scope.cancelled_caught
        subscription.settle(first[0], ACK)
        assert numbers(await subscription.receive()) == [4]
        for delivery in first[1:]:
            subscription.settle(delivery, ACK)
        assert numbers(await take(subscription, 3)) == [5, 6, 7]
    await ready(broker, place.queue, 6)


async def test_a_queue_that_does_not_answer_costs_no_other_its_connection(
    broker: RabbitBroker, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a majority: neither the consume nor the close of its channel is answered for long."""
    ill = Place()
    await broker.apply(ill.topology())
    frame = DeliverySink.frame

    def unanswered(sink: DeliverySink, kind: int, data: bytes, start: int, end: int) -> bool:
        if sink._queue == ill.queue and data[start : start + 4] in (CONSUME_OK, CLOSE_OK):
            return False
        return frame(sink, kind, data, start, end)

    await fill(broker, place.queue, 2)
    async with broker.subscribe(place.queue, prefetch=1) as healthy:
        first = await take(healthy, 1)
        monkeypatch.setattr(DeliverySink, "frame", unanswered)
        monkeypatch.setattr(Connection.call, "__kwdefaults__", {"limit_s": 0.5})
        with pytest.raises(UnavailableError, match="consuming, queue"):
            async with broker.subscribe(ill.queue, prefetch=1):
                raise AssertionError("it was consumed")
        healthy.settle(first[0], ACK)
        await healthy.flush()
        assert numbers(await take(healthy, 1)) == [1]
    monkeypatch.undo()
    await delete_queue(broker, ill.queue)


@pytest.mark.parametrize("how", [RELEASE, REJECT])
async def test_what_is_given_back_comes_again_and_is_counted(broker: RabbitBroker, place: Place, how: Settlement) -> None:
    await fill(broker, place.queue, 2)
    async with broker.subscribe(place.queue, prefetch=2) as subscription:
        first, second = await take(subscription, 2)
        subscription.settle(second, ACK)
        for count in range(1, 4):
            subscription.settle(first, how)
            (first,) = await subscription.receive()
            assert (first.body, first.redelivered, first.delivery_count) == (b"0", True, count)
        subscription.settle(first, ACK)
        await subscription.flush()
    assert await broker.depth(place.queue) == 0


async def test_the_delivery_limit_dead_letters(broker: RabbitBroker, place: Place) -> None:
    limited = Queue(f"{place.queue}.limited", delivery_limit=2, dead_letter_exchange="", dead_letter_routing_key=place.queue)
    await broker.apply(Topology(queues=(limited,)))
    await fill(broker, limited.name, 1)
    async with broker.subscribe(limited.name, prefetch=5) as subscription, broker.subscribe(place.queue, prefetch=5) as dead:
        for _ in range(3):
            (delivery,) = await subscription.receive()
            subscription.settle(delivery, REJECT)
        (parked,) = await dead.receive()
        assert parked.body == b"0"
        assert parked.properties.headers["x-first-death-reason"] == "delivery_limit"
        dead.settle(parked, ACK)


async def test_leaving_right_after_acking_loses_no_ack(broker: RabbitBroker, place: Place) -> None:
    for turn in range(5):
        await fill(broker, place.queue, 400)
        async with broker.subscribe(place.queue, prefetch=400) as subscription:
            left = 400
            while left:  # acked as they come: what was on its way to the consumer before comes again, and then alone
                for delivery in await subscription.receive():
                    subscription.settle(delivery, ACK)
                    left -= 1
        assert await broker.depth(place.queue) == 0
        async with broker.subscribe(place.queue, prefetch=10) as probe:
            await broker.publish([Outgoing("", place.queue, b"probe %d" % turn, "m", "test")])
            (only,) = await probe.receive()
            assert only.body == b"probe %d" % turn
            probe.settle(only, ACK)


async def test_closing_the_broker_right_after_acking_loses_no_ack(broker: RabbitBroker, place: Place, vhost_url: str) -> None:
    await fill(broker, place.queue, 500)
    async with open_broker(vhost_url, name="short") as other, other.subscribe(place.queue, prefetch=500) as subscription:
        for delivery in await take(subscription, 500):
            subscription.settle(delivery, ACK)
    assert await broker.depth(place.queue) == 0


async def test_what_is_unsettled_goes_back_on_leaving(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 6)
    async with broker.subscribe(place.queue, prefetch=4) as subscription:
        deliveries = await take(subscription, 4)
        subscription.settle(deliveries[2], ACK)
    await ready(broker, place.queue, 5)
    subscription.settle(deliveries[0], ACK)  # of a life that is over: nothing happens
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        again = await take_all_settling(subscription, 5)
    assert sorted(numbers(again)) == [0, 1, 3, 4, 5]
    assert await broker.depth(place.queue) == 0


async def take_all_settling(subscription: Subscription, count: int) -> list[Incoming]:
    taken: list[Incoming] = []
    while len(taken) < count:
        for delivery in await subscription.receive():
            taken.append(delivery)
            subscription.settle(delivery, ACK)
    return taken


async def test_settling_twice_is_a_bug_and_does_no_harm(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 2)
    async with broker.subscribe(place.queue, prefetch=2) as subscription:
        first, second = await take(subscription, 2)
        subscription.settle(first, ACK)
        await subscription.flush()
        with pytest.raises(InvariantError):
            subscription.settle(first, ACK)
        subscription.settle(second, ACK)
        await subscription.flush()


async def test_a_probe_begins_alone_and_doubles_while_it_meets_redeliveries(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 12)
    async with broker.subscribe(place.queue, prefetch=10) as crashed:
        await take(crashed, 10)
    await ready(broker, place.queue, 12)
    async with broker.subscribe(place.queue, prefetch=100) as subscription:
        sizes, counts, seen = [], [], list[int]()
        while len(seen) < 12:
            deliveries = await subscription.receive()
            await subscription.flush()
            sizes.append(len(deliveries))
            counts += [delivery.delivery_count for delivery in deliveries]
            seen += numbers(deliveries)
            for delivery in deliveries:
                subscription.settle(delivery, ACK)
        await subscription.flush()
    assert sizes[0] == 1  # alone: a neighbour would suffer from a crash now
    assert all(size <= 2**n for n, size in enumerate(sizes[:3]))
    assert sorted(seen) == list(range(12))
    assert set(counts) == {0, 1}
    assert await broker.depth(place.queue) == 0


@pytest.mark.parametrize("is_ordered", [False, True])
@pytest.mark.parametrize("poison", [0, 13])
async def test_a_poisonous_message_is_the_only_one_that_dies_with_its_processes(
    broker: RabbitBroker, vhost_url: str, place: Place, is_ordered: bool, poison: int
) -> None:
    limited = Queue(
        f"{place.queue}.limited",
        delivery_limit=DELIVERY_LIMIT if is_ordered else 20,
        dead_letter_exchange="",
        dead_letter_routing_key=place.queue,
        single_active_consumer=is_ordered,
    )
    await broker.apply(Topology(queues=(limited,)))
    await fill(broker, limited.name, 30)
    handled = set[int]()

    async def crash_again_and_again() -> None:
        while True:
            async with open_broker(vhost_url, name="crashes") as process:
                await process.apply(Topology(queues=(limited,)))
                async with process.subscribe(limited.name, prefetch=20) as subscription:
                    while poison not in (batch := numbers(deliveries := await subscription.receive())):
                        handled.update(batch)
                        for delivery in deliveries:
                            subscription.settle(delivery, ACK)

    async with broker.subscribe(place.queue, prefetch=1) as graveyard, anyio.create_task_group() as tasks:
        tasks.start_soon(crash_again_and_again)
        assert numbers(await graveyard.receive()) == [poison]
        tasks.cancel_scope.cancel()
    async with broker.subscribe(limited.name, prefetch=20) as subscription:
        rest = await take_all_settling(subscription, 29 - len(handled))
    assert handled | set(numbers(rest)) == set(range(30)) - {poison}
    await ready(broker, place.queue, 1)


async def test_a_single_active_consumer_grows_without_losing_its_order(broker: RabbitBroker, place: Place) -> None:
    queue = Queue(f"{place.queue}.ordered", delivery_limit=50, single_active_consumer=True)
    await broker.apply(Topology(queues=(queue,)))
    await fill(broker, queue.name, 50)
    async with broker.subscribe(queue.name, prefetch=20) as active, broker.subscribe(queue.name, prefetch=20) as waiting:
        seen: list[int] = []
        while len(seen) < 50:
            # Either may be the active one; a switch may only happen while nothing is unsettled.
            async with anyio.create_task_group() as tasks:

                async def receive(subscription: Subscription, scope: anyio.CancelScope) -> None:
                    deliveries = await subscription.receive()
                    scope.cancel()
                    seen.extend(numbers(deliveries))
                    for delivery in deliveries:
                        subscription.settle(delivery, ACK)

                for subscription in (active, waiting):
                    tasks.start_soon(receive, subscription, tasks.cancel_scope)
        assert seen == list(range(50))


async def test_what_was_tried_and_waits_holds_up_nothing_behind_it_after_a_loss(broker: RabbitBroker, place: Place) -> None:
    queue = Queue(f"{place.queue}.ordered", delivery_limit=DELIVERY_LIMIT, single_active_consumer=True)
    await broker.apply(Topology(queues=(queue,)))
    await fill(broker, queue.name, 10)
    async with broker.subscribe(queue.name, prefetch=10) as lost:
        await take(lost, 10)
    async with broker.subscribe(queue.name, prefetch=10) as subscription:
        (failing,) = await subscription.receive()
        subscription.tried(failing)
        subscription.tried(failing)
        assert sorted(numbers([failing, *await take_all_settling(subscription, 9)])) == list(range(10))
        subscription.settle(failing, ACK)
        subscription.tried(failing)  # it is settled: nothing happens
        await fill(broker, queue.name, 20)
        held = await take(subscription, 10)
        with anyio.move_on_after(0.2):
            pytest.fail(f"{await subscription.receive()} was handed over beyond the prefetch")
        for delivery in held:
            subscription.settle(delivery, ACK)
        await take_all_settling(subscription, 10)


async def test_after_a_loss_a_key_that_fails_holds_up_no_other_key(vhost_url: str, rabbit: Rabbit) -> None:
    handled: list[str] = []
    more = anyio.Event()
    group = f"shop-{secrets.token_hex(4)}"
    bus = Bus(group, settings=Settings(broker_url=vhost_url))

    @bus.on(Placed, ordered=True, guard="none", prefetch=20, retry=Retry.fixed(400, attempts=3))
    async def take_it(event: Placed) -> None:
        nonlocal more
        handled.append(event.order)
        more.set()
        more = anyio.Event()
        if event.order == "fails":
            raise TimeoutError

    async def reached(count: int) -> None:
        while len(handled) < count:
            await more.wait()

    async with bus:
        await bus.publish(Placed(order="fails"))
        await reached(1)
        await have_closed(rabbit, vhost_url, f"{group} (consume)")
        await reached(2)
        await bus.publish_many([Placed(order=str(n)) for n in range(5)])
        await reached(7)

    assert handled[:2] == ["fails", "fails"]
    assert sorted(handled[2:]) == ["0", "1", "2", "3", "4"]


async def test_a_count_that_a_sender_claims_raises_no_doubt(broker: RabbitBroker, place: Place) -> None:
    queue = Queue(f"{place.queue}.ordered", delivery_limit=DELIVERY_LIMIT, single_active_consumer=True)
    await broker.apply(Topology(queues=(queue,)))
    claims = {"x-delivery-count": 1000}
    await broker.publish([Outgoing("", queue.name, b"%d" % number, "m", "test", headers=claims) for number in range(5)])
    async with broker.subscribe(queue.name, prefetch=5) as subscription:
        taken = await take(subscription, 5)
        assert not any(delivery.redelivered for delivery in taken)
        assert numbers(taken) == list(range(5))


async def test_an_ordered_queue_in_doubt_is_consumed_one_at_a_time_until_a_fresh_message_comes(
    broker: RabbitBroker, place: Place
) -> None:
    queue = Queue(f"{place.queue}.ordered", delivery_limit=DELIVERY_LIMIT, single_active_consumer=True)
    await broker.apply(Topology(queues=(queue,)))
    await fill(broker, queue.name, 10)

    for _ in range(DOUBTED_AFTER):
        async with broker.subscribe(queue.name, prefetch=10) as lost:
            assert numbers(await lost.receive())[0] == 0
    async with broker.subscribe(queue.name, prefetch=10) as doubtful:
        (first,) = await doubtful.receive()
        assert first.body == b"0"
        await ready(broker, queue.name, 9)  # the broker has given out no other
    async with broker.subscribe(queue.name, prefetch=10) as again:
        (first,) = await again.receive()
        assert first.body == b"1"  # what is lost alone goes behind the others: the price
        await ready(broker, queue.name, 9)
        again.settle(first, ACK)
        await take_all_settling(again, 9)
        await fill(broker, queue.name, 10)
        assert numbers(await take(again, 10)) == list(range(10))
    async with broker.subscribe(queue.name, prefetch=10) as trusting:
        assert numbers(await trusting.receive()) == [0]
        await ready(broker, queue.name, 0)


async def test_a_queue_of_which_nothing_is_known_is_consumed_in_order(vhost_url: str, broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 20)
    async with open_broker(vhost_url, name="stranger") as stranger, stranger.subscribe(place.queue, prefetch=10) as subscription:
        assert numbers(await take_all_settling(subscription, 20)) == list(range(20))


async def test_pause_gives_back_what_was_not_handed_over(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 5)
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        first = list(await subscription.receive())
        await subscription.flush()
        await subscription.pause()
        with anyio.move_on_after(0):
            pytest.fail(f"{await subscription.receive()} was handed over after a pause")
        await ready(broker, place.queue, 5 - len(first))
        for delivery in first:
            subscription.settle(delivery, ACK)
        await subscription.flush()
        async with broker.subscribe(place.queue, prefetch=10) as other:
            assert len(await take_all_settling(other, 5 - len(first))) == 5 - len(first)


async def test_a_cancelled_receive_takes_nothing(broker: RabbitBroker, place: Place) -> None:
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        for number in range(30):
            await fill(broker, place.queue, 1)
            for steps in range(number):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(subscription_receives_nothing, subscription, tasks.cancel_scope, steps)
            (delivery,) = await subscription.receive()
            subscription.settle(delivery, ACK)


async def subscription_receives_nothing(subscription: Subscription, scope: anyio.CancelScope, steps: int) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cancel_after, scope, steps)
        for delivery in await subscription.receive():
            subscription.settle(delivery, RELEASE)


async def cancel_after(scope: anyio.CancelScope, steps: int) -> None:
    for _ in range(steps):
        await anyio.lowlevel.checkpoint()
    scope.cancel()


async def test_two_receivers_are_a_usage_error(broker: RabbitBroker, place: Place) -> None:
    async with broker.subscribe(place.queue, prefetch=1) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(subscription.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(UsageError, match="two tasks"):
            await subscription.receive()
        tasks.cancel_scope.cancel()


# What goes wrong


async def test_a_queue_deleted_under_a_consumer_is_heard_of(broker: RabbitBroker, place: Place) -> None:
    await fill(broker, place.queue, 1)
    async with broker.subscribe(place.queue, prefetch=1) as subscription:
        (delivery,) = await subscription.receive()
        await delete_queue(broker, place.queue)
        with pytest.raises(UnavailableError, match=f"{place.queue}.*cancelled"):
            await subscription.receive()
        subscription.settle(delivery, ACK)
    with pytest.raises(UnavailableError, match=f"{place.queue}.*no queue"):
        async with broker.subscribe(place.queue, prefetch=1):
            pytest.fail("the queue is gone")
    await broker.apply(place.topology())
    await fill(broker, place.queue, 1)
    async with broker.subscribe(place.queue, prefetch=1) as subscription:
        assert len(await take_all_settling(subscription, 1)) == 1


async def test_a_connection_closed_by_the_operator_ends_the_subscription(
    broker: RabbitBroker, place: Place, rabbit: Rabbit, vhost_url: str
) -> None:
    await fill(broker, place.queue, 3)
    async with broker.subscribe(place.queue, prefetch=3) as subscription:
        first, *_ = await take(subscription, 3)
        await have_closed(rabbit, vhost_url, "(consume)")
        with pytest.raises(UnavailableError, match="closed by a test"):
            await subscription.receive()
        subscription.settle(first, ACK)
        with pytest.raises(UnavailableError, match="closed by a test"):
            await subscription.flush()
    async with broker.subscribe(place.queue, prefetch=3) as subscription:
        subscription.settle(first, ACK)  # its epoch is over: sent, it would ack another message
        again = await take_all_settling(subscription, 3)
    assert numbers(again) == [0, 1, 2]


async def test_a_channel_closed_by_the_broker_ends_its_subscription_and_no_other(broker: RabbitBroker, place: Place) -> None:
    neighbours = Place()
    await broker.apply(neighbours.topology())
    await fill(broker, place.queue, 3)
    async with (
        broker.subscribe(neighbours.queue, prefetch=1) as neighbour,
        broker.subscribe(place.queue, prefetch=3) as subscription,
    ):
        first, *_ = await take(subscription, 3)
        connection, life = subscription._connection, subscription._life
        assert life is not None
        connection.write(ack(life.channel.number, 4))  # a tag that was never delivered
        with pytest.raises(UnavailableError, match=f"{place.queue}.*PRECONDITION_FAILED - unknown delivery tag 4"):
            await subscription.receive()
        subscription.settle(first, ACK)  # written to a channel that is closed, it would end the connection
        with pytest.raises(UnavailableError, match="unknown delivery tag"):
            await subscription.flush()
        await fill(broker, neighbours.queue, 2)
        assert numbers(await take_all_settling(neighbour, 2)) == [0, 1]
        await neighbour.flush()
    async with broker.subscribe(place.queue, prefetch=3) as subscription:
        assert subscription._connection is connection
        assert sorted(numbers(await take_all_settling(subscription, 3))) == [0, 1, 2]
    assert connection.lost is None


async def test_a_queue_that_goes_while_its_deliveries_stream_in_takes_no_other_consumer_with_it(
    broker: RabbitBroker, place: Place
) -> None:
    neighbours = Place()
    await broker.apply(neighbours.topology())
    await fill(broker, place.queue, 2000)
    async with (
        broker.subscribe(neighbours.queue, prefetch=1) as neighbour,
        broker.subscribe(place.queue, prefetch=100) as subscription,
    ):
        seen = await take_all_settling(subscription, 200)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(delete_queue, broker, place.queue)
            with pytest.raises(UnavailableError, match=f"{place.queue}.*cancelled"):
                await take_on_and_on(subscription, seen)
        assert numbers(seen) == list(range(len(seen)))
        await fill(broker, neighbours.queue, 1)
        assert numbers(await take_all_settling(neighbour, 1)) == [0]


async def take_on_and_on(subscription: Subscription, taken: list[Incoming]) -> None:
    while True:
        taken += await take_all_settling(subscription, 1)


async def test_a_refused_prefetch(broker: RabbitBroker, place: Place) -> None:
    for prefetch in (0, -1, 65536):
        with pytest.raises(UsageError, match="prefetch"):
            async with broker.subscribe(place.queue, prefetch=prefetch):
                pytest.fail("it was accepted")
