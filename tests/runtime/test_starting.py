"""A start without its servers: which, where, since when, what was tried. Real addresses, at which nothing listens."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from orderbus import Bus, Settings, UnavailableError
from orderbus.adapters.memory import MemoryBroker
from tests.runtime.world import Cancelled, Log, Placed, World, receipt_of, until
from tests.servers import free_port

SINCE = r"tried once, for \d+\.\d s since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.anyio
async def test_a_broker_that_is_away_is_named_with_what_was_tried_and_since_when(anyio_backend: str) -> None:
    port = free_port()
    bus = Bus("shop", settings=Settings(broker_url=f"amqp://me:secret@127.0.0.1:{port}/"))

    with pytest.raises(UnavailableError) as raised:
        await bus.__aenter__()

    text = str(raised.value)
    assert re.match(rf"the bus 'shop' can't start: can't connect to RabbitMQ at amqp://127\.0\.0\.1:{port}: .+; {SINCE}: ", text)
    assert text.endswith("to connect to the broker")
    assert "secret" not in text
    assert raised.value.code == "OB801"
    assert bus.draining


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.anyio
async def test_a_database_that_is_away_is_named_with_what_was_tried_and_since_when(anyio_backend: str) -> None:
    port = free_port()
    settings = Settings(broker_url="memory://", database_url=f"postgresql://me:secret@127.0.0.1:{port}/shop")
    bus = Bus("shop", settings=settings)

    with pytest.raises(UnavailableError) as raised:
        await bus.__aenter__()

    text = str(raised.value)
    assert re.match(rf"the bus 'shop' can't start: PostgreSQL at 127\.0\.0\.1:{port}/shop: .+; {SINCE}: ", text)
    assert text.endswith("to connect to the database and to look at its schema")
    assert "secret" not in text
    assert bus.draining


class Refusing:
    """Lets nobody consume one queue, in this many tries, each of which takes so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: str, *, tries: int, after_s: float = 0.0) -> None:
        self.tried = 0
        subscribe = MemoryBroker.subscribe

        @asynccontextmanager
        async def refusing(broker: MemoryBroker, name: str, *, prefetch: int) -> AsyncIterator[Any]:
            if name == queue:
                self.tried += 1
                await anyio.sleep(after_s)
                if self.tried <= tries:
                    raise UnavailableError(f"consuming, queue {name!r}: ACCESS_REFUSED")
            async with subscribe(broker, name, prefetch=prefetch) as subscription:
                yield subscription

        monkeypatch.setattr(MemoryBroker, "subscribe", refusing)


def shop(world: World, log: Log) -> Bus:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    @bus.on(Cancelled)
    async def forget(event: Cancelled) -> None:
        log(event.n)

    return bus


@pytest.mark.anyio
async def test_a_queue_that_can_not_be_consumed_ends_the_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = Refusing(monkeypatch, "shop.orders.cancelled", tries=1, after_s=30)
    log = Log()
    bus = shop(world, log)

    with anyio.fail_after(31), pytest.raises(UnavailableError) as raised:
        await bus.__aenter__()

    assert re.fullmatch(
        rf"the bus 'shop' can't start: consuming, queue 'shop.orders.cancelled': ACCESS_REFUSED; {SINCE}: to consume its queues",
        str(raised.value),
    )
    assert bus.draining
    assert refusing.tried == 1
    await world.send(Placed(order="a"))
    await anyio.sleep(60)
    assert (log.lines, world.ready()) == ([], 1)

    async with bus:
        await log.reached(1)


@pytest.mark.anyio
async def test_a_queue_that_can_not_be_consumed_any_more_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    bus = shop(world, log)

    async with bus:
        refusing = Refusing(monkeypatch, "shop.orders.cancelled", tries=5)
        world.broker.drop_connections()
        await until(lambda: refusing.tried == 6)
        await world.send(Cancelled(order="a"))
        await log.reached(1)

    assert receipt_of(bus).clean


@pytest.mark.anyio
async def test_a_drain_while_a_queue_is_not_consumed_yet_ends_the_start(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    bus = shop(world, log)
    async with bus:
        pass
    Refusing(monkeypatch, "shop.orders.cancelled", tries=0, after_s=5)
    await world.send(Placed(order="a"))

    async def drain() -> None:
        await log.reached(1)
        await bus.drain()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain)
        with anyio.fail_after(60):
            async with bus:
                assert bus.draining

    assert receipt_of(bus).clean


@pytest.mark.anyio
async def test_a_drain_while_the_queues_are_declared_begins_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    bus = shop(world, log)
    apply = MemoryBroker.apply

    async def drained(broker: MemoryBroker, topology: Any) -> None:
        await apply(broker, topology)
        await bus.drain()

    monkeypatch.setattr(MemoryBroker, "apply", drained)

    async with bus:
        await world.send(Placed(order="a"))
        await anyio.sleep(60)

    assert (log.lines, world.ready()) == ([], 1)
    assert receipt_of(bus).clean
