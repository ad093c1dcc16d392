"""The aggregator alone: the tests speak for payment and inventory."""

from __future__ import annotations

from itertools import permutations
from uuid import UUID

import pytest

from orderbus import Bus, Event
from services import aggregator
from services.aggregator import Said, outcome
from services.shared.events import (
    OrderCancelled,
    OrderConfirmed,
    PaymentAuthorized,
    PaymentDeclined,
    StockRejected,
    StockReserved,
)
from tests.services.shop import CUSTOMER, Shop, order, until_handled

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

ID = UUID(int=1)
PAID = PaymentAuthorized(order_id=ID, amount_cents=1_000)
NOT_PAID = PaymentDeclined(order_id=ID, reason="over-limit")
HELD = StockReserved(order_id=ID)
NOT_HELD = StockRejected(order_id=ID, sku="article-00001", reason="out-of-stock")
CONFIRMED = OrderConfirmed(order_id=ID, customer_id=CUSTOMER, total_cents=1_000)

ORDERS = "select status, reason, payment, stock, finished_at is not null from orders order by order_id"


def cancelled(reason: str) -> OrderCancelled:
    return OrderCancelled(order_id=ID, customer_id=CUSTOMER, reason=reason)


def orders_of_lines(caplog: pytest.LogCaptureFixture) -> list[object]:
    return [vars(record)["order.id"] for record in caplog.records if record.name == "services.aggregator"]


async def say_one_by_one(shop: Shop, *answers: Event) -> None:
    """Each is handled before the next is said."""
    before = aggregator.bus.stats.handled
    for number, answer in enumerate(answers, 1):
        await shop.say(answer)
        await until_handled(aggregator.bus, before + number)


@pytest.mark.parametrize(
    ("payment", "stock", "expected"),
    [
        (None, None, "pending"),
        ("authorized", None, "pending"),
        (None, "reserved", "pending"),
        ("authorized", "reserved", "confirmed"),
        ("declined", None, "cancelled"),
        (None, "rejected", "cancelled"),
        ("declined", "reserved", "cancelled"),
        ("authorized", "rejected", "cancelled"),
        ("declined", "rejected", "cancelled"),
    ],
)
def test_an_order_is_confirmed_by_two_yeses_and_cancelled_by_one_no(payment: str, stock: str, expected: str) -> None:
    assert outcome(Said(payment=payment, stock=stock)) == expected


@pytest.mark.parametrize(
    ("answers", "status", "said"),
    [
        *[(answers, ("confirmed", None, "authorized", "reserved", True), CONFIRMED) for answers in permutations((PAID, HELD))],
        ((NOT_PAID, HELD), ("cancelled", "over-limit", "declined", None, True), cancelled("over-limit")),
        ((HELD, NOT_PAID), ("cancelled", "over-limit", "declined", "reserved", True), cancelled("over-limit")),
        ((NOT_HELD, PAID), ("cancelled", "out-of-stock", None, "rejected", True), cancelled("out-of-stock")),
        ((PAID, NOT_HELD), ("cancelled", "out-of-stock", "authorized", "rejected", True), cancelled("out-of-stock")),
        ((NOT_PAID, NOT_HELD), ("cancelled", "over-limit", "declined", None, True), cancelled("over-limit")),
        ((NOT_HELD, NOT_PAID), ("cancelled", "out-of-stock", None, "rejected", True), cancelled("out-of-stock")),
    ],
)
async def test_answers_finish_an_order_once_in_whichever_order_they_come(
    shop: Shop, answers: tuple[Event, Event], status: tuple[object, ...], said: Event
) -> None:
    async with shop.running(aggregator.bus):
        await shop.place_silently(order(1))

        await say_one_by_one(shop, *answers)

        assert await shop.rows(ORDERS) == [status]
        await shop.until_heard(type(said), 1)
    assert shop.ends(ID) == [said]


@pytest.mark.parametrize("answers", sorted(set(permutations((PAID, PAID, HELD, HELD))), key=str))
async def test_answers_that_come_twice_finish_an_order_once(shop: Shop, answers: tuple[Event, ...]) -> None:
    async with shop.running(aggregator.bus):
        await shop.place_silently(order(1))

        await say_one_by_one(shop, *answers)

        assert await shop.rows(ORDERS) == [("confirmed", None, "authorized", "reserved", True)]
        await shop.until_heard(OrderConfirmed, 1)
    assert shop.count(OrderConfirmed) == 1
    assert shop.count(OrderCancelled) == 0


