"""Messages of strangers, with headers that kill an ordinary client: each is a property of that one message."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from orderbus._core.message import BodyNotKept, Receipt, Settlement
from orderbus._core.topology import Queue, Topology
from orderbus.adapters.rabbitmq import RabbitBroker
from orderbus.errors import MessageError
from tests.rabbitmq.conftest import Place, delete_queue
from tests.rabbitmq.strangers import Raw, publish_raw, stranger
from tests.rabbitmq.test_consuming import ACK, REJECT, fill, numbers, ready, take, take_all_settling

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


def bad_id() -> bytes:
    return struct.pack(">H", 1 << 7) + b"\x02\xff\xfe"


def far_timestamp() -> bytes:
    return struct.pack(">HQ", 1 << 6, 1 << 62)


def deep_table() -> bytes:
    inner = b""
    for _ in range(500):
        inner = b"\x01nF" + struct.pack(">I", len(inner)) + inner
    return struct.pack(">HI", 1 << 13, len(inner)) + inner


@pytest.mark.parametrize("properties", [bad_id, far_timestamp, deep_table])
async def test_a_malformed_message_harms_no_neighbour(
    broker: RabbitBroker, place: Place, vhost_url: str, properties: Callable[[], bytes]
) -> None:
    raw = properties()
    await fill(broker, place.queue, 3)
    async with stranger(vhost_url) as other:
        assert await other.publish([Raw("", place.queue, b"", "m", "t", properties=raw)]) == [Receipt.CONFIRMED]
    await fill(broker, place.queue, 3)
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        deliveries = await take(subscription, 7)
        bad = deliveries[3]
        assert bad.raw == raw
        with pytest.raises(MessageError) as caught:
            _ = bad.properties
        assert caught.value.reason == "malformed-properties"
        good = [delivery for delivery in deliveries if delivery is not bad]
        assert [delivery.properties.message_id for delivery in good] == ["m"] * 6
        for delivery in good:
            subscription.settle(delivery, ACK)
        subscription.settle(bad, REJECT)
        (again,) = await subscription.receive()
        assert again.redelivered
        subscription.settle(again, ACK)
        await subscription.flush()
    assert await broker.depth(place.queue) == 0


async def test_a_malformed_message_at_the_head_is_met_by_the_probe(broker: RabbitBroker, place: Place, vhost_url: str) -> None:
    async with stranger(vhost_url) as other:
        assert await other.publish([Raw("", place.queue, b"", "m", "t", properties=bad_id())]) == [Receipt.CONFIRMED]
    await fill(broker, place.queue, 1)
    async with broker.subscribe(place.queue, prefetch=1) as subscription:
        (bad,) = await subscription.receive()
        subscription.settle(bad, REJECT)
    await ready(broker, place.queue, 2)
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        (bad,) = await subscription.receive()
        assert bad.redelivered
        subscription.settle(bad, ACK)
        assert numbers(await take_all_settling(subscription, 1)) == [0]


async def test_a_body_beyond_what_can_be_sent_is_not_kept_and_moved_by_the_broker(
    broker: RabbitBroker, place: Place, vhost_url: str
) -> None:
    """17 MiB: nobody could park it. Only who looks at dead letters holds it."""
    body = bytes(17 * 1024 * 1024)
    queue, dead = f"{place.queue}-large", f"{place.queue}-large.dlq"
    await broker.apply(Topology(queues=(Queue(queue, dead_letter_exchange="", dead_letter_routing_key=dead), Queue(dead))))
    await publish_raw(vhost_url, queue, [(b"\x00\x00", body)])

    async with broker.subscribe(queue, prefetch=10) as subscription:
        (large,) = await subscription.receive()
        assert large.body == b""
        with pytest.raises(BodyNotKept, match="the body takes 17825792 bytes, and was not kept: 16777216 is the limit"):
            _ = large.properties
        subscription.settle(large, Settlement.DEAD_LETTER)
        async with broker.subscribe(dead, prefetch=10) as letters:
            (letter,) = await letters.receive()
            assert letter.body == body
            letters.settle(letter, ACK)
            await letters.flush()
    for name in (queue, dead):
        await delete_queue(broker, name)
