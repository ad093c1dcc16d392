"""What the memory broker does beyond the contract: expiry in virtual time, its bounds, and the hooks that make it fail."""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import pytest

from orderbus._core.message import Incoming, Receipt, Settlement
from orderbus._core.topology import RETURN_EXCHANGE, Binding, Exchange, Queue, QueueNeed, Topology, retry_exchange, topology_for
from orderbus.abc import Subscription
from orderbus.adapters.memory import MemoryBroker
from orderbus.errors import UnavailableError, UsageError
from tests.contract.talk import bodies, consume, declare, drain, message, send, take, until_unavailable

pytestmark = pytest.mark.anyio

Q = "group.topic"


async def _ladder(broker: MemoryBroker) -> None:
    await broker.apply(topology_for([QueueNeed(Q, ("orders.placed",))]))


async def _retry(broker: MemoryBroker, step_s: int, body: str) -> None:
    await broker.publish([message(Q, body, exchange=retry_exchange(step_s))])


async def test_the_retry_ladder_returns_each_message_at_its_time(broker: MemoryBroker) -> None:
    await _ladder(broker)
    began = anyio.current_time()
    returned: list[tuple[str, float]] = []

    async with broker.subscribe(Q, prefetch=10) as subscription:
        for step_s, body in ((3600, "late"), (1, "soon"), (60, "middle")):
            await _retry(broker, step_s, body)
        for _ in range(3):
            (got,) = await consume(subscription, 1) if not returned else await _next(subscription)
            returned.append((got.body.decode(), anyio.current_time() - began))

    assert [body for body, _ in returned] == ["soon", "middle", "late"]
    assert [after_s for _, after_s in returned] == pytest.approx([1, 60, 3600])


async def _next(subscription: Subscription) -> Sequence[Incoming]:
    got = await subscription.receive()
    for delivery in got:
        subscription.settle(delivery, Settlement.ACK)
    return got


async def test_a_consumer_that_waits_already_hears_of_an_expiry_that_is_set_later(broker: MemoryBroker) -> None:
    await _ladder(broker)
    began = anyio.current_time()
    after_s: list[float] = []

    async def listen(subscription: Subscription) -> None:
        while len(after_s) < 2:
            after_s.extend(anyio.current_time() - began for _ in await _next(subscription))

    async with broker.subscribe(Q, prefetch=1) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(listen, subscription)
        await _retry(broker, 300, "slow")
        await _retry(broker, 2, "fast")

    assert after_s == pytest.approx([2, 300])


async def test_what_expired_unseen_is_found_in_the_order_of_its_expiry(broker: MemoryBroker) -> None:
    await _ladder(broker)
    await _retry(broker, 5, "5")
    await _retry(broker, 1, "1")
    await _retry(broker, 2, "2")

    await anyio.sleep(3)
    at_three = [got.body for got in broker.messages(Q)]
    await anyio.sleep(10)

    assert at_three == [b"1", b"2"]
    assert [got.body for got in broker.messages(Q)] == [b"1", b"2", b"5"]
    assert await broker.depth(retry_exchange(5)) == 0


async def test_a_second_expiry_counts_from_the_first_and_not_from_when_somebody_looked(broker: MemoryBroker) -> None:
    await declare(
        broker,
        Queue("first", message_ttl_ms=1000, dead_letter_exchange="", dead_letter_routing_key="second"),
        Queue("second", message_ttl_ms=1000, dead_letter_exchange="", dead_letter_routing_key="end"),
        Queue("end"),
    )
    await send(broker, "first", ["x"])

    await anyio.sleep(2.5)

    (got,) = broker.messages("end")
    deaths = got.properties.headers["x-death"]
    assert [death["queue"] for death in deaths] == ["second", "first"]  # type: ignore[union-attr,index,call-overload]


async def test_a_message_that_expired_for_a_missing_queue_waits_until_there_is_one_and_blocks_nobody(
    broker: MemoryBroker,
) -> None:
    await declare(
        broker, Queue("ladder", message_ttl_ms=10, dead_letter_exchange="back"), Queue("kept"), exchanges=[Exchange("back", "direct")],
        bindings=[("back", "kept", "ladder")],
    )  # fmt: skip
    await broker.apply(Topology((Exchange("in", "fanout"),), (), (Binding("in", "ladder", ""),)))
    await broker.publish([message("gone", "early", exchange="in"), message("ladder", "fine", exchange="in")])
    await anyio.sleep(1)
    assert bodies(await drain(broker, "kept", 1)) == ["fine"]

    await declare(broker, Queue("late"), bindings=[("back", "late", "gone")])

    assert bodies(await drain(broker, "late", 1)) == ["early"]