@pytest.mark.parametrize("late", [PAID, NOT_PAID, HELD, NOT_HELD])
async def test_an_answer_for_a_finished_order_changes_nothing(shop: Shop, late: Event) -> None:
    async with shop.running(aggregator.bus):
        await shop.place_silently(order(1))
        await say_one_by_one(shop, NOT_PAID)
        before = await shop.rows("select * from orders")

        await say_one_by_one(shop, late)

        assert await shop.rows("select * from orders") == before
        await shop.until_heard(OrderCancelled, 1)
    assert shop.count(OrderCancelled) == 1
    assert shop.count(OrderConfirmed) == 0


async def test_an_order_without_an_answer_is_cancelled_at_its_deadline(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ORDER_DEADLINE_S", "0.05")
    await shop.place_silently(order(1), order(2))
    await shop.change("update orders set stored_at = now() + interval '1 hour' where order_id = '" + str(UUID(int=2)) + "'")
    async with shop.running(aggregator.bus):
        await shop.until_heard(OrderCancelled, 1)
        await say_one_by_one(shop, PAID, HELD)

        assert await shop.rows(ORDERS) == [("cancelled", "deadline", None, None, True), ("pending", None, None, None, False)]
    assert shop.ends(ID) == [cancelled("deadline")]
    assert orders_of_lines(caplog) == [ID]


async def test_the_deadline_is_kept_to_the_databases_clock_whatever_the_apis_says(shop: Shop) -> None:
    await shop.place_silently(order(1), order(2))
    late, early = UUID(int=1), UUID(int=2)
    await shop.change(
        f"update orders set placed_at = now() + interval '1 hour', stored_at = now() - interval '61 s' where order_id = '{late}'"
    )
    await shop.change(f"update orders set placed_at = now() - interval '1 hour' where order_id = '{early}'")

    async with shop.running(aggregator.bus):
        await shop.until_heard(OrderCancelled, 1)

    assert await shop.rows("select order_id, status from orders order by 1") == [(late, "cancelled"), (early, "pending")]


async def test_two_processes_cancel_each_overdue_order_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORDER_DEADLINE_S", "0.01")
    twin = Bus("aggregator")
    twin.resource(aggregator.deadline)
    twin.every(1.0)(aggregator.cancel_overdue)
    await shop.place_silently(*(order(number) for number in range(1, 1_201)))

    async with shop.running(aggregator.bus, twin):
        await shop.until_rows("select status, count(*) from orders group by 1", [("cancelled", 1_200)])
        await shop.until_heard(OrderCancelled, 1_200)
        await shop.until_rows("select count(*) from orderbus.outbox", [(0,)])

    assert shop.count(OrderCancelled) == 1_200


async def test_answers_for_the_same_orders_neither_deadlock_nor_miss_each_other(shop: Shop) -> None:
    numbers = range(1, 401)
    async with shop.running(aggregator.bus):
        await shop.place_silently(*(order(number) for number in numbers))
        paid = [PaymentAuthorized(order_id=UUID(int=number), amount_cents=1_000) for number in numbers]
        held = [StockReserved(order_id=UUID(int=number)) for number in reversed(numbers)]

        await shop.say(*(answer for pair in zip(paid, held, strict=True) for answer in pair))

        await shop.until_rows("select status, count(*) from orders group by 1", [("confirmed", 400)])
        await shop.until_heard(OrderConfirmed, 400)
        assert aggregator.bus.stats.waited == 0
    assert shop.count(OrderConfirmed) == 400


async def test_an_answer_for_an_unknown_order_is_parked_and_its_neighbours_are_not(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    await shop.declare(aggregator.bus)
    await shop.place_silently(order(1), order(3))
    known = [PaymentAuthorized(order_id=UUID(int=number), amount_cents=1_000) for number in (1, 3)]
    await shop.say(known[0], PaymentAuthorized(order_id=UUID(int=2), amount_cents=1_000), known[1])
    await shop.until_heard(PaymentAuthorized, 3)

    async with shop.running(aggregator.bus):
        await until_handled(aggregator.bus, 2)
        await shop.until_rows("select payment from orders", [("authorized",), ("authorized",)])

    [letter] = shop.broker.messages("aggregator.answers.dlq")
    assert letter.properties.headers["ob-reason"] == "unknown-order"
    assert str(UUID(int=2)).encode() in letter.body
    assert orders_of_lines(caplog) == [UUID(int=2)]
