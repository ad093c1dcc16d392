"""A bus with keys: what it emits is taken, by whichever way, and what nobody with a key has sent is parked."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import pytest

from orderbus import Bus, Retry, Tx
from orderbus._core.leaving import REASON
from orderbus._core.signing import SIGNATURE
from tests.runtime.world import Cancelled, Log, Paid, Placed, World, open_world, receipt_of, until

pytestmark = pytest.mark.anyio

OLD, NEW = (f"{name}:{base64.b64encode(secret * 32).decode()}" for name, secret in (("old", b"o"), ("new", b"n")))
BEFORE, DURING, AFTER = OLD, f"{NEW},{OLD}", NEW


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_world() as world:
        yield world


def reasons(world: World, queue: str = "shop.orders.placed") -> list[object]:
    return [letter.properties.headers[REASON] for letter in world.parked(queue)]


async def test_every_way_to_emit_is_signed(world: World) -> None:
    bus, log = world.bus(signing_keys=OLD), Log()

    @bus.on(Placed, retry=Retry.none())
    async def placed(event: Placed) -> Paid:
        log(("placed", event.n))
        return Paid(order=event.order, n=event.n)

    @bus.on(Paid, retry=Retry.none())
    async def paid(event: Paid, tx: Tx) -> None:
        log(("paid", event.n))
        tx.emit(Cancelled(order=event.order, n=event.n))

    @bus.on(Cancelled, ordered=True)
    async def cancelled(event: Cancelled) -> None:
        log(("cancelled", event.n))

    async with bus:
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a", n=1))
        await bus.group_commit(lambda tx: tx.emit(Placed(order="b", n=2)))
        await bus.publish(Placed(order="c", n=3))
        await bus.publish_many([Placed(order="d", n=4)])
        await log.reached(12)

    assert sorted(log.lines) == sorted((what, n) for what in ("placed", "paid", "cancelled") for n in (1, 2, 3, 4))
    assert receipt_of(bus).stats.parked == 0


async def test_the_unsigned_and_the_forged_are_parked_and_their_neighbours_are_handled(world: World) -> None:
    bus, forger, log = world.bus(signing_keys=OLD), world.bus("forger", signing_keys=NEW), Log()

    @bus.on(Placed, fuse=10)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus, forger:
        await bus.publish_many([Placed(order="a", n=n) for n in range(10)])
        await world.send(Placed(order="a", n=100))
        await forger.publish(Placed(order="a", n=101))
        await until(lambda: len(world.parked()) == 2)
        await log.reached(10)

    assert sorted(log.lines) == list(range(10))
    assert sorted(map(str, reasons(world))) == ["bad-signature", "unsigned"]


async def test_keys_are_changed_while_messages_are_on_their_way(world: World) -> None:
    """As docs/security.md says: first all verify both, then all sign with the new one, then the old one is taken away."""
    log = Log()

    async def send(keys: str, n: int) -> None:
        producer = world.bus("producer", signing_keys=keys)
        async with producer:
            await producer.publish(Placed(order="a", n=n))

    def consumer(keys: str) -> Bus:
        bus = world.bus(signing_keys=keys)

        @bus.on(Placed)
        async def handle(event: Placed) -> None:
            log(event.n)

        return bus

    async with consumer(BEFORE):
        await send(BEFORE, 0)
        await log.reached(1)
    await send(BEFORE, 1)
    async with consumer(f"{OLD},{NEW}"):
        await send(DURING, 2)
        await log.reached(3)
    await send(DURING, 3)
    async with consumer(AFTER):
        await send(AFTER, 4)
        await log.reached(5)

    assert sorted(log.lines) == [0, 1, 2, 3, 4]
    assert world.parked() == []


async def test_without_keys_nothing_is_signed(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    async with bus:
        pass
    async with world.bus("producer") as producer:
        await producer.publish(Placed(order="a"))

    [message] = world.broker.messages("shop.orders.placed")
    assert SIGNATURE not in message.properties.headers
