"""Relays that share the outbox, die, stop, and wait for servers."""

from collections.abc import Sequence

import anyio
import pytest

from orderbus import UnavailableError
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import BUCKETS
from tests.runtime.faults import StoreFaults
from tests.runtime.relaying import emit, heard, listen, numbers, relay
from tests.runtime.world import Log, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


async def test_two_relays_share_the_buckets_and_together_publish_everything_once(world: World) -> None:
    await listen(world)
    held: dict[str, frozenset[int]] = {}
    lease = world.store.outbox.lease

    async def seen(owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        held[owner] = await lease(owner, lease_s, keep)
        return held[owner]

    world.store.outbox.lease = seen
    async with relay(world, "one"), relay(world, "two"):
        await until(lambda: len(held) == 2 and all(len(buckets) == BUCKETS // 2 for buckets in held.values()))
        for n in range(10):
            await emit(world, *(Placed(order=f"key{k}", n=n) for k in range(40)))
            await anyio.sleep(0.1)
        await until(lambda: len(heard(world)) >= 400)
        await anyio.sleep(30)

    assert not held["one"] & held["two"]
    assert len(heard(world)) == 400
    for k in range(40):
        assert numbers(world, f"key{k}") == list(range(10))


async def test_a_relay_that_died_is_replaced_when_its_lease_has_ended(world: World) -> None:
    await listen(world)
    async with relay(world, "one", relay_lease_s=10):
        await anyio.sleep(5)
    died_at = anyio.current_time()
    await emit(world, *(Placed(order=f"key{k}") for k in range(40)))

    async with relay(world, "two", relay_lease_s=10):
        await until(lambda: len(heard(world)) == 40)

    assert 5 <= anyio.current_time() - died_at <= 15


async def test_a_relay_that_stopped_gives_its_buckets_back_at_once(world: World) -> None:
    await listen(world)
    async with world.bus():
        await anyio.sleep(5)
    stopped_at = anyio.current_time()
    await emit(world, *(Placed(order=f"key{k}") for k in range(40)))

    async with relay(world, "two"):
        await until(lambda: len(heard(world)) == 40)

    assert anyio.current_time() - stopped_at <= 0.5


async def test_a_relay_whose_lease_is_nearly_over_publishes_nothing_before_it_is_renewed(world: World) -> None:
    await listen(world)
    log = Log()
    read, lease, publish = world.store.outbox.read, world.store.outbox.lease, world.broker.publish

    async def slow_read(*arguments: object) -> object:
        page = await read(*arguments)
        if page.rows and not log.lines:
            log("slow read")
            await anyio.sleep(8)
        return page

    async def logged_lease(*arguments: object) -> frozenset[int]:
        log("lease")
        return await lease(*arguments)

    async def logged_publish(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        log("publish")
        return await publish(batch)

    async with relay(world, relay_lease_s=10):
        await anyio.sleep(1)
        world.store.outbox.read, world.store.outbox.lease, world.broker.publish = slow_read, logged_lease, logged_publish
        await emit(world, Placed(order="a"))
        await until(lambda: heard(world))

    assert log.lines == ["slow read", "lease", "publish"]


async def test_a_relay_whose_database_takes_longer_to_answer_than_a_lease_lasts_publishes_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await listen(world)
    asked: list[float] = []
    lease = world.store.outbox.lease

    async def slow(owner: str, lease_s: float, keep: Sequence[int] | None) -> frozenset[int]:
        asked.append(lease_s)
        held = await lease(owner, lease_s, keep)
        await anyio.sleep(1.6 if len(asked) < 20 else 0.01)
        return held

    world.store.outbox.lease = slow
    await emit(world, *(Placed(order=f"key{k}") for k in range(40)))
    async with relay(world, "one", relay_lease_s=1):
        await until(lambda: len(heard(world)) == 40)
        assert asked[:2] == pytest.approx([1, 6.4], abs=0.1)
        await until(lambda: len(asked) == 22)

    assert asked[-1] == 1
    assert [record.getMessage() for record in caplog.records if "took" in record.getMessage()] == [
        "the lease of 1 s took 1.6 s to renew, so nothing could be published under it; the next one is longer"
    ]


async def test_a_relay_waits_for_a_database_with_back_off_and_goes_on_where_it_was(world: World) -> None:
    await listen(world)
    faults = StoreFaults(world.store)
    asked = Log()

    def counted() -> None:
        asked("asked")
        if faults.is_away:
            raise UnavailableError("the database is away")

    faults.check = counted
    faults.is_away = True
    async with relay(world):
        await anyio.sleep(60)
        tries = len(asked.lines)
        faults.is_away = False
        await emit(world, Placed(order="a"))
        await until(lambda: heard(world))

    assert 12 <= tries <= 32


async def test_a_blocked_broker_holds_the_relay_up_and_loses_nothing(world: World) -> None:
    bus = world.bus(grace_s=2)
    await listen(world)

    async with bus:
        world.broker.block()
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a"))
        await anyio.sleep(60)
        assert heard(world) == []
        world.broker.unblock()
        await until(lambda: heard(world))
        world.broker.block()
        async with bus.transaction() as tx:
            tx.emit(Placed(order="b"))
        await anyio.sleep(1)

    assert not receipt_of(bus).clean
    assert receipt_of(bus).seconds == pytest.approx(2, abs=0.5)
    assert len(world.store.outbox.rows()) == 1


async def test_a_bus_that_relays_nothing_leaves_the_rows_to_others(world: World) -> None:
    bus = world.bus(relay=False)
    await listen(world)

    async with bus:
        async with bus.transaction() as tx:
            tx.emit(Placed(order="a"))
        await anyio.sleep(60)
        assert len(world.store.outbox.rows()) == 1
        async with relay(world):
            await until(lambda: heard(world))
