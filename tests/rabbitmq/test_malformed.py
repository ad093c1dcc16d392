"""Messages of strangers, with headers that kill an ordinary client: each is a property of that one message."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from orderbus._core.message import Outgoing, Receipt
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from orderbus.adapters.rabbitmq.encoder import PublishEncoder
from orderbus.errors import MessageError
from tests.rabbitmq.conftest import Place
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


class RawEncoder(PublishEncoder):
    """Publishes the bodies of its messages as properties, unchecked."""

    def encode(self, message: Outgoing, sequence: int) -> bytes:
        if not message.body:
            return super().encode(message, sequence)
        frame = super().encode(Outgoing(message.exchange, message.routing_key, b"", "m", "t"), sequence)
        method = frame[: struct.unpack_from(">xxxI", frame)[0] + 8]
        payload = struct.pack(">HHQ", 60, 0, 0) + message.body
        return method + struct.pack(">BHI", 2, self._channel, len(payload)) + payload + b"\xce"


@asynccontextmanager
async def stranger(vhost_url: str) -> AsyncIterator[RabbitBroker]:
    async with open_broker(vhost_url, name="stranger") as broker:
        publisher = await broker._ready_publisher()
        publisher._encoder.__class__ = RawEncoder
        yield broker


@pytest.mark.parametrize("properties", [bad_id, far_timestamp, deep_table])
async def test_a_malformed_message_harms_no_neighbour(
    broker: RabbitBroker, place: Place, vhost_url: str, properties: Callable[[], bytes]
) -> None:
    raw = properties()
    await fill(broker, place.queue, 3)
    async with stranger(vhost_url) as other:
        assert await other.publish([Outgoing("", place.queue, raw, "m", "t")]) == [Receipt.CONFIRMED]
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
        assert await other.publish([Outgoing("", place.queue, bad_id(), "m", "t")]) == [Receipt.CONFIRMED]
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
