"""Messages that can't be read, and errors that can't be printed: parked at once, and nobody else notices."""

import pytest

from orderbus import Delivery, Park, Retry, new_id
from orderbus._core.ids import uuid7
from orderbus._core.message import MSGPACK
from tests.runtime.world import Log, Noted, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


async def test_the_same_id_with_another_body_is_parked_and_not_taken_for_a_duplicate(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        event_id = await world.send(Placed(order="a", n=1))
        await log.reached(1)
        await world.send(Placed(order="a", n=2), event_id=event_id)
        await until(lambda: world.parked())

    assert log.lines == [1]
    assert world.parked()[0].properties.headers["ob-reason"] == "id-reused"


@pytest.mark.parametrize("reason", [None, 5, "x" * 5000, "lone surrogate \udcff"])
async def test_a_reason_of_any_kind_parks(world: World, reason: object) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        raise Park(reason)

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert str(world.parked()[0].properties.headers["ob-reason"])[:4] == str(reason)[:4]


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text either")


@pytest.mark.parametrize(
    "error", [NoText(), ValueError("name \udcff"), ValueError("x" * 100_000), ExceptionGroup("two", [ValueError(), KeyError()])]
)
async def test_an_error_of_any_kind_can_be_parked(world: World, error: Exception) -> None:
    bus = world.bus()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed) -> None:
        raise error

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert world.parked()[0].properties.headers["ob-error"] == type(error).__name__


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"body": b"not json"}, "undecodable"),
        ({"body": b""}, "undecodable"),
        ({"body": b"\xff\xfe"}, "undecodable"),
        ({"body": b'{"x":' + b"[" * 100_000}, "undecodable"),
        ({"body": b'{"order": 5}'}, "wrong-type"),
        ({"body": b'{"n": 5}'}, "wrong-type"),
        ({"body": b'{"order": "a", "n": 1e999}'}, "wrong-type"),
        ({"body": b'{"order":"' + b"x" * (1 << 20) + b'"}'}, "body-too-large"),
        ({"content_type": "text/plain"}, "unknown-content-type"),
        ({"content_type": MSGPACK}, "wrong-type"),
        ({"message_id": ""}, "no-event-id"),
        ({"message_id": "order-5"}, "no-event-id"),
        ({"type": "orders.unheard-of"}, "unknown-topic"),
        ({"headers": {"ob-attempt": "many"}}, "malformed-attempt"),
        ({"headers": {"ob-attempt": -1}}, "malformed-attempt"),
        ({"headers": {"ob-attempt": True}}, "malformed-attempt"),
        ({"headers": {f"h{n}": "x" for n in range(49)}}, "too-many-headers"),
        ({"headers": {f"h{n}": "x" for n in range(64)}}, "too-many-headers"),
        ({"headers": {f"h{n}": "x" * 700 for n in range(20)}}, "headers-too-large"),
        ({"message_id": str(uuid7(1_000_000, 1))}, "older-than-window"),
    ],
)
async def test_what_can_not_be_read_is_parked_at_once_and_harms_nobody_else(world: World, changes: dict, reason: str) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, concurrency=1)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus:
        poison = world.message(Placed(order="a"), new_id(), **changes)
        await world.broker.publish([poison, world.message(Placed(order="b", n=1), new_id())])
        await log.reached(1)
        await until(lambda: world.parked())

    (letter,) = world.parked()
    assert letter.body == poison.body
    assert letter.properties.headers["ob-reason"] == reason
    assert letter.properties.headers["ob-error-text"]
    assert log.lines == [1]
    assert receipt_of(bus).stats.parked == 1


async def test_an_event_that_refuses_its_own_fields_is_parked(world: World) -> None:
    bus = world.bus()

    @bus.on(Picky)
    async def handle(event: Picky) -> None: ...

    async with bus:
        await world.send(Picky(size=1), body=b'{"size":-1}')
        await world.send(Picky(size=1), body=b'{"size":0}')
        await until(lambda: len(world.parked("shop.picky")) == 2)

    assert [letter.properties.headers["ob-reason"] for letter in world.parked("shop.picky")] == ["wrong-type"] * 2


class Picky(Noted, topic="picky"):
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("negative")
        {1: "one"}[self.size]


async def test_sixty_bytes_short_of_the_limit_of_headers_a_message_is_still_retried_and_parked(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(len(delivery.headers))
        raise CardRefused("ü" * 5000)

    async with bus:
        await world.send(Placed(order="a"), headers={"ob-key": "a", **{f"h{n}": "x" * 200 for n in range(48)}})
        await until(lambda: world.parked())

    headers = world.parked()[0].properties.headers
    assert len(log.lines) == 2
    assert headers["ob-reason"] == "retries-exhausted"
    assert headers["ob-key"] == "a"
    assert headers["h0"] == "x" * 200
    assert len(headers) + int(headers.get("ob-left-out", 0)) >= 57


@pytest.mark.parametrize("name", ["ob-not-before", "ob-first-failed-at"])
@pytest.mark.parametrize("value", [1e300, -1e300, "soon", True, None, 1 << 62])
async def test_a_time_in_a_strangers_header_that_is_none_is_ignored(world: World, name: str, value: object) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt == 1:
            raise CardRefused

    async with bus:
        await world.send(Placed(order="a"), headers={name: value})
        await log.reached(2)

    assert log.lines == [1, 2]


async def test_a_message_without_a_type_is_the_queues_only_event_also_after_the_ladder(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, name="charge", retry=Retry.fixed(2, attempts=2))
    async def handle(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        raise CardRefused

    async with bus:
        await world.send(Placed(order="a"), type="")
        await until(lambda: world.parked("shop.charge"))

    assert log.lines == [1, 2]
    assert world.parked("shop.charge")[0].properties.type == "orders.placed"
