"""TestBus runs a user's buses without servers, and waits until all that follows from an event is done."""

from __future__ import annotations

import time

import anyio
import pytest

from orderbus import Bus, Settings, UnavailableError, UsageError, new_id
from orderbus.testing import StuckError, TestBus
from tests.testing.shop import Authorized, Declined, Placed, Shipped, Shop

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def test_what_follows_from_an_event_is_done_when_it_has_settled(shop: Shop) -> None:
    async with TestBus(shop.payments, shop.shipping) as t:
        await t.publish(Placed(order_id=7))
        await t.settled()

        t.emitted(Authorized, order_id=7)
        [shipped] = t.emitted(Shipped)
        assert shipped == Shipped(order_id=7)
        assert shop.shipped == [7]


async def test_an_event_that_nobody_in_the_test_consumes_counts_as_published(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        await t.publish(Placed(order_id=7, cents=2000))
        await t.settled()

        t.emitted(Declined, times=1)


async def test_three_retries_of_an_hour_pass_at_once(shop: Shop) -> None:
    began = time.monotonic()
    async with TestBus(shop.payments) as t:
        await t.publish(Placed(order_id=7, cents=17))
        await t.settled()

        t.retried(times=3)
        t.emitted(Authorized, times=1)
        assert 3 * 3600 <= t.elapsed_s < 3 * 3600 + 1
    assert time.monotonic() - began < 3600


async def test_a_retry_that_takes_longer_than_the_ladder_does_is_waited_for(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        await t.publish(Placed(order_id=7, cents=19))
        await t.settled()

        t.emitted(Authorized, times=1)
        assert 2 * 3600 <= t.elapsed_s < 3 * 3600 + 1


async def test_a_scheduled_event_is_waited_for_until_it_is_out(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        shop.due = t.now
        await t.publish(Placed(order_id=7, cents=20))
        await t.settled()

        t.emitted(Declined, times=1)
        assert 5 * 3600 - 1 < t.elapsed_s < 5 * 3600 + 2


async def test_without_virtual_patience_it_says_what_is_left(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        shop.due = t.now
        await t.publish(Placed(order_id=7, cents=17))
        await t.publish(Placed(order_id=8, cents=20))

        with pytest.raises(StuckError) as stuck:
            await t.settled(limit_s=60)

    lines = str(stuck.value).splitlines()
    assert lines[0] == "not settled after 60 s of virtual time; there is left:"
    assert "1 waiting for a retry, in ob.retry.3600000ms" in lines[1]
    assert "shop.declined scheduled for " in lines[2]
    assert "payments.shop.placed: try 1 failed and was to be tried again: Gateway: no answer" in lines[3]
    assert "shop.py:" in lines[3]


async def test_a_handler_that_waits_for_a_server_that_never_comes_is_named() -> None:
    bus = Bus("payments")

    @bus.on(Placed)
    async def charge(order: Placed) -> None:
        raise UnavailableError("the bank is away")

    async with TestBus(bus) as t:
        await t.publish(Placed(order_id=7))
        with pytest.raises(StuckError, match="called 1000 times for one event") as stuck:
            await t.settled()

    assert "1 in the hands of payments.shop.placed" in str(stuck.value)
    assert "met a missing server: UnavailableError: the bank is away" in str(stuck.value)


async def test_an_event_that_is_delivered_again_has_one_effect(shop: Shop) -> None:
    async with TestBus(shop.payments, shop.shipping) as t:
        event_id = await t.publish(Placed(order_id=7))
        await t.settled()
        await t.redeliver(event_id)
        await t.settled()

        t.handled(Placed, times=1)
        t.emitted(Authorized, times=1)


async def test_events_of_the_tests_own_transaction_are_emitted(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        async with shop.payments.transaction() as tx:
            tx.emit(Placed(order_id=7))
        await shop.payments.publish(Placed(order_id=8))
        await t.settled()

        t.emitted(Placed, times=2)
        assert {event.order_id for event in t.emitted(Authorized, times=2)} == {7, 8}


async def test_the_bus_is_its_own_again_afterwards(shop: Shop) -> None:
    settings = Settings(broker_url="memory://", relay_batch=7)
    bus = Bus("payments", settings=settings)
    before = dict(vars(bus))

    async def fails() -> None:
        async with TestBus(bus):
            assert not bus.draining
            raise LookupError("as it is")

    with pytest.raises(LookupError, match="as it is"):
        await fails()

    assert bus.draining
    assert {**vars(bus), "receipt": None} == before


async def test_the_buses_are_drained_however_the_test_ends(shop: Shop) -> None:
    async def fails() -> None:
        async with TestBus(shop.payments) as t:
            await t.publish(Placed(order_id=7))
            await t.settled()
            pytest.fail("given up")

    with pytest.raises(pytest.fail.Exception, match=r"^given up$"):
        await fails()

    assert shop.payments.receipt is not None
    assert shop.payments.receipt.clean


async def test_a_cancelled_test_closes_its_buses(shop: Shop) -> None:
    with anyio.move_on_after(5) as scope:
        async with TestBus(shop.payments):
            await anyio.sleep_forever()

    assert scope.cancelled_caught
    assert shop.payments.draining


async def test_an_event_that_nobody_handles_is_refused_with_what_is_handled(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        with pytest.raises(
            UsageError, match=r"Shipped: no bus of this TestBus handles 'shop\.shipped'; they handle shop\.placed"
        ):
            await t.publish(Shipped(order_id=7))


async def test_wrong_uses_say_what_to_do_instead(shop: Shop) -> None:
    with pytest.raises(UsageError, match="give it the bus that is tested"):
        TestBus()
    with pytest.raises(UsageError, match=r"is a str, not an orderbus\.Bus"):
        TestBus("payments")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs real time"):
        await TestBus(shop.payments, database_url="embedded").__aenter__()
    with pytest.raises(UsageError, match="leave it out"):
        await TestBus(shop.payments, database_url="memory://").__aenter__()
    t = TestBus(shop.payments)
    async with t:
        with pytest.raises(UsageError, match="was not published in this test"):
            await t.redeliver(new_id())
        with pytest.raises(UsageError, match="is open already"):
            await TestBus(shop.payments).__aenter__()
    with pytest.raises(UsageError, match="make a new one"):
        await t.__aenter__()


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_in_real_time_it_works_as_well_and_says_so_where_a_wait_is_too_long(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        await t.publish(Placed(order_id=7))
        await t.settled()
        t.emitted(Authorized, order_id=7)

        await t.publish(Placed(order_id=8, cents=17))
        with pytest.raises(StuckError) as stuck:
            await t.settled(limit_s=0.05)

    assert "after 0.05 s of real time" in str(stuck.value)
    assert "this event loop runs in real time, in which a retry takes as long as it says: docs/testing.md" in str(stuck.value)
