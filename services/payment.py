"""Payment: says yes or no to each order, once, and gives the money back when the order is cancelled."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator
from typing import Annotated
from uuid import UUID

import msgspec

from orderbus import Batch, Bus, Column, Retry, Tx, columns
from services.shared.events import OrderCancelled, OrderPlaced, PaymentAuthorized, PaymentDeclined
from services.shared.logs import of_order
from services.shared.settings import from_environment

log = logging.getLogger("services.payment")

bus = Bus("payment")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Rules(msgspec.Struct, frozen=True):
    """Whom the gateway refuses, and how badly it behaves. Each is `PAYMENT_` + its name in the environment."""

    limit_cents: int = 500_000
    """A larger order is declined."""
    block_every: int = 97
    """Stands for a block list: customers whose number this divides are declined; 0 blocks nobody."""
    flaky: Share = 0.0
    """The share of tries that time out: the same ones in every run."""
    poison: Share = 0.0
    """The share of orders that time out at every try, and end in the dead letters."""

    def refusal(self, order: OrderPlaced) -> str | None:
        """Why the order is declined; None where it is not."""
        if order.total_cents > self.limit_cents:
            return "over-limit"
        if self.block_every and order.customer_id.int % self.block_every == 0:
            return "customer-blocked"
        return None

    def times_out(self, order_id: UUID, attempt: int) -> bool:
        """Whether the gateway gives no answer to this try."""
        return _draw(order_id, "poison") < self.poison or _draw(order_id, f"try {attempt}") < self.flaky


class GatewayTimeout(Exception):
    """The gateway gave no answer in time."""


@bus.resource
async def rules() -> AsyncIterator[Rules]:
    yield from_environment(Rules, "PAYMENT_")


@bus.on_batch(OrderPlaced, most=200, retry=Retry.exponential(first=0.1, limit=5.0, attempts=6))
async def authorize(batch: Batch[OrderPlaced], tx: Tx, rules: Rules) -> list[PaymentAuthorized | PaymentDeclined]:
    """Decide a batch with one statement. What is answered is what the row then holds, which is not always what was decided."""
    rows: list[tuple[UUID, str, int, str | None]] = []
    for item in batch:
        order = item.event
        if rules.times_out(order.order_id, item.delivery.attempt):
            about = {**of_order(order.order_id), "event.id": str(item.delivery.id)}
            log.info("the gateway gave no answer to try %d", item.delivery.attempt, extra=about)
            item.retry(GatewayTimeout(f"no answer for order {order.order_id}"))
            continue
        refusal = rules.refusal(order)
        rows.append((order.order_id, "declined" if refusal else "authorized", order.total_cents, refusal))
    if not rows:
        return []
    answers: list[PaymentAuthorized | PaymentDeclined] = []
    for order_id, state, amount_cents, reason in await tx.fetch_all(_DECIDE, columns(rows)):
        if state == "authorized":
            answers.append(PaymentAuthorized(order_id=order_id, amount_cents=amount_cents))
        elif state == "declined":
            answers.append(PaymentDeclined(order_id=order_id, reason=reason))
    return answers


@bus.on_batch(OrderCancelled, most=200)
async def refund(batch: Batch[OrderCancelled], tx: Tx) -> None:
    """Refund what was authorized; where nothing is there yet, leave a tombstone that `authorize` will find."""
    await tx.execute(_REFUND, [Column(order.order_id for order in batch.events)])


_DECIDE = """\
insert into payment (order_id, state, amount_cents, reason)
select * from unnest(%s::uuid[], %s::text[], %s::bigint[], %s::text[])
on conflict (order_id) do update set times = payment.times + 1
returning order_id, state, amount_cents, reason"""

_REFUND = """\
insert into payment (order_id, state, times, reversals)
select order_id, 'void', 0, 1 from unnest(%s::uuid[]) as order_id
on conflict (order_id) do update set
    state = case payment.state when 'authorized' then 'refunded' else payment.state end,
    reversals = payment.reversals + 1"""


def _draw(order_id: UUID, what: str) -> float:
    """A number of [0, 1) that is always the same for the same order and question."""
    digest = hashlib.blake2b(order_id.bytes + what.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