async def test_a_message_that_only_expires_does_not_go_round_for_ever(broker: MemoryBroker) -> None:
    await declare(broker, Queue("loop", message_ttl_ms=10, dead_letter_exchange="", dead_letter_routing_key="loop"))
    await send(broker, "loop", ["x"])

    await anyio.sleep(1)

    assert await broker.depth("loop") == 0


async def test_x_death_counts_the_same_death_and_keeps_the_others(broker: MemoryBroker) -> None:
    await _ladder(broker)
    earlier = [{"queue": "other", "reason": "expired", "count": 4}, {"queue": retry_exchange(1), "reason": "expired", "count": 2}]
    await broker.publish([message(Q, "x", exchange=retry_exchange(1), headers={"x-death": earlier})])

    await anyio.sleep(1)

    deaths = broker.messages(Q)[0].properties.headers["x-death"]
    assert [(d["queue"], d["count"]) for d in deaths] == [(retry_exchange(1), 3), ("other", 4)]  # type: ignore[union-attr,index,call-overload]


async def test_a_full_broker_refuses_until_something_was_acked() -> None:
    broker = MemoryBroker(limit_bytes=10_000)
    await declare(broker, Queue(Q))

    receipts = await broker.publish([message(Q, bytes(4000))] * 3)
    assert receipts == [Receipt.CONFIRMED, Receipt.REFUSED, Receipt.REFUSED]
    await drain(broker, Q, 1)

    assert await broker.publish([message(Q, bytes(4000))]) == [Receipt.CONFIRMED]


@pytest.mark.parametrize("how", ["acked", "deleted", "dropped as dead", "expired", "dead-lettered and acked"])
async def test_everything_that_goes_makes_room(how: str) -> None:
    broker = MemoryBroker(limit_bytes=2_000)
    dead_letter = "dlq" if how.startswith("dead") else None
    ttl_ms = 10 if how == "expired" else None
    queue = Queue(
        Q, delivery_limit=0, message_ttl_ms=ttl_ms, dead_letter_exchange=dead_letter and "", dead_letter_routing_key=dead_letter
    )
    await declare(broker, queue, Queue("dlq"))
    for _ in range(20):
        await send(broker, Q, ["x"])
        match how:
            case "acked":
                await drain(broker, Q, 1)
            case "deleted":
                async with broker.subscribe(Q, prefetch=1) as subscription:
                    await take(subscription, 1)
                    broker.delete_queue(Q)
                await declare(broker, queue)
            case "expired":
                await anyio.sleep(1)
            case _:
                async with broker.subscribe(Q, prefetch=1) as subscription:
                    (got,) = await take(subscription, 1)
                    subscription.settle(got, Settlement.REJECT)
                if dead_letter:
                    await drain(broker, "dlq", 1)


