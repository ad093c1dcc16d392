"""Payment alone: the tests place and cancel orders."""

from __future__ import annotations

import logging
from collections import Counter
from uuid import UUID

import pytest

from services import payment
from services.payment import Rules
from services.shared.events import OrderCancelled, OrderPlaced, PaymentAuthorized, PaymentDeclined
from tests.services.shop import CUSTOMER, Shop, order, until_handled, until_stats

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

ROWS = "select state, amount_cents, reason, times, reversals from payment order by order_id"


def cancellation(number: int) -> OrderCancelled:
    return OrderCancelled(order_id=UUID(int=number), customer_id=CUSTOMER, reason="test")


@pytest.mark.parametrize(
    ("placed", "refusal"),
    [
        (order(1, cents=500_000), None),
        (order(1, cents=500_001), "over-limit"),
        (order(1, customer=UUID(int=96)), None),
        (order(1, customer=UUID(int=97 * 5)), "customer-blocked"),
    ],
)
def test_an_order_is_declined_by_its_amount_or_its_customer(placed: OrderPlaced, refusal: str | None) -> None:
    assert Rules().refusal(placed) == refusal


def test_a_rule_can_be_set_and_switched_off() -> None:
    assert Rules(limit_cents=10).refusal(order(1, cents=11)) == "over-limit"
    assert Rules(block_every=0).refusal(order(1, customer=UUID(int=97))) is None


def test_the_same_tries_time_out_in_every_run_and_about_as_many_as_asked() -> None:
    rules = Rules(flaky=0.3)
    tries = [(UUID(int=number), attempt) for number in range(500) for attempt in (1, 2)]

    failed = [rules.times_out(*each) for each in tries]

    assert failed == [Rules(flaky=0.3).times_out(*each) for each in tries]
    assert 250 < sum(failed) < 350


def test_a_poisoned_order_times_out_at_every_try() -> None:
    rules = Rules(poison=0.1)

    fates = [{rules.times_out(UUID(int=number), attempt) for attempt in range(1, 9)} for number in range(500)]

    assert all(len(fate) == 1 for fate in fates)
    assert 25 < sum(True in fate for fate in fates) < 75


async def test_each_order_is_answered_as_its_row_says(shop: Shop) -> None:
    async with shop.running(payment.bus):
        await shop.place(order(1, cents=700), order(2, cents=500_001), order(3, customer=UUID(int=97)))
        await shop.until_heard(PaymentAuthorized, 1)
        await shop.until_heard(PaymentDeclined, 2)

        assert await shop.rows(ROWS) == [
            ("authorized", 700, None, 1, 0),
            ("declined", 500_001, "over-limit", 1, 0),
            ("declined", 1_000, "customer-blocked", 1, 0),
        ]
    assert PaymentAuthorized(order_id=UUID(int=1), amount_cents=700) in shop.heard
    assert PaymentDeclined(order_id=UUID(int=2), reason="over-limit") in shop.heard


async def test_a_cancelled_order_is_refunded_only_if_it_was_paid(shop: Shop) -> None:
    async with shop.running(payment.bus):
        await shop.place(order(1), order(2, cents=500_001))
        await until_handled(payment.bus, 2)

        await shop.say(cancellation(1), cancellation(2))
        await until_handled(payment.bus, 4)

        assert await shop.rows(ROWS) == [("refunded", 1_000, None, 1, 1), ("declined", 500_001, "over-limit", 1, 1)]


async def test_a_cancellation_that_comes_first_leaves_nothing_to_pay(shop: Shop) -> None:
    async with shop.running(payment.bus):
        await shop.say(cancellation(1))
        await shop.until_rows(ROWS, [("void", 0, None, 0, 1)])

        await shop.place(order(1), order(2))
        await shop.until_heard(PaymentAuthorized, 1)

        assert await shop.rows(ROWS) == [("void", 0, None, 1, 1), ("authorized", 1_000, None, 1, 0)]
    assert [event for event in shop.heard if isinstance(event, (PaymentAuthorized, PaymentDeclined))] == [
        PaymentAuthorized(order_id=UUID(int=2), amount_cents=1_000)
    ]


async def test_a_doubled_effect_stays_visible_and_charges_nothing_again(shop: Shop) -> None:
    async with shop.running(payment.bus):
        await shop.say(order(1))
        await shop.say(order(1, cents=2_000))
        await shop.until_rows(ROWS, [("authorized", 1_000, None, 2, 0)])

        await shop.say(cancellation(1), cancellation(1))
        await shop.until_rows(ROWS, [("refunded", 1_000, None, 2, 2)])


async def test_a_flaky_gateway_delays_orders_and_loses_none(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "services.payment")
    monkeypatch.setenv("PAYMENT_FLAKY", "0.2")
    numbers = range(1, 201)
    rules = Rules(flaky=0.2)
    timeouts = sum(_failed_tries(rules, UUID(int=number)) for number in numbers)
    assert timeouts > 20
    assert max(_failed_tries(rules, UUID(int=number)) for number in numbers) < 6

    async with shop.running(payment.bus):
        await shop.place(*(order(number) for number in numbers))
        await shop.until_heard(PaymentAuthorized, 200)

        assert (payment.bus.stats.failed, payment.bus.stats.parked) == (timeouts, 0)
        assert await shop.rows("select state, times, count(*) from payment group by 1, 2") == [("authorized", 1, 200)]
    assert shop.count(PaymentAuthorized) == 200
    told = Counter(vars(record)["order.id"] for record in caplog.records if record.name == "services.payment")
    assert told == {UUID(int=n): tries for n in numbers if (tries := _failed_tries(rules, UUID(int=n)))}


async def test_a_poisoned_order_is_parked_and_nobody_else_is_hurt(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAYMENT_POISON", "0.05")
    numbers = range(1, 101)
    rules = Rules(poison=0.05)
    poisoned = {str(UUID(int=number)) for number in numbers if rules.times_out(UUID(int=number), 1)}
    assert poisoned

    async with shop.running(payment.bus):
        await shop.place(*(order(number) for number in numbers))
        await shop.until_heard(PaymentAuthorized, 100 - len(poisoned))
        await until_stats(payment.bus, lambda stats: stats.parked == len(poisoned))

        assert payment.bus.stats.failed == 6 * len(poisoned)
        assert await shop.rows("select count(*) from payment") == [(100 - len(poisoned),)]
        letters = shop.broker.messages("payment.orders.placed.dlq")
    assert {letter.properties.headers["ob-error"] for letter in letters} == {"GatewayTimeout"}
    assert {letter.properties.headers["ob-reason"] for letter in letters} == {"retries-exhausted"}
    assert {str(letter.properties.headers["ob-error-text"]).split()[-1] for letter in letters} == poisoned


def _failed_tries(rules: Rules, order_id: UUID) -> int:
    attempt = 1
    while rules.times_out(order_id, attempt):
        attempt += 1
    return attempt - 1
