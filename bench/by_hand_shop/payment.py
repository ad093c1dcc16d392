"""Payment: says yes or no to each order, once, and gives the money back when the order is cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import os

from faststream.exceptions import RejectMessage

from bench.by_hand_shop.database import FRESH, OUTBOX
from bench.by_hand_shop.events import OrderCancelled, OrderPlaced, PaymentAuthorized, PaymentDeclined, encode
from bench.by_hand_shop.service import Service

LIMIT_CENTS = 500_000
BLOCK_EVERY = 97
FLAKY = float(os.environ.get("PAYMENT_FLAKY", "0"))
TRIES, FIRST_PAUSE_S, LONGEST_PAUSE_S = 6, 0.1, 5.0

service = Service("payment")


@service.on(OrderPlaced)
async def authorize(order: OrderPlaced) -> None:
    refusal = await ask_gateway(order)
    answer: PaymentAuthorized | PaymentDeclined
    if refusal is None:
        state, answer = "authorized", PaymentAuthorized(order_id=order.order_id, amount_cents=order.total_cents)
    else:
        state, answer = "declined", PaymentDeclined(order_id=order.order_id, reason=refusal)
    decision = (order.order_id, state, order.total_cents, refusal)
    await service.execute(_DECIDE, order, *decision, answer.event_id, answer.topic, encode(answer), state)


@service.on(OrderCancelled)
async def refund(order: OrderCancelled) -> None:
    """Where nothing is there yet, a tombstone is left that `authorize` will find."""
    await service.execute(_REFUND, order, order.order_id)


async def ask_gateway(order: OrderPlaced) -> str | None:
    """Why the order is declined. A gateway that does not answer is asked again, outside of any transaction, then given up."""
    for attempt in range(1, TRIES + 1):
        if not _times_out(order, attempt):
            if order.total_cents > LIMIT_CENTS:
                return "over-limit"
            return "customer-blocked" if order.customer_id.int % BLOCK_EVERY == 0 else None
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S))
    raise RejectMessage(requeue=False)  # to the dead letters


def _times_out(order: OrderPlaced, attempt: int) -> bool:
    """As often as in services/payment.py."""
    digest = hashlib.blake2b(order.order_id.bytes + f"try {attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < FLAKY


_DECIDE = f"""\
{FRESH}, decided as (
    insert into payment (order_id, state, amount_cents, reason) select %s, %s, %s, %s from fresh
    on conflict (order_id) do update set times = payment.times + 1
    returning state)
{OUTBOX} select %s, %s, %s from decided where state = %s"""

_REFUND = f"""\
{FRESH} insert into payment (order_id, state, times, reversals) select %s, 'void', 0, 1 from fresh
on conflict (order_id) do update set
    state = case payment.state when 'authorized' then 'refunded' else payment.state end,
    reversals = payment.reversals + 1"""


if __name__ == "__main__":
    service.run()
