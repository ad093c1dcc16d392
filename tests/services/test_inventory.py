"""Inventory alone: the tests place and cancel orders. There are five articles of 100 pieces each."""

from __future__ import annotations

import random
from uuid import UUID

import pytest

from orderbus import Bus
from services import inventory
from services.shared.database import sku
from services.shared.events import Line, OrderCancelled, OrderPlaced, StockRejected, StockReserved
from tests.services.shop import CUSTOMER, Shop, order, until, until_handled

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

ROWS = "select state, pieces, sku, reason, times, reversals from reservation order by order_id"
LEFT = "select available from stock order by sku"
NOT_ADDING_UP = """
    select sku, available, initial from stock
    left join (
        select key as sku, sum(value::int) as pieces
        from reservation, jsonb_each_text(pieces) where state = 'held' group by 1
    ) as held using (sku)
    where available < 0 or available <> initial - coalesce(pieces, 0)"""


def cancellation(number: int) -> OrderCancelled:
    return OrderCancelled(order_id=UUID(int=number), customer_id=CUSTOMER, reason="test")


def basket(number: int, *pieces: tuple[int, int]) -> OrderPlaced:
    """An order of several lines, each an article's number and how many pieces of it."""
    lines = tuple(Line(sku=sku(article), quantity=quantity, unit_cents=1) for article, quantity in pieces)
    return OrderPlaced(order_id=UUID(int=number), customer_id=CUSTOMER, total_cents=1, lines=lines)


async def test_what_is_there_is_held_and_what_is_short_is_rejected_with_its_article(shop: Shop) -> None:
    async with shop.running(inventory.bus):
        await shop.say(basket(1, (1, 60), (2, 1)), basket(2, (2, 1), (1, 60)), basket(3, (1, 40)))
        await until_handled(inventory.bus, 3)

        assert await shop.rows(ROWS) == [
            ("held", {sku(1): 60, sku(2): 1}, None, None, 1, 0),
            ("rejected", {}, sku(1), "out-of-stock", 1, 0),
            ("held", {sku(1): 40}, None, None, 1, 0),
        ]
        assert await shop.rows(LEFT) == [(0,), (99,), (100,), (100,), (100,)]
        await shop.until_heard(StockReserved, 2)
        await shop.until_heard(StockRejected, 1)
    assert StockRejected(order_id=UUID(int=2), sku=sku(1), reason="out-of-stock") in shop.heard


@pytest.mark.parametrize(
    ("placed", "reason"),
    [(basket(1, (99, 1)), "unknown-article"), (basket(1, (1, 0)), "no-quantity"), (basket(1, (1, 60), (1, 60)), "out-of-stock")],
)
async def test_what_can_not_be_held_is_rejected_with_its_reason(shop: Shop, placed: OrderPlaced, reason: str) -> None:
    async with shop.running(inventory.bus):
        await shop.say(placed)
        await shop.until_heard(StockRejected, 1)

        assert await shop.rows(LEFT) == [(100,)] * 5
    assert [event.reason for event in shop.heard if isinstance(event, StockRejected)] == [reason]


async def test_a_cancelled_order_gives_its_pieces_back_once(shop: Shop) -> None:
    async with shop.running(inventory.bus):
        await shop.say(basket(1, (1, 60), (2, 5)), basket(2, (1, 60)))
        await until_handled(inventory.bus, 2)

        await shop.say(cancellation(1), cancellation(2))
        await until_handled(inventory.bus, 4)
        await shop.say(cancellation(1))
        await until_handled(inventory.bus, 5)

        assert await shop.rows("select state, times, reversals from reservation order by order_id") == [
            ("released", 1, 2),
            ("rejected", 1, 1),
        ]
        assert await shop.rows(LEFT) == [(100,)] * 5


async def test_a_cancellation_that_comes_first_leaves_nothing_to_hold(shop: Shop) -> None:
    async with shop.running(inventory.bus):
        await shop.say(cancellation(1))
        await shop.until_rows(ROWS, [("void", {}, None, None, 0, 1)])

        await shop.say(order(1), order(2))
        await until_handled(inventory.bus, 3)

        assert await shop.rows("select state, times, reversals from reservation order by order_id") == [
            ("void", 1, 1),
            ("held", 1, 0),
        ]
        assert await shop.rows(LEFT) == [(99,), (100,), (100,), (100,), (100,)]
        await shop.until_heard(StockReserved, 1)
    assert [event for event in shop.heard if isinstance(event, (StockReserved, StockRejected))] == [
        StockReserved(order_id=UUID(int=2))
    ]


async def test_a_doubled_effect_stays_visible_takes_nothing_again_and_is_answered_again(shop: Shop) -> None:
    async with shop.running(inventory.bus):
        await shop.say(order(1, quantity=10), order(2, quantity=101))
        await until_handled(inventory.bus, 2)

        await shop.say(order(1, quantity=10), order(2, quantity=1))
        await shop.until_heard(StockReserved, 2)
        await shop.until_heard(StockRejected, 2)

        assert await shop.rows("select state, times from reservation order by order_id") == [("held", 2), ("rejected", 2)]
        assert await shop.rows(LEFT) == [(90,), (100,), (100,), (100,), (100,)]
    rejected = StockRejected(order_id=UUID(int=2), sku=sku(1), reason="out-of-stock")
    assert [event for event in shop.heard if isinstance(event, StockRejected)] == [rejected, rejected]


async def test_two_processes_never_oversell(shop: Shop) -> None:
    twin = Bus("inventory")
    twin.on_batch(OrderPlaced, most=20, concurrency=2)(inventory.reserve)
    twin.on_batch(OrderCancelled, most=20, concurrency=2)(inventory.release)
    rng = random.Random(7)
    orders = [
        basket(number, *((article, rng.randint(1, 4)) for article in rng.sample(range(1, 6), k=rng.randint(1, 4))))
        for number in range(1, 601)
    ]
    cancelled = rng.sample(range(1, 601), k=150)
    together = [*orders, *map(cancellation, cancelled)]
    rng.shuffle(together)

    await shop.declare(inventory.bus)
    for start in range(0, len(together), 50):
        await shop.say(*together[start : start + 50])
    await shop.until_rows("select count(*) from orderbus.outbox", [(0,)])

    async with shop.running(twin, inventory.bus):  # the other takes 400 at once, and could be done before this one is open

        async def look() -> tuple[bool, object]:
            return inventory.bus.stats.handled + twin.stats.handled == len(together), (inventory.bus.stats, twin.stats)

        await until(look)

        assert inventory.bus.stats.handled > 0
        assert twin.stats.handled > 0
        assert [(stats.waited, stats.failed) for stats in (inventory.bus.stats, twin.stats)] == [(0, 0)] * 2
    assert await shop.rows(NOT_ADDING_UP) == []
    assert await shop.rows("select count(*), max(times), min(times), max(reversals), sum(reversals) from reservation") == [
        (600, 1, 1, 1, 150)
    ]
    assert await shop.rows(
        "select state in ('released', 'void', 'rejected') from reservation where reversals = 1 group by 1"
    ) == [(True,)]
    assert await shop.rows("select min(available) < 4 from stock") == [(True,)]
