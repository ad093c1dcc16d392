"""Publishing to a real RabbitMQ: every message gets the receipt that is true of it."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import anyio
import pytest

from orderbus._core.message import Outgoing, Receipt, Settlement
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker, publisher
from tests.rabbitmq.conftest import Place, have_closed
from tests.servers import Rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


def message(place: Place, body: bytes = b"", *, key: str = Place.key, message_id: str = "m", **fields: Any) -> Outgoing:
    return Outgoing(place.exchange, key, body, message_id, "test", **fields)


async def bodies(broker: RabbitBroker, queue: str, count: int) -> list[bytes]:
    found: list[bytes] = []
    async with broker.subscribe(queue, prefetch=500) as subscription:
        with anyio.fail_after(30):
            while len(found) < count:
                for delivery in await subscription.receive():
                    found.append(delivery.body)
                    subscription.settle(delivery, Settlement.ACK)
            await subscription.flush()
    return found


async def test_a_message_arrives_as_it_was_sent(broker: RabbitBroker, place: Place) -> None:
    headers = {"text": "é", "number": -7, "real": 1.5, "flag": True, "none": None, "bytes": b"\xff", "list": [1, {"a": "b"}]}
    sent = message(place, b"body", message_id="id-1", content_type="text/plain", timestamp_s=1700000000, headers=headers)
    assert await broker.publish([sent]) == [Receipt.CONFIRMED]
    async with broker.subscribe(place.queue, prefetch=10) as subscription:
        (delivery,) = await subscription.receive()
        subscription.settle(delivery, Settlement.ACK)
    properties = delivery.properties
    assert (delivery.exchange, delivery.routing_key, delivery.queue) == (place.exchange, Place.key, place.queue)
    assert (delivery.body, delivery.redelivered, delivery.delivery_count) == (b"body", False, 0)
    assert (properties.message_id, properties.type) == ("id-1", "test")
    assert (properties.content_type, properties.timestamp_s) == ("text/plain", 1700000000)
    assert properties.headers == headers


@pytest.mark.parametrize("size", [0, 1, 131064, 131065, 131072, 300_000, 5_000_000])
async def test_a_body_of_any_size_arrives(broker: RabbitBroker, place: Place, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert await broker.publish([message(place, body), message(place, b"next")]) == [Receipt.CONFIRMED] * 2
    assert await bodies(broker, place.queue, 2) == [body, b"next"]


async def test_receipts_are_each_message_s_own_though_all_ids_are_the_same(broker: RabbitBroker, place: Place) -> None:
    keys = [Place.nowhere if number % 3 == 0 else Place.key for number in range(3000)]
    batch = [message(place, b"%d" % number, key=key, message_id="same") for number, key in enumerate(keys)]
    receipts = await broker.publish(batch)
    assert receipts == [Receipt.UNROUTABLE if key == Place.nowhere else Receipt.CONFIRMED for key in keys]
    assert await bodies(broker, place.queue, 2000) == [sent.body for sent in batch if sent.routing_key == Place.key]


async def test_many_tasks_publish_at_once(broker: RabbitBroker, place: Place) -> None:
    receipts: dict[int, list[Receipt]] = {}

    async def publish(task: int) -> None:
        batch = [message(place, b"%d" % task, key=Place.nowhere if task % 2 else Place.key) for _ in range(100 + task)]
        receipts[task] = list(await broker.publish(batch))

    async with anyio.create_task_group() as tasks:
        for task in range(20):
            tasks.start_soon(publish, task)
    for task, answers in receipts.items():
        assert answers == [Receipt.UNROUTABLE if task % 2 else Receipt.CONFIRMED] * (100 + task)
    expected = sum(100 + task for task in range(0, 20, 2))
    assert len(await bodies(broker, place.queue, expected)) == expected


async def test_what_can_t_be_sent_is_refused_and_its_neighbours_are_sent(broker: RabbitBroker, place: Place) -> None:
    batch = [
        message(place, b"first"),
        message(place, headers={"n": math.nan}),
        message(place, key="k" * 256),
        message(place, b"last"),
    ]
    confirmed, refused = Receipt.CONFIRMED, Receipt.REFUSED
    assert await broker.publish(batch) == [confirmed, refused, refused, confirmed]
    assert await broker.publish([message(place, headers={"n": math.inf})]) == [refused]
    assert await bodies(broker, place.queue, 2) == [b"first", b"last"]


async def test_after_a_refusal_the_next_publish_has_a_new_channel_on_the_same_connection(
    broker: RabbitBroker, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cluster, a channel of the moment in which a queue's leader died may refuse for ever: `make faults ONLY=cluster`."""
    monkeypatch.setattr(publisher, "RENEW_S", 0.0)
    full = f"{place.queue}-full"
    channel = await (await broker._consuming_connection()).open_plain_channel()
    limit = {"x-queue-type": "quorum", "x-max-length": 1, "x-overflow": "reject-publish"}
    await channel.queue_declare(full, durable=True, arguments=limit)
    to_full, to_other = Outgoing("", full, b"", "m", "t"), message(place)
    try:
        while Receipt.REFUSED not in await broker.publish([to_full, to_other]):
            pass
        before, connection = broker._publisher, broker._publishing
        batches = [broker.publish([to_other]) for _ in range(3)]

        assert await asyncio.gather(*batches) == [[Receipt.CONFIRMED]] * 3
        assert (broker._publisher is before, broker._publishing is connection) == (False, True)
        renewed = broker._publisher
        assert await broker.publish([to_other]) == [Receipt.CONFIRMED]
        assert broker._publisher is renewed
    finally:
        await channel.queue_delete(full)


async def test_an_empty_batch_has_no_receipts(broker: RabbitBroker) -> None:
    assert await broker.publish([]) == []


