"""Aggregator: puts the answers of payment and inventory together, and finishes each order once.

One statement an answer: the row's lock makes the later of two see the earlier one, and a finished order is not matched again.
"""

from __future__ import annotations

import asyncio
import logging

from bench.by_hand_shop.database import FRESH, OUTBOX
from bench.by_hand_shop.events import (
    OrderCancelled,
    OrderConfirmed,
    PaymentAuthorized,
    PaymentDeclined,
    StockRejected,
    StockReserved,
)
from bench.by_hand_shop.service import Service

DEADLINE_S = 60

service = Service("aggregator")


@service.on(PaymentAuthorized)
async def payment_authorized(answer: PaymentAuthorized) -> None:
    await service.execute(_AUTHORIZED, answer, answer.order_id)


@service.on(StockReserved)
async def stock_reserved(answer: StockReserved) -> None:
    await service.execute(_RESERVED, answer, answer.order_id)


@service.on(PaymentDeclined)
async def payment_declined(answer: PaymentDeclined) -> None:
    await service.execute(_DECLINED, answer, answer.reason, answer.order_id)


@service.on(StockRejected)
async def stock_rejected(answer: StockRejected) -> None:
    await service.execute(_REJECTED, answer, answer.reason, answer.order_id)


async def cancel_overdue() -> None:
    """Once a second: orders whose answers stay away."""
    while True:
        await asyncio.sleep(1)
        try:
            async with service.pool.connection() as connection:
                await connection.execute(_OVERDUE, (DEADLINE_S,))
        except Exception:
            logging.getLogger("shop").exception("overdue orders were not cancelled")


_CONFIRMED = f"""\
{OUTBOX} select event_id, '{OrderConfirmed.topic}', convert_to(json_build_object(
    'event_id', event_id, 'order_id', order_id, 'customer_id', customer_id, 'total_cents', total_cents)::text, 'UTF8')
from (select gen_random_uuid() as event_id, * from agreed where status = 'confirmed') as confirmed"""

_CANCELLED = f"""\
{OUTBOX} select event_id, '{OrderCancelled.topic}', convert_to(json_build_object(
    'event_id', event_id, 'order_id', order_id, 'customer_id', customer_id, 'reason', reason)::text, 'UTF8')
from (select gen_random_uuid() as event_id, * from refused) as cancelled"""

_AGREED = f"""\
{FRESH}, agreed as (
    update orders set {{mine}} = '{{word}}', {{mine}}_at = clock_timestamp(),
        status = case when {{other}} is null then 'pending' else 'confirmed' end,
        finished_at = case when {{other}} is null then null else clock_timestamp() end
    from fresh where order_id = %s and status = 'pending'
    returning order_id, customer_id, total_cents, status)
{_CONFIRMED}"""
_AUTHORIZED = _AGREED.format(mine="payment", word="authorized", other="stock")
_RESERVED = _AGREED.format(mine="stock", word="reserved", other="payment")

_REFUSED = f"""\
{FRESH}, refused as (
    update orders set {{mine}} = '{{word}}', {{mine}}_at = clock_timestamp(),
        status = 'cancelled', reason = %s, finished_at = clock_timestamp()
    from fresh where order_id = %s and status = 'pending'
    returning order_id, customer_id, reason)
{_CANCELLED}"""
_DECLINED = _REFUSED.format(mine="payment", word="declined")
_REJECTED = _REFUSED.format(mine="stock", word="rejected")

_OVERDUE = f"""\
with refused as (
    update orders set status = 'cancelled', reason = 'deadline', finished_at = clock_timestamp()
    where order_id in (
        select order_id from orders
        where status = 'pending' and stored_at < now() - make_interval(secs => %s)
        order by stored_at limit 500 for update skip locked)
    returning order_id, customer_id, reason)
{_CANCELLED}"""


if __name__ == "__main__":
    service.run(cancel_overdue)
