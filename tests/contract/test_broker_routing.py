"""Broker contract: which queues a message reaches, and what the publisher is told."""

from __future__ import annotations

import math

import pytest

from orderbus._core.message import HeaderValue, Receipt
from orderbus._core.topology import Exchange, Queue
from orderbus.abc import Broker
from orderbus.errors import TopologyError, UsageError
from tests.contract.conftest import Server
from tests.contract.talk import bodies, declare, drain, message, send

pytestmark = pytest.mark.anyio


async def test_a_message_arrives_as_it_was_sent(broker: Broker, name: str) -> None:
    headers: dict[str, HeaderValue] = {
        "text": "grün",
        "number": -(2**40),
        "yes": True,
        "half": 0.5,
        "none": None,
        "bytes": b"\xff\x00",
        "list": ["a", 1, [None]],
        "table": {"inner": {"deep": "x"}},
    }
    await declare(broker, Queue(name), exchanges=[Exchange(name, "topic")], bindings=[(name, name, "a.#")])

    sent = message(
        "a.b", b"\x00body\xff", exchange=name, message_id="id-1", type="tt", content_type="x/y", timestamp_s=17, headers=headers
    )
    receipts = await broker.publish([sent])
    (got,) = await drain(broker, name, 1)

    assert receipts == [Receipt.CONFIRMED]
    assert (got.queue, got.exchange, got.routing_key, got.body) == (name, name, "a.b", b"\x00body\xff")
    properties = got.properties
    assert (properties.message_id, properties.type, properties.content_type) == ("id-1", "tt", "x/y")
    assert properties.timestamp_s == 17
    assert {key: value for key, value in properties.headers.items() if key != "x-delivery-count"} == headers
    assert got.delivery_count == 0
    assert not got.redelivered


@pytest.mark.parametrize("size_bytes", [0, 1, 1 << 20])
async def test_bodies_of_any_size_arrive_whole(broker: Broker, name: str, size_bytes: int) -> None:
    body = bytes(i % 251 for i in range(size_bytes))
    await declare(broker, Queue(name))

    await broker.publish([message(name, body)])
    (got,) = await drain(broker, name, 1)

    assert got.body == body


async def test_messages_arrive_in_the_order_of_their_publishing(broker: Broker, name: str) -> None:
    sent = [str(i) for i in range(500)]
    await declare(broker, Queue(name))

    await send(broker, name, sent[:250])
    await send(broker, name, sent[250:])

    assert bodies(await drain(broker, name, 500)) == sent


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("orders.placed.*", ["orders.placed.07"], ["orders.placed", "orders.placed.07.x", "orders.lost.07"]),
        ("orders.#", ["orders", "orders.a", "orders.a.b.c"], ["order", "x.orders"]),
        ("#", ["a", "a.b"], []),
        ("*", ["a"], ["a.b"]),
        ("#.end", ["end", "a.end", "a.b.end"], ["end.a", "bend"]),
        ("a.#.z", ["a.z", "a.b.z", "a.z.z"], ["a", "z", "a.z.y"]),
        ("a.#.*.z", ["a.b.z", "a.b.c.z"], ["a.z"]),
        ("exact", ["exact"], ["exact.", "Exact"]),
    ],
)
async def test_topic_patterns(broker: Broker, name: str, pattern: str, matching: list[str], others: list[str]) -> None:
    await declare(broker, Queue(name), exchanges=[Exchange(name, "topic")], bindings=[(name, name, pattern)])

    receipts = await broker.publish([message(key, key, exchange=name) for key in matching + others])

    assert receipts == [Receipt.CONFIRMED] * len(matching) + [Receipt.UNROUTABLE] * len(others)
    assert bodies(await drain(broker, name, len(matching))) == matching


async def test_a_direct_exchange_goes_by_the_whole_key_and_a_fanout_by_none(broker: Broker, name: str) -> None:
    one, two, direct, fanout = (f"{name}-{part}" for part in ("one", "two", "direct", "fanout"))
    await declare(
        broker,
        Queue(one),
        Queue(two),
        exchanges=[Exchange(direct, "direct"), Exchange(fanout, "fanout")],
        bindings=[(direct, one, "a.*"), (direct, two, "two"), (fanout, one, ""), (fanout, two, "ignored")],
    )

    receipts = await broker.publish(
        [
            message("a.*", "literal", exchange=direct),
            message("a.b", "nobody", exchange=direct),
            message("two", "second", exchange=direct),
            message("whatever", "both", exchange=fanout),
        ]
    )

    assert receipts == [Receipt.CONFIRMED, Receipt.UNROUTABLE, Receipt.CONFIRMED, Receipt.CONFIRMED]
    assert bodies(await drain(broker, one, 2)) == ["literal", "both"]
    assert bodies(await drain(broker, two, 2)) == ["second", "both"]


async def test_a_queue_gets_a_message_once_however_many_of_its_bindings_match(broker: Broker, name: str) -> None:
    await declare(
        broker,
        Queue(name),
        exchanges=[Exchange(name, "topic")],
        bindings=[(name, name, "a.*"), (name, name, "#"), (name, name, "a.b")],
    )

    await broker.publish([message("a.b", "1", exchange=name), message("a.b", "2", exchange=name)])

    assert bodies(await drain(broker, name, 2)) == ["1", "2"]