async def test_a_burst_wakes_a_consumer_once(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    calls: list[int] = []

    async def listen(subscription: Subscription) -> None:
        while sum(calls) < 100:
            calls.append(len(await _next(subscription)))

    async with broker.subscribe(Q, prefetch=1000) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(listen, subscription)
        await anyio.wait_all_tasks_blocked()
        await send(broker, Q, [str(i) for i in range(100)])

    assert calls == [100]


async def test_a_message_whose_consumer_is_cancelled_just_when_it_was_woken_goes_to_the_next(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    await send(broker, Q, ["x"])
    got: list[Incoming] = []
    doomed = anyio.CancelScope()

    async def listen_and_be_cancelled() -> None:
        with doomed:
            async with broker.subscribe(Q, prefetch=1) as subscription:
                await subscription.receive()

    async def listen() -> None:
        async with broker.subscribe(Q, prefetch=1) as subscription:
            got.extend(await _next(subscription))

    async with broker.subscribe(Q, prefetch=1) as holder, anyio.create_task_group() as tasks:
        (held,) = await take(holder, 1)
        tasks.start_soon(listen_and_be_cancelled)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(listen)
        await anyio.wait_all_tasks_blocked()
        holder.settle(held, Settlement.RELEASE)
        doomed.cancel()

    assert bodies(got) == ["x"]


async def test_a_dropped_connection_ends_subscriptions_and_counts_what_comes_back(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    await send(broker, Q, ["1", "2"])

    async with broker.subscribe(Q, prefetch=1) as subscription:
        await take(subscription, 1)
        broker.drop_connections()
        assert "dropped" in await until_unavailable(subscription)

    assert [(got.body, got.delivery_count) for got in broker.messages(Q)] == [(b"1", 1), (b"2", 0)]


async def test_a_publish_whose_connection_drops_before_the_confirm_is_unknown_and_was_kept(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    receipts: list[Receipt] = []

    async def publish() -> None:
        receipts.extend(await broker.publish([message(Q, "x")]))

    async with broker.subscribe(Q, prefetch=1) as subscription, anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        await anyio.lowlevel.checkpoint()
        while not broker.messages(Q):
            await anyio.lowlevel.checkpoint()
        broker.drop_connections()
        await until_unavailable(subscription)

    # Whether the confirm had arrived is a matter of the scheduler; never may a kept message be reported as lost.
    assert receipts in ([Receipt.UNKNOWN], [Receipt.CONFIRMED])
    assert len(broker.messages(Q)) == 1


async def test_lost_confirms_are_unknown_while_the_messages_are_kept(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))

    broker.lose_confirms(1)
    receipts = await broker.publish([message(Q, "1"), message(Q, "2")])

    assert receipts == [Receipt.UNKNOWN, Receipt.CONFIRMED]
    assert bodies(broker.messages(Q)) == ["1", "2"]


async def test_refused_publishes_are_not_kept(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))

    broker.refuse_publishes(2)
    receipts = await broker.publish([message(Q, str(i)) for i in range(3)])

    assert receipts == [Receipt.REFUSED, Receipt.REFUSED, Receipt.CONFIRMED]
    assert bodies(broker.messages(Q)) == ["2"]


async def test_a_blocked_broker_lets_publishes_wait_and_consumers_go_on(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    await send(broker, Q, ["before"])
    receipts: list[Receipt] = []

    async def publish() -> None:
        receipts.extend(await broker.publish([message(Q, "after")]))

    broker.block()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        assert bodies(await drain(broker, Q, 1)) == ["before"]
        await anyio.sleep(3600)
        assert receipts == []
        broker.unblock()

    assert receipts == [Receipt.CONFIRMED]


async def test_a_connection_that_drops_while_the_broker_is_blocked_loses_the_waiting_publish(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    receipts: list[Receipt] = []

    async def publish() -> None:
        receipts.extend(await broker.publish([message(Q, "x")]))

    broker.block()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        await anyio.wait_all_tasks_blocked()
        broker.drop_connections()
    broker.unblock()

    assert receipts == [Receipt.UNKNOWN]
    assert broker.messages(Q) == []


async def test_looking_at_messages_takes_nothing(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q))
    await send(broker, Q, ["1", "2"])

    assert bodies(broker.messages(Q)) == bodies(broker.messages(Q)) == ["1", "2"]
    assert bodies(await drain(broker, Q, 2)) == ["1", "2"]


async def test_a_deleted_queue_is_gone_from_every_route(broker: MemoryBroker) -> None:
    await declare(broker, Queue(Q), exchanges=[Exchange("e", "topic")], bindings=[("e", Q, "#")])
    assert await broker.publish([message("k", exchange="e")]) == [Receipt.CONFIRMED]

    broker.delete_queue(Q)

    assert await broker.publish([message("k", exchange="e"), message(Q)]) == [Receipt.UNROUTABLE] * 2
    with pytest.raises(UsageError, match="no queue"):
        broker.messages(Q)


async def test_a_retry_for_a_deleted_queue_ends_among_the_lost_and_nobody_elses_does(broker: MemoryBroker) -> None:
    await broker.apply(topology_for([QueueNeed(Q, ("a",)), QueueNeed("other", ("a",))]))
    await _retry(broker, 1, "orphan")
    await broker.publish([message("other", "innocent", exchange=retry_exchange(1))])
    broker.delete_queue(Q)

    await anyio.sleep(2)

    assert bodies(broker.messages("ob.lost")) == ["orphan"]
    assert bodies(broker.messages("other")) == ["innocent"]
    assert broker.messages("other")[0].exchange == RETURN_EXCHANGE


async def test_a_binding_to_nothing_is_refused_and_nothing_is_declared(broker: MemoryBroker) -> None:
    with pytest.raises(UsageError, match="missing"):
        await declare(broker, Queue(Q), bindings=[("missing", Q, "#")])

    with pytest.raises(UnavailableError):
        async with broker.subscribe(Q, prefetch=1):
            pass
