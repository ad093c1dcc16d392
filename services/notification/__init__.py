"""Notification: tells the customer, once for each event, through the sender that NOTIFY_URL names.

It writes to no database, so a claim in Redis keeps a redelivered event from being sent again. A crash between the sending
and the claim's completion is the one gap left, and no guard can close it: the event's id goes along as the idempotency key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from orderbus import Bus, Delivery, Retry
from services.notification.senders import Notice, Refused, Sender, open_sender
from services.shared.events import OrderCancelled, OrderConfirmed
from services.shared.logs import about_order
from services.shared.settings import from_environment

bus = Bus("notification")

RETRY = Retry.exponential(first=0.5, limit=60.0, attempts=8).never(Refused)


class Notify(msgspec.Struct, frozen=True):
    """NOTIFY_URL: `console:`, `smtp://host:port?to=…`, `webhook:http://…`, or `null:`."""

    url: str = "console:"


@bus.resource
async def sender() -> AsyncIterator[Sender]:
    async with open_sender(from_environment(Notify, "NOTIFY_").url) as opened:
        yield opened


@bus.on(OrderConfirmed, guard="claims", fuse=50, concurrency=2, retry=RETRY)
async def confirmed(order: OrderConfirmed, delivery: Delivery, sender: Sender) -> None:
    text = f"Your order {order.order_id} over {order.total_cents / 100:.2f} is confirmed."
    with about_order(order.order_id):
        await sender.send(Notice(delivery.id, order.customer_id, "Order confirmed", text))


@bus.on(OrderCancelled, guard="claims", fuse=50, concurrency=2, retry=RETRY)
async def cancelled(order: OrderCancelled, delivery: Delivery, sender: Sender) -> None:
    text = f"Your order {order.order_id} is cancelled ({order.reason}). You pay nothing."
    with about_order(order.order_id):
        await sender.send(Notice(delivery.id, order.customer_id, "Order cancelled", text))
