"""The assertions of a TestBus read as sentences, and say what there was instead."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from orderbus import UsageError
from orderbus.testing import TestBus
from tests.testing.shop import Authorized, Declined, Placed, Shipped, Shop

pytestmark = pytest.mark.anyio


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
async def t(shop: Shop, anyio_backend: Any) -> AsyncIterator[TestBus]:
    """After five orders: 1 and 2 are paid and shipped, 3 is declined, 4 is parked by the handler, 5 after all its tries."""
    async with TestBus(shop.payments, shop.shipping) as t:
        for order_id, cents in ((1, 500), (2, 700), (3, 5000), (4, -1), (5, 18)):
            await t.publish(Placed(order_id=order_id, cents=cents))
        await t.settled()
        yield t


def failure_of(claim: Callable[[], object]) -> list[str]:
    with pytest.raises(AssertionError) as failed:
        claim()
    return str(failed.value).splitlines()


async def test_what_is_claimed_and_so_is_returned(t: TestBus, shop: Shop) -> None:
    assert sorted(event.cents for event in t.emitted(Authorized)) == [500, 700]
    assert t.emitted(Authorized, order_id=2) == [Authorized(order_id=2, cents=700)]
    assert len(t.emitted(times=5)) == 5
    [handled] = t.handled(shop.charge, order_id=3)
    assert (handled.handler, handled.attempt, handled.event) == ("payments.shop.placed", 1, Placed(order_id=3, cents=5000))
    assert len(t.handled(Placed, times=3)) == len(t.handled("payments.shop.placed", times=3))
    assert [one.attempt for one in t.retried(times=3)] == [1, 2, 3]
    assert {type(one.error).__name__ for one in t.retried(Placed)} == {"Gateway"}
    [letter] = t.parked(reason="negative-amount")
    assert (letter.handler, letter.attempts, letter.error) == ("payments.shop.placed", 1, "Park")
    t.parked(shop.charge, reason="retries-exhausted", order_id=5, times=1)
    t.parked(times=2)


async def test_an_event_that_was_not_emitted_fails_with_the_nearest_first_and_the_errors(t: TestBus) -> None:
    lines = failure_of(lambda: t.emitted(Authorized, order_id=2, cents=500))

    assert lines[0] == "no Authorized with order_id=2, cents=500 was emitted"
    assert set(lines[1:3]) == {
        "  Authorized(order_id=1, cents=500): order_id is 1, not 2",
        "  Authorized(order_id=2, cents=700): cents is 700, not 500",
    }
    assert set(lines[3:6]) == {"  Shipped(order_id=1)", "  Shipped(order_id=2)", "  Declined(order_id=3)"}
    parked, exhausted = sorted(lines[6:])
    assert parked.startswith("  payments.shop.placed: try 1 failed and was parked: Park: ")
    assert exhausted.startswith("  payments.shop.placed: try 4 failed and was parked: Gateway: never an answer (")
    assert "shop.py:" in exhausted


async def test_too_many_are_counted_and_shown(t: TestBus) -> None:
    assert failure_of(lambda: t.emitted(Shipped, times=1))[0] == "Shipped was emitted twice, not once"
    assert failure_of(lambda: t.emitted(Declined, times=0))[0] == "Declined was emitted once, and should never have been"
    assert failure_of(t.nothing_emitted)[0] == "event was emitted 5 times, and should never have been"
    assert failure_of(lambda: t.retried(times=4))[:2] == [
        "event was retried 3 times, not 4 times",
        "  Placed(order_id=5, cents=18) retried by payments.shop.placed at try 1 after Gateway",
    ]


async def test_what_was_parked_for_another_reason_is_named(t: TestBus) -> None:
    lines = failure_of(lambda: t.parked(Placed, reason="undecodable", order_id=4))

    assert lines[:3] == [
        "no Placed with order_id=4 was parked for 'undecodable'",
        "  Placed(order_id=4, cents=-1): negative-amount: its reason is 'negative-amount', not 'undecodable'",
        "  Placed(order_id=5, cents=18): retries-exhausted: its reason is 'retries-exhausted', not 'undecodable', "
        "order_id is 5, not 4",
    ]
    assert failure_of(t.nothing_parked)[0] == "event was parked twice, and should never have been"


async def test_what_was_not_handled_shows_what_became_of_it(t: TestBus, shop: Shop) -> None:
    lines = failure_of(lambda: t.handled(shop.charge, order_id=4))

    assert lines[0] == "no event of charge with order_id=4 was handled"
    assert lines[1] == "  Placed(order_id=4, cents=-1) parked by payments.shop.placed at try 1 after Park"
    assert lines[2].endswith(", not 4")


async def test_a_wrong_name_is_an_error_and_no_failed_test(t: TestBus) -> None:
    with pytest.raises(UsageError, match="Authorized has no field 'order'; did you mean 'order_id'"):
        t.emitted(Authorized, order=7)
    with pytest.raises(UsageError, match="Placed has no field 'total'; it has order_id, cents"):
        t.handled("payments.shop.placed", total=7)
    with pytest.raises(UsageError, match=r"did you mean 'shipping\.shop\.authorized'\?"):
        t.retried("shiping.shop.authorised")
    with pytest.raises(UsageError, match="no handler of this TestBus; there is payments"):
        t.cost(print)
    with pytest.raises(UsageError, match="need the event class"):
        t.parked(order_id=4)
    with pytest.raises(UsageError, match="is a whole number"):
        t.emitted(Authorized, times=-1)


async def test_of_many_the_first_ten_are_shown(shop: Shop) -> None:
    async with TestBus(shop.payments) as t:
        for order_id in range(15):
            await t.publish(Placed(order_id=order_id))
        await t.settled()

        lines = failure_of(lambda: t.emitted(Authorized, order_id=99))
        assert len(lines) == 12
        assert lines[-1] == "  … and 5 more"
