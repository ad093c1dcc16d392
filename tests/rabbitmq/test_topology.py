"""Declaring against a real RabbitMQ."""

from __future__ import annotations

import pytest

from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import Binding, Exchange, Queue, QueueNeed, Topology, topology_for
from orderbus.adapters.rabbitmq import RabbitBroker
from orderbus.errors import TopologyError, UsageError
from tests.rabbitmq.conftest import Place

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


async def test_everything_a_group_needs_can_be_declared_again_and_again(broker: RabbitBroker, place: Place) -> None:
    needs = [
        QueueNeed(f"{place.queue}.topic", (place.queue,)),
        QueueNeed(f"{place.queue}.ordered", (place.queue, "other"), ordered=True),
    ]
    for _ in range(2):
        await broker.apply(topology_for(needs))
    assert await broker.publish([Outgoing("ob.events", f"{place.queue}.07", b"", "m", "t")]) == [Receipt.CONFIRMED]
    assert [await broker.depth(need.name) for need in needs] == [1, 1]


async def test_each_difference_is_named_and_the_rest_is_declared(broker: RabbitBroker, place: Place) -> None:
    exchange, queue = place.exchange, place.queue
    changed = Topology(
        (Exchange(exchange, "fanout"), Exchange(f"{exchange}.new", "topic")),
        (
            Queue(queue, delivery_limit=7),
            Queue(f"{queue}.new", delivery_limit=7, dead_letter_exchange=""),
            Queue(f"{queue}.newer"),
        ),
        (
            Binding(f"{exchange}.new", f"{queue}.new", "a"),
            Binding(exchange, queue, "b"),
            Binding(f"{exchange}.new", f"{queue}.newer", "a"),
        ),
    )
    with pytest.raises(TopologyError) as caught:
        await broker.apply(changed)
    text = str(caught.value)
    assert "2 could not be declared" in text
    assert f"exchange '{exchange}': the broker says \"PRECONDITION_FAILED - inequivalent arg 'type'" in text
    assert f"queue '{queue}': the broker says \"PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit'" in text
    assert "received '7' but current is '50'" in text
    assert "drain and delete it" in text
    assert "guest:guest" not in text
    assert await broker.publish([Outgoing(f"{exchange}.new", "a", b"", "m", "t")]) == [Receipt.CONFIRMED]
    assert [await broker.depth(f"{queue}.new"), await broker.depth(f"{queue}.newer"), await broker.depth(queue)] == [1, 1, 0]


async def test_a_reserved_name_is_a_topology_error(broker: RabbitBroker) -> None:
    with pytest.raises(TopologyError, match=r"exchange 'amq.mine': the broker says .ACCESS_REFUSED"):
        await broker.apply(Topology((Exchange("amq.mine", "topic"),)))


async def test_the_depth_of_a_missing_queue_is_a_usage_error(broker: RabbitBroker) -> None:
    with pytest.raises(UsageError, match="no queue 'missing'"):
        await broker.depth("missing")