async def test_an_exchange_that_does_not_exist_is_unroutable_and_the_next_call_works(broker: RabbitBroker, place: Place) -> None:
    assert await broker.publish([Outgoing("missing", "k", b"", "m", "t")]) == [Receipt.UNROUTABLE]
    assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]


async def test_an_exchange_that_does_not_exist_in_the_middle_of_a_batch_makes_nobody_s_receipt_untrue(
    broker: RabbitBroker, place: Place
) -> None:
    missing = Outgoing("missing", "k", b"", "m", "t")
    batch = [*(message(place, b"%d" % number) for number in range(50)), missing, *(message(place, b"late") for _ in range(50))]
    receipts = await broker.publish(batch)
    assert receipts[50] is Receipt.UNROUTABLE
    assert set(receipts[:50]) <= {Receipt.CONFIRMED, Receipt.UNKNOWN}
    assert receipts[51:] == [Receipt.UNKNOWN] * 50  # the channel was closed before the broker came to them
    assert await broker.publish([message(place, b"next")]) == [Receipt.CONFIRMED]
    assert await bodies(broker, place.queue, 51) == [b"%d" % number for number in range(50)] + [b"next"]


async def test_returned_bodies_of_any_size_confuse_no_receipt(broker: RabbitBroker, place: Place) -> None:
    sizes = [0, 300_000, 1, 131_064, 131_065, 0, 262_128]
    batch = [
        message(place, b"x" * size, key=key, message_id="same")
        for size in sizes
        for key in (Place.nowhere, Place.key, Place.nowhere)
    ]
    receipts = await broker.publish(batch)
    assert receipts == [Receipt.UNROUTABLE, Receipt.CONFIRMED, Receipt.UNROUTABLE] * len(sizes)
    assert [len(body) for body in await bodies(broker, place.queue, len(sizes))] == sizes


async def test_what_was_confirmed_before_the_operator_closed_the_connection_is_in_the_queue(
    broker: RabbitBroker, place: Place, rabbit: Rabbit, vhost_url: str
) -> None:
    await broker.publish([message(place, b"first")])
    confirmed: set[bytes] = {b"first"}

    async def publish_until_it_is_closed() -> None:
        for number in itertools.count():
            batch = [message(place, b"%d.%d" % (number, index)) for index in range(200)]
            receipts = await broker.publish(batch)
            assert set(receipts) <= {Receipt.CONFIRMED, Receipt.UNKNOWN}
            confirmed.update(sent.body for sent, receipt in zip(batch, receipts, strict=True) if receipt is Receipt.CONFIRMED)
            if Receipt.UNKNOWN in receipts or closed.is_set():
                return

    closed = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish_until_it_is_closed)
        await have_closed(rabbit, vhost_url, "(publish)")
        closed.set()
    assert await broker.publish([message(place, b"last")]) in ([Receipt.CONFIRMED], [Receipt.UNKNOWN])
    found: set[bytes] = set()
    async with broker.subscribe(place.queue, prefetch=500) as subscription:
        with anyio.fail_after(60):
            while not confirmed <= found:
                for delivery in await subscription.receive():
                    found.add(delivery.body)
                    subscription.settle(delivery, Settlement.ACK)


async def test_a_connection_closed_by_the_operator_is_replaced(
    broker: RabbitBroker, place: Place, rabbit: Rabbit, vhost_url: str
) -> None:
    assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]
    await have_closed(rabbit, vhost_url, "(publish)")
    publisher = broker._publisher
    assert publisher is not None
    assert await broker.publish([message(place)]) in ([Receipt.CONFIRMED], [Receipt.UNKNOWN])
    assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]
    assert broker._publisher is not publisher


async def test_a_cancelled_publish_leaves_the_others_their_receipts(broker: RabbitBroker, place: Place) -> None:
    for _ in range(20):
        doomed = asyncio.create_task(broker.publish([message(place, b"doomed")] * 50))
        other = asyncio.create_task(broker.publish([message(place, b"other"), message(place, key=Place.nowhere)]))
        await asyncio.sleep(0)
        doomed.cancel()
        assert await other == [Receipt.CONFIRMED, Receipt.UNROUTABLE]
        assert (await asyncio.gather(doomed, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_publishing_after_the_end_is_an_error(vhost_url: str) -> None:
    async with open_broker(vhost_url, name="test") as broker:
        pass
    with pytest.raises(Exception, match="broker is closed"):
        await broker.publish([Outgoing("", "q", b"", "m", "t")])


async def test_a_confirm_that_does_not_come_in_time_is_unknown(vhost_url: str) -> None:
    async with open_broker(vhost_url, name="test", confirm_s=1e-9) as broker:
        place = Place()
        await broker.apply(place.topology())
        assert await broker.publish([message(place)]) == [Receipt.UNKNOWN]
        broker._publisher._confirm_s = 30.0  # type: ignore[union-attr]
        assert await broker.publish([message(place, b"2")]) == [Receipt.CONFIRMED]
        assert await bodies(broker, place.queue, 2) == [b"", b"2"]


async def test_a_lost_connection_means_unknown_not_error(broker: RabbitBroker, place: Place) -> None:
    await broker.publish([message(place)])
    connection = broker._publishing
    assert connection is not None
    task = asyncio.create_task(broker.publish([message(place)] * 5000))
    assert broker._publisher is not None
    while broker._publisher._confirms.open == 0:
        await anyio.lowlevel.checkpoint()
    connection.abort("cut by the test")
    receipts = await task
    assert set(receipts) <= {Receipt.UNKNOWN, Receipt.CONFIRMED}
    assert Receipt.UNKNOWN in receipts
    assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]
