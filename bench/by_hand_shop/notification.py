"""Notification: tells the customer, once for each event. It writes to no database, so a key in Redis marks what was sent.

The key is set before the sending: a process that dies in between leaves a customer untold, and one that fails takes it back.
"""

from __future__ import annotations

import logging
import os
from uuid import UUID

from redis.asyncio import Redis

from bench.by_hand_shop.events import Event, OrderCancelled, OrderConfirmed
from bench.by_hand_shop.service import Service

KEEP_S = 24 * 3600
PREFIX = os.environ.get("SHOP_REDIS_PREFIX", "shop:")
SILENT = os.environ.get("NOTIFY_URL") == "null:"

service = Service("notification", connections=0)
redis = Redis.from_url(os.environ["SHOP_REDIS_URL"], socket_timeout=5)
log = logging.getLogger("shop")


@service.on(OrderConfirmed)
async def confirmed(order: OrderConfirmed) -> None:
    await _tell_once(order, order.customer_id, f"Your order {order.order_id} over {order.total_cents / 100:.2f} is confirmed.")


@service.on(OrderCancelled)
async def cancelled(order: OrderCancelled) -> None:
    await _tell_once(order, order.customer_id, f"Your order {order.order_id} is cancelled ({order.reason}). You pay nothing.")


async def _tell_once(event: Event, customer_id: UUID, text: str) -> None:
    key = f"{PREFIX}notified:{event.event_id}"
    if not await redis.set(key, 1, nx=True, ex=KEEP_S):
        return
    try:
        await send(customer_id, text)
    except Exception:
        await redis.delete(key)
        raise


async def send(customer_id: UUID, text: str) -> None:
    if not SILENT:
        log.info("to customer %s: %s", customer_id, text)


if __name__ == "__main__":
    service.run()