async def test_what_an_exchange_cannot_route_goes_to_its_alternate(broker: Broker, name: str) -> None:
    lost, last = f"{name}-lost", f"{name}-last"
    await declare(
        broker,
        Queue(name),
        Queue(lost),
        exchanges=[Exchange(last, "fanout"), Exchange(lost, "direct", alternate=last), Exchange(name, "direct", alternate=lost)],
        bindings=[(name, name, "here"), (last, lost, "")],
    )

    receipts = await broker.publish([message("here", "here", exchange=name), message("gone", "gone", exchange=name)])

    assert receipts == [Receipt.CONFIRMED, Receipt.CONFIRMED]
    assert bodies(await drain(broker, name, 1)) == ["here"]
    assert [got.routing_key for got in await drain(broker, lost, 1)] == ["gone"]


async def test_each_message_of_a_batch_has_its_own_receipt(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    batch = [message(name if i % 3 else f"{name}-nobody", str(i)) for i in range(300)]

    receipts = await broker.publish(batch)

    assert receipts == [Receipt.CONFIRMED if i % 3 else Receipt.UNROUTABLE for i in range(300)]
    assert bodies(await drain(broker, name, 200)) == [str(i) for i in range(300) if i % 3]


async def test_publishing_to_an_exchange_that_does_not_exist_keeps_nothing(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))

    receipts = await broker.publish([message(name, "lost", exchange=f"{name}-missing")])
    await send(broker, name, ["kept"])

    assert receipts == [Receipt.UNROUTABLE]
    assert bodies(await drain(broker, name, 1)) == ["kept"]


async def test_an_empty_batch_is_published_at_once(broker: Broker) -> None:
    assert list(await broker.publish([])) == []


@pytest.mark.parametrize(
    "unsendable",
    [
        {"headers": {"x": math.nan}},
        {"headers": {"x": [math.inf]}},
        {"headers": {"x": 2**63}},
        {"headers": {f"x{i}": "" for i in range(65)}},
        {"headers": {"x": "y" * (17 << 10)}},
        {"headers": {"x" * 256: "y"}},
        {"headers": {"x": [[[[[[[[[]]]]]]]]]}},
        {"message_id": "ü" * 128},
        {"timestamp_s": 253402300800},
        {"timestamp_s": -1},
        {"type": "\ud800"},
        {"body": bytes((16 << 20) + 1)},
    ],
    ids=lambda fields: next(iter(fields)) if isinstance(fields, dict) else None,
)
async def test_what_amqp_cannot_carry_is_refused_and_harms_no_neighbour(
    broker: Broker, name: str, unsendable: dict[str, object]
) -> None:
    await declare(broker, Queue(name))

    receipts = await broker.publish([message(name, "1"), message(name, **unsendable), message(name, "3")])  # type: ignore[arg-type]

    assert receipts == [Receipt.CONFIRMED, Receipt.REFUSED, Receipt.CONFIRMED]
    assert bodies(await drain(broker, name, 2)) == ["1", "3"]


async def test_applying_the_same_topology_again_passes_and_keeps_what_is_there(broker: Broker, server: Server, name: str) -> None:
    queue = Queue(name, delivery_limit=7, dead_letter_exchange="", dead_letter_routing_key="d", message_ttl_ms=60_000)
    exchange = Exchange(name, "topic", alternate="somewhere")
    await declare(broker, queue, exchanges=[exchange], bindings=[(name, name, "#")])
    await send(broker, name, ["kept"])

    async with server.connect() as other:
        await declare(other, queue, exchanges=[exchange], bindings=[(name, name, "#")])

    assert bodies(await drain(broker, name, 1)) == ["kept"]


async def test_a_different_declaration_is_refused_naming_everything_that_differs(broker: Broker, name: str) -> None:
    queue, exchange = f"{name}-queue", f"{name}-exchange"
    await declare(broker, Queue(queue, message_ttl_ms=1000), exchanges=[Exchange(exchange, "topic")])
    await send(broker, queue, [])

    with pytest.raises(TopologyError) as caught:
        await declare(broker, Queue(queue, message_ttl_ms=2000), exchanges=[Exchange(exchange, "direct")])

    text = str(caught.value)
    for part in (queue, "ttl", "1000", "2000", exchange, "topic", "direct", "delete it"):
        assert part in text
    await declare(broker, Queue(queue, message_ttl_ms=1000), exchanges=[Exchange(exchange, "topic")])


async def test_depth_counts_what_is_ready(broker: Broker, name: str) -> None:
    await declare(broker, Queue(name))
    assert await broker.depth(name) == 0

    await send(broker, name, ["1", "2", "3"])
    assert await broker.depth(name) == 3

    await drain(broker, name, 3)
    assert await broker.depth(name) == 0


async def test_the_depth_of_no_queue_is_a_usage_error_naming_it(broker: Broker, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        await broker.depth(name)
