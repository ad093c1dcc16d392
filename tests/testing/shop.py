"""A user's own code: events, and two services that are tested."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import Any

from orderbus import Bus, Event, Park, Retry, RetryLater, Tx


class Placed(Event, topic="shop.placed", key="order_id"):
    order_id: int
    cents: int = 500


class Authorized(Event, topic="shop.authorized", key="order_id"):
    order_id: int
    cents: int


class Declined(Event, topic="shop.declined", key="order_id"):
    order_id: int


class Shipped(Event, topic="shop.shipped", key="order_id"):
    order_id: int


class Gateway(Exception):
    """The bank is away."""


class Shop:
    """Payments answers with Authorized, at once; shipping ships what is authorized."""

    def __init__(self) -> None:
        self.payments = payments = Bus("payments")
        self.shipping = shipping = Bus("shipping")
        self.tries: Counter[int] = Counter()
        self.shipped: list[int] = []
        self.due: Any = None

        @payments.on(Placed, retry=Retry.fixed(3600, attempts=4))
        async def charge(order: Placed, tx: Tx) -> Authorized | Declined | None:
            self.tries[order.order_id] += 1
            if order.cents < 0:
                raise Park("negative-amount")
            if order.cents == 17 and self.tries[order.order_id] <= 3:
                raise Gateway("no answer")
            if order.cents == 18:
                raise Gateway("never an answer")
            if order.cents == 19 and self.tries[order.order_id] == 1:
                raise RetryLater(2 * 3600)
            if order.cents == 20:
                tx.emit(Declined(order_id=order.order_id), due_at=self.due() + timedelta(hours=5))
                return None
            if order.cents > 1000:
                return Declined(order_id=order.order_id)
            return Authorized(order_id=order.order_id, cents=order.cents)

        @shipping.on(Authorized)
        async def ship(order: Authorized) -> Shipped:
            self.shipped.append(order.order_id)
            return Shipped(order_id=order.order_id)

        self.charge, self.ship = charge, ship
