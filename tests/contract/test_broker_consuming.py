"""Broker contract: who gets a message, in which order, how often, and what becomes of it."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from orderbus._core.message import Incoming, Receipt, Settlement
from orderbus._core.topology import Exchange, Queue
from orderbus.abc import Broker, Subscription
from orderbus.errors import InvariantError, UnavailableError, UsageError
from tests.contract.conftest import Server
from tests.contract.talk import LIMIT_S, bodies, consume, declare, drain, message, send, take, until_unavailable

pytestmark = pytest.mark.anyio


async def test_what_was_acked_is_gone(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1", "2", "3"])

    await drain(broker, name, 3)
    await send(broker, name, ["4"])

    assert bodies(await drain(broker, name, 1)) == ["4"]


async def test_no_more_than_the_prefetch_is_handed_over_unsettled(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, [str(i) for i in range(10)])
    beyond: list[Incoming] = []

    async def ask_for_more(subscription: Subscription) -> None:
        beyond.extend(await subscription.receive())

    async with broker.subscribe(name, prefetch=10) as other:
        async with broker.subscribe(name, prefetch=4) as greedy, anyio.create_task_group() as tasks:
            held = await take(greedy, 4)
            tasks.start_soon(ask_for_more, greedy)
            rest = await consume(other, 5)
            tasks.cancel_scope.cancel()
        rest += await consume(other, 10 - len(rest))

    assert len(held) == 4
    assert beyond == []
    assert {*bodies(rest)} == {str(i) for i in range(10)}


async def test_each_settlement_makes_room_for_another_message(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, [str(i) for i in range(50)])

    async with broker.subscribe(name, prefetch=1) as subscription:
        got = await consume(subscription, 50)

    assert bodies(got) == [str(i) for i in range(50)]


async def test_a_waiting_consumer_hears_of_a_message(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    got: list[Incoming] = []

    async def listen(subscription: Subscription) -> None:
        got.extend(await consume(subscription, 2))

    async with broker.subscribe(name, prefetch=10) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(listen, subscription)
        await send(broker, name, ["1"])
        await send(broker, name, ["2"])

    assert bodies(got) == ["1", "2"]


async def test_leaving_gives_back_the_unsettled_before_everything_newer_and_in_its_order(
    broker: Broker, server: Server, name: str
) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1", "2", "3", "4"])

    async with broker.subscribe(name, prefetch=4) as subscription:
        held = await take(subscription, 4)
        subscription.settle(held[1], Settlement.ACK)
    await server.without_consumers(name)  # RabbitMQ could still hand "5" to the one that leaves
    await send(broker, name, ["5"])
    again = await drain(broker, name, 4)

    assert bodies(again) == ["1", "3", "4", "5"]
    assert [delivery.redelivered for delivery in again] == [True, True, True, False]
    assert [delivery.delivery_count for delivery in again] == [1, 1, 1, 0]


@pytest.mark.parametrize("how", [Settlement.RELEASE, Settlement.REJECT])
async def test_what_is_given_back_comes_again_before_everything_newer(broker: Broker, name: str, how: Settlement) -> None:
    await declare(broker, Queue(name, delivery_limit=50))  # without a limit, 3.10 requeues at the end
    await send(broker, name, ["1", "2"])

    async with broker.subscribe(name, prefetch=1) as subscription:
        (first,) = await take(subscription, 1)
        subscription.settle(first, how)
        again = await consume(subscription, 2)

    assert bodies(again) == ["1", "2"]
    assert [delivery.redelivered for delivery in again] == [True, False]


@pytest.mark.parametrize("how", [Settlement.RELEASE, Settlement.REJECT])
async def test_what_is_given_back_comes_again_in_the_order_of_its_return(broker: Broker, name: str, how: Settlement) -> None:
    await declare(broker, Queue(name, delivery_limit=50))
    await send(broker, name, [str(i) for i in range(6)])

    async with broker.subscribe(name, prefetch=6) as subscription:
        for delivery in await take(subscription, 6):
            subscription.settle(delivery, Settlement.ACK if delivery.body in b"03" else how)
        again = await consume(subscription, 4)

    assert bodies(again) == ["1", "2", "4", "5"]


async def test_a_rejected_message_counts_its_deliveries(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["x"])
    counts = []

    async with broker.subscribe(name, prefetch=5) as subscription:
        for _ in range(4):
            (delivery,) = await take(subscription, 1)
            counts.append(delivery.delivery_count)
            subscription.settle(delivery, Settlement.REJECT)

    assert counts == [0, 1, 2, 3]


async def test_beyond_the_delivery_limit_a_message_is_dead_lettered_and_its_neighbours_are_not(broker: Broker, name: str) -> None:
    dead = f"{name}-dead"
    await declare(broker, Queue(name, delivery_limit=2, dead_letter_exchange="", dead_letter_routing_key=dead), Queue(dead))
    await send(broker, name, ["good", "bad", "fine"])
    tries: list[str] = []

    async with broker.subscribe(name, prefetch=1) as subscription:
        while tries.count("bad") < 3 or "fine" not in tries:
            (delivery,) = await take(subscription, 1)
            tries.append(delivery.body.decode())
            subscription.settle(delivery, Settlement.REJECT if delivery.body == b"bad" else Settlement.ACK)
        (parked,) = await drain(broker, dead, 1)
    depth = await broker.depth(name)

    assert tries == ["good", "bad", "bad", "bad", "fine"]
    assert depth == 0
    assert parked.body == b"bad"
    assert parked.routing_key == dead
    assert parked.delivery_count == 0
    assert _deaths(parked) == [(name, "delivery_limit", 1)]
    assert parked.properties.headers["x-first-death-queue"] == name


async def test_what_is_dead_lettered_by_its_consumer_is_moved_as_it_is_and_its_neighbours_stay(broker: Broker, name: str) -> None:
    dead = f"{name}-dead"
    await declare(broker, Queue(name, dead_letter_exchange="", dead_letter_routing_key=dead), Queue(dead))
    await send(broker, name, ["good", "bad", "fine"])

    async with broker.subscribe(name, prefetch=3) as subscription:
        for delivery in await take(subscription, 3):
            subscription.settle(delivery, Settlement.DEAD_LETTER if delivery.body == b"bad" else Settlement.ACK)
        (parked,) = await drain(broker, dead, 1)
        await subscription.flush()
    depth = await broker.depth(name)

    assert depth == 0
    assert parked.body == b"bad"
    assert _deaths(parked) == [(name, "rejected", 1)]


async def test_without_a_dead_letter_exchange_the_delivery_limit_drops(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name, delivery_limit=1))
    await send(broker, name, ["bad", "good"])

    async with broker.subscribe(name, prefetch=1) as subscription:
        for _ in range(2):
            (delivery,) = await take(subscription, 1)
            subscription.settle(delivery, Settlement.REJECT)
        rest = await consume(subscription, 1)

    assert bodies(rest) == ["good"]


async def test_an_expired_message_goes_on_with_its_own_routing_key(broker: Broker, name: str) -> None:
    """The retry ladder: a queue without consumers, whose messages return to the queue that their key names."""
    ladder, back = f"{name}-ladder", f"{name}-return"
    await declare(
        broker,
        Queue(ladder, message_ttl_ms=50, dead_letter_exchange=back),
        Queue(name),
        exchanges=[Exchange(back, "direct"), Exchange(ladder, "fanout")],
        bindings=[(ladder, ladder, ""), (back, name, name)],
    )

    receipts = await broker.publish(
        [message(name, str(i), exchange=ladder, message_id=f"id-{i}", headers={"ob-key": "k"}) for i in range(3)]
    )
    async with broker.subscribe(name, prefetch=10) as subscription:
        got = await consume(subscription, 3)

    assert receipts == [Receipt.CONFIRMED] * 3
    assert bodies(got) == ["0", "1", "2"]
    first = got[0]
    assert (first.exchange, first.routing_key, first.properties.message_id) == (back, name, "id-0")
    assert first.properties.headers["ob-key"] == "k"
    assert _deaths(first) == [(ladder, "expired", 1)]


async def test_two_consumers_share_a_queue(broker: Broker, server: Server, name: str) -> None:
    await declare(broker, Queue(name))
    got: list[Incoming] = []

    async def work(connection: Broker, tasks: anyio.CancelScope) -> None:
        async with connection.subscribe(name, prefetch=3) as subscription:
            while True:
                for delivery in await subscription.receive():
                    subscription.settle(delivery, Settlement.ACK)
                    got.append(delivery)
                if len(got) == 200:
                    await subscription.flush()
                    tasks.cancel()

    async with server.connect() as other:
        await declare(other, Queue(name))
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(work, broker, tasks.cancel_scope)
                tasks.start_soon(work, other, tasks.cancel_scope)
                await send(broker, name, [str(i) for i in range(200)])

    assert sorted(bodies(got), key=int) == [str(i) for i in range(200)]


async def test_a_single_active_consumer_has_the_queue_to_itself_until_it_leaves(
    broker: Broker, server: Server, name: str
) -> None:
    await declare(broker, Queue(name, single_active_consumer=True))
    sent = [str(i) for i in range(20)]
    second: list[Incoming] = []
    is_second_there = anyio.Event()

    async def wait_in_line(other: Broker) -> None:
        async with other.subscribe(name, prefetch=20) as subscription:
            is_second_there.set()
            second.extend(await consume(subscription, 16))
            await subscription.flush()

    async with server.connect() as other, anyio.create_task_group() as tasks:
        async with broker.subscribe(name, prefetch=5) as active:
            await send(broker, name, ["first"])
            await consume(active, 1)
            tasks.start_soon(wait_in_line, other)
            with anyio.fail_after(LIMIT_S):
                await is_second_there.wait()
            await send(broker, name, sent)
            held = await take(active, 5)
            assert bodies(held) == sent[:5]
            assert second == []
            for delivery in held[:4]:
                active.settle(delivery, Settlement.ACK)
            await active.pause()
            await active.flush()
            assert second == []

    assert bodies(second) == sent[4:]


async def test_a_paused_subscription_takes_nothing_more_and_can_still_settle(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1", "2"])

    async with broker.subscribe(name, prefetch=10) as paused:
        held = await take(paused, 2)
        await paused.pause()
        await send(broker, name, ["3", "4"])
        others = await drain(broker, name, 2)
        for delivery in held:
            paused.settle(delivery, Settlement.ACK)
        await paused.flush()

    assert bodies(others) == ["3", "4"]
    assert await broker.depth(name) == 0


async def test_pausing_holds_back_a_receive_that_was_waiting_already(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    got: list[Incoming] = []

    async def listen(subscription: Subscription, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        task_status.started()
        got.extend(await subscription.receive())

    async with broker.subscribe(name, prefetch=10) as subscription, anyio.create_task_group() as tasks:
        await tasks.start(listen, subscription)
        await subscription.pause()
        await send(broker, name, ["1"])
        others = await drain(broker, name, 1)
        tasks.cancel_scope.cancel()

    assert got == []
    assert bodies(others) == ["1"]


async def test_a_cancelled_receive_loses_nothing(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    got: list[Incoming] = []

    async with broker.subscribe(name, prefetch=3) as subscription:

        async def receive_and_be_cancelled() -> None:
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receive)
                    await send(broker, name, ["x"])
                    scope.cancel()

        async def receive() -> None:
            for delivery in await subscription.receive():
                got.append(delivery)
                subscription.settle(delivery, Settlement.ACK)

        for _ in range(20):
            await receive_and_be_cancelled()
        got += await consume(subscription, 20 - len(got))

    assert len(got) == 20


async def test_deleting_a_queue_ends_its_subscriptions(broker: Broker, server: Server, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1"])

    async with broker.subscribe(name, prefetch=10) as subscription:
        (held,) = await take(subscription, 1)
        await server.delete_queue(name)
        text = await until_unavailable(subscription)
        subscription.settle(held, Settlement.ACK)

    assert name in text
    await declare(broker, Queue(name))
    await send(broker, name, ["2"])
    assert bodies(await drain(broker, name, 1)) == ["2"]


async def test_a_lost_connection_ends_the_subscription_and_gives_back_what_it_held(
    broker: Broker, server: Server, name: str
) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1", "2", "3"])

    async with broker.subscribe(name, prefetch=3) as subscription:
        first, *late = await take(subscription, 3)
        subscription.settle(first, Settlement.ACK)
        await subscription.flush()
        await server.drop_connections()
        await until_unavailable(subscription)
        for delivery in late:
            subscription.settle(delivery, Settlement.ACK)
    again = await drain(broker, name, 2)

    assert bodies(again) == ["2", "3"]
    assert [delivery.delivery_count for delivery in again] == [1, 1]


async def test_a_single_active_consumer_keeps_the_order_over_losses_that_follow_each_other(
    broker: Broker, server: Server, name: str
) -> None:
    sent = [str(i) for i in range(10)]
    await declare(broker, Queue(name, single_active_consumer=True))
    await send(broker, name, sent)

    async with broker.subscribe(name, prefetch=10) as first:
        await take(first, 10)
        await server.drop_connections()
        await until_unavailable(first)
    for _ in range(3):
        async with broker.subscribe(name, prefetch=10) as lost:
            assert bodies(await take(lost, 1))[0] == "0"
            await server.drop_connections()
            await until_unavailable(lost)

    assert bodies(await drain(broker, name, 10)) == sent


async def test_a_settlement_from_before_the_loss_does_not_settle_the_redelivery(
    broker: Broker, server: Server, name: str
) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1"])
    async with broker.subscribe(name, prefetch=1) as earlier:
        (stale,) = await take(earlier, 1)
        await server.drop_connections()
        await until_unavailable(earlier)

    async with broker.subscribe(name, prefetch=1) as later:
        (fresh,) = await take(later, 1)
        later.settle(stale, Settlement.ACK)
        await later.flush()
        later.settle(fresh, Settlement.REJECT)
        (again,) = await consume(later, 1)

    assert again.body == b"1"
    assert again.delivery_count == 2


async def test_publishing_goes_on_after_a_lost_connection(broker: Broker, server: Server, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["before"])

    await server.drop_connections()
    receipts: list[Receipt] = []
    with anyio.fail_after(LIMIT_S):
        while receipts != [Receipt.CONFIRMED]:
            try:
                receipts = list(await broker.publish([message(name, "after")]))
            except UnavailableError:
                continue

    got = bodies(await drain(broker, name, 2))
    assert got == ["before", "after"]


async def test_settling_twice_is_a_bug_and_says_so(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    await send(broker, name, ["1", "2"])

    async with broker.subscribe(name, prefetch=2) as subscription:
        first, second = await take(subscription, 2)
        subscription.settle(first, Settlement.ACK)
        with pytest.raises(InvariantError, match="twice"):
            subscription.settle(first, Settlement.ACK)
        subscription.settle(second, Settlement.ACK)
        await subscription.flush()

    assert await broker.depth(name) == 0


async def test_two_tasks_cannot_receive_from_one_subscription(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))

    async with broker.subscribe(name, prefetch=2) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(subscription.receive)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(UsageError, match="two tasks"):
            await subscription.receive()
        tasks.cancel_scope.cancel()


async def test_consuming_a_queue_that_does_not_exist_is_unavailable_and_names_it(broker: Broker, name: str) -> None:
    with pytest.raises(UnavailableError, match=name):
        async with broker.subscribe(name, prefetch=1):
            pass


@pytest.mark.parametrize("prefetch", [0, -1, 65536])
async def test_a_prefetch_that_bounds_nothing_is_refused(broker: Broker, name: str, prefetch: int) -> None:
    await declare(broker, Queue(name))

    with pytest.raises(UsageError, match="prefetch"):
        async with broker.subscribe(name, prefetch=prefetch):
            pass


async def test_an_error_of_the_caller_comes_out_as_it_was_raised(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))

    with pytest.raises(ValueError, match="mine"):
        async with broker.subscribe(name, prefetch=1):
            raise ValueError("mine")


def _deaths(delivery: Incoming) -> list[tuple[Any, ...]]:
    deaths: Any = delivery.properties.headers["x-death"]
    return [(death["queue"], death["reason"], death["count"]) for death in deaths]
