"""Handlers that write to no database, guarded by a claim: once under duplicates, whatever happens to Redis."""

import anyio
import pytest

from orderbus import Delivery, Park, Retry, UsageError, new_id
from orderbus.abc import ClaimState
from tests.runtime.faults import ClaimsFaults
from tests.runtime.world import Log, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class MailServerSaidNo(Exception):
    pass


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ClaimsFaults:
    return ClaimsFaults(monkeypatch)


async def test_an_event_delivered_again_and_again_is_handled_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", concurrency=5)
    async def mail(event: Placed, delivery: Delivery) -> None:
        log(event.n)
        await anyio.sleep(1)

    async with bus:
        event_id = new_id()
        for _ in range(5):
            await world.send(Placed(order="a"), event_id=event_id)
        await until(lambda: bus.stats.duplicates == 4)

    assert log.lines == [0]
    assert receipt_of(bus).stats.handled == 1
    assert world.parked() == []


async def test_the_same_event_twice_in_one_unit_is_handled_once(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", fuse=10, concurrency=1)
    async def mail(event: Placed) -> None:
        log(event.n)

    async with bus:
        event_id = new_id()
        messages = [world.message(Placed(order="a"), event_id)] * 3
        await world.broker.publish([*messages, world.message(Placed(order="a", n=1), new_id())])
        await until(lambda: bus.stats.duplicates == 2)

    assert sorted(log.lines) == [0, 1]


async def test_two_processes_share_the_claims(world: World) -> None:
    log, buses = Log(), [world.bus(), world.bus()]
    for bus in buses:

        @bus.on(Placed, guard="claims")
        async def mail(event: Placed) -> None:
            log(event.n)
            await anyio.sleep(1)

    async with buses[0], buses[1]:
        event_id = new_id()
        for _ in range(10):
            await world.send(Placed(order="a"), event_id=event_id)
        await until(lambda: sum(bus.stats.duplicates for bus in buses) == 9)

    assert log.lines == [0]


async def test_a_failure_gives_the_claim_up_and_the_retry_gets_it(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", retry=Retry.fixed(0.1, attempts=3))
    async def mail(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt < 3:
            raise MailServerSaidNo

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(3)

    assert log.lines == [1, 2, 3]
    assert log.waits == pytest.approx([0.1, 0.1], abs=0.01)


async def test_failures_in_a_unit_do_not_touch_the_others_of_it(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", fuse=10, concurrency=1, retry=Retry.fixed(0.1, attempts=2))
    async def mail(event: Placed) -> None:
        log(event.n)
        if event.n == 1:
            raise Park("no such address")
        if event.n == 2:
            raise MailServerSaidNo

    async with bus:
        await world.broker.publish([world.message(Placed(order="a", n=n), new_id()) for n in range(4)])
        await until(lambda: len(world.parked()) == 2)

    assert sorted(log.lines) == [0, 1, 2, 2, 3]
    assert receipt_of(bus).stats.handled == 2


async def test_the_same_id_with_another_body_is_parked(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", fuse=5, concurrency=1)
    async def mail(event: Placed) -> None:
        log(event.n)

    async with bus:
        event_id = new_id()
        await world.broker.publish([world.message(Placed(order="a", n=n), event_id) for n in (1, 2)])
        await until(lambda: world.parked())

    assert log.lines == [1]
    assert world.parked()[0].properties.headers["ob-reason"] == "id-reused"


async def test_what_another_process_holds_is_waited_for_without_counting(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", retry=Retry.none())
    async def mail(event: Placed) -> None:
        log(event.n)

    event_id = new_id()
    key = f"inbox:shop.orders.placed:{event_id}"
    async with bus:
        body_hash = _hash_of(world.message(Placed(order="a"), event_id).body)
        (answer,) = await world.claims.claim([(key, body_hash)], "somebody else", 20_000)
        assert answer.state is ClaimState.GRANTED
        await world.send(Placed(order="a"), event_id=event_id)
        await log.reached(1)

    assert log.times[0] == pytest.approx(20, abs=1)
    assert world.parked() == []


async def test_a_handler_that_the_drain_cancels_gives_its_claim_up(world: World) -> None:
    bus, log = world.bus(grace_s=0.5), Log()

    @bus.on(Placed, guard="claims", timeout=60)
    async def mail(event: Placed) -> None:
        log(event.n)
        await anyio.sleep(0 if len(log.lines) > 1 else 50)

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(1)
    async with bus:
        await log.reached(2)

    assert log.waits[0] < 1


async def test_claims_that_are_away_are_waited_for_without_counting(world: World, faults: ClaimsFaults) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", retry=Retry.none())
    async def mail(event: Placed) -> None:
        log(event.n)

    async with bus:
        faults.away = {"claim", "complete", "release"}
        await world.send(Placed(order="a"))
        await anyio.sleep(100)
        assert log.lines == []
        faults.away = set()
        await log.reached(1)

    assert world.parked() == []


async def test_a_handler_that_ran_while_redis_went_away_is_not_run_again(world: World, faults: ClaimsFaults) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", retry=Retry.none(), fuse=5, concurrency=1)
    async def mail(event: Placed) -> None:
        log(event.n)
        faults.away = {"claim", "complete", "release"}

    async with bus:
        await world.broker.publish([world.message(Placed(order="a", n=n), new_id()) for n in range(3)])
        await log.reached(3)
        await anyio.sleep(300)
        faults.away = set()
        await until(lambda: bus.stats.handled == 3)
        await anyio.sleep(300)

    assert sorted(log.lines) == [0, 1, 2]
    assert world.ready() == 0


async def test_a_failure_while_redis_is_away_is_retried_once_its_lease_has_ended(world: World, faults: ClaimsFaults) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="claims", retry=Retry.fixed(0.1, attempts=2), timeout=10)
    async def mail(event: Placed, delivery: Delivery) -> None:
        log(delivery.attempt)
        if delivery.attempt == 1:
            faults.away = {"release"}
            raise MailServerSaidNo

    async with bus:
        await world.send(Placed(order="a"))
        await log.reached(2)

    assert log.lines == [1, 2]
    assert log.waits[0] == pytest.approx(15, abs=1)
    assert world.parked() == []


async def test_a_claim_that_ran_out_meanwhile_is_said_loudly(
    world: World, faults: ClaimsFaults, caplog: pytest.LogCaptureFixture
) -> None:
    bus = world.bus()

    @bus.on(Placed, guard="claims", timeout=10)
    async def mail(event: Placed) -> None:
        faults.away = {"complete"}

    async with bus:
        event_id = await world.send(Placed(order="a"))
        await anyio.sleep(100)
        faults.away = set()
        await until(lambda: bus.stats.handled == 1)

    (line,) = [vars(one) for one in caplog.records if one.name == "orderbus.guard" and one.levelname == "ERROR"]
    assert line["message"] == f"event {event_id}: the claim of shop.orders.placed ran out before it was done"
    assert (line["event.id"], line["orderbus.consumer"]) == (str(event_id), "shop.orders.placed")
    assert line["orderbus.queue"] == "shop.orders.placed"


async def test_handlers_without_any_guard_run_as_often_as_the_broker_delivers(world: World) -> None:
    bus, log = world.bus(), Log()

    @bus.on(Placed, guard="none", fuse=4, retry=Retry.fixed(0.1, attempts=2))
    async def mail(event: Placed) -> None:
        log(event.n)
        if event.n == 1:
            raise MailServerSaidNo

    async with bus:
        event_id = new_id()
        for n in (0, 0, 0, 1):
            await world.send(Placed(order="a", n=n), event_id=event_id)
        await until(lambda: world.parked())

    assert sorted(log.lines) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("guard", ["claims", "none"])
async def test_an_event_that_has_no_outbox_to_go_to_is_an_error_and_not_lost_in_silence(world: World, guard: str) -> None:
    bus = world.bus()

    @bus.on(Placed, guard=guard, retry=Retry.none())
    async def mail(event: Placed):
        return Paid(order="a")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert "returned an event, but it runs without a database" in str(world.parked()[0].properties.headers["ob-error-text"])


async def test_no_guard_gives_no_transaction(world: World) -> None:
    bus = world.bus()

    @bus.on(Placed, guard="none")
    async def mail(event: Placed) -> Paid | None: ...

    with pytest.raises(UsageError, match=r'mail \(.*guard="none" gives no transaction; drop Tx and the returned events'):
        await bus.__aenter__()


async def test_the_buses_claims_are_there_for_keys_of_ones_own(world: World) -> None:
    bus = world.bus()

    async with bus:
        first, second = [(await bus.claims.claim([("key", "body")], token, 1000))[0].state for token in ("one", "two")]

    assert (first, second) == (ClaimState.GRANTED, ClaimState.IN_PROGRESS)


def _hash_of(body: bytes) -> str:
    from orderbus._core.codec import body_hash

    return str(body_hash(body))
