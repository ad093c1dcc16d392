"""Aggregator: puts the answers of payment and inventory together, and finishes each order once.

An order is confirmed when both said yes and cancelled as soon as one says no, or when an answer stays away too long.
A cancellation is an event like any other: payment refunds and inventory releases on it, whichever comes first, so the
aggregator has nothing to compensate itself. Answers for a finished order change nothing.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import Annotated
from uuid import UUID

import msgspec
from opentelemetry.metrics import get_meter

from orderbus import Batch, Bus, Column, Delivery, Tx, columns
from services.shared.events import (
    OrderCancelled,
    OrderConfirmed,
    PaymentAuthorized,
    PaymentDeclined,
    StockRejected,
    StockReserved,
)
from services.shared.logs import of_order
from services.shared.settings import from_environment

log = logging.getLogger("services.aggregator")

bus = Bus("aggregator")

Answer = PaymentAuthorized | PaymentDeclined | StockReserved | StockRejected
Finished = list[OrderConfirmed | OrderCancelled]


class Deadline(msgspec.Struct, frozen=True):
    """ORDER_DEADLINE_S: how long an order may wait for its answers, in seconds."""

    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0


@bus.resource
async def deadline() -> AsyncIterator[Deadline]:
    yield from_environment(Deadline, "ORDER_")


class Decided(msgspec.Struct, frozen=True):
    """An order that a batch finishes, for the metrics."""

    status: str
    reason: str | None
    total_cents: int
    age_s: float


_decided: ContextVar[list[Decided]] = ContextVar("decided")

REASONS = frozenset(
    {"over-limit", "customer-blocked", "out-of-stock", "no-quantity", "unknown-article", "deadline", "unknown", "none"}
)
"""What a metric may be labelled with: a reason is text from another service."""
FINISHED = get_meter("orders").create_counter("orders.finished", "{order}", "Orders that came to their end.")
PENDING = get_meter("orders").create_gauge("orders.pending", "{order}", "Orders that have not come to their end.")
REVENUE = get_meter("orders").create_counter("orders.revenue", "{cent}", "The totals of confirmed orders.")
END_TO_END = get_meter("orders").create_histogram(
    "orders.end_to_end",
    "s",
    "From the placing of an order to its end.",
    explicit_bucket_boundaries_advisory=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)


@bus.middleware
async def count_what_is_finished(deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None:
    """Count what a unit has finished, once it is committed."""
    decided: list[Decided] = []
    token = _decided.set(decided)
    try:
        await call_next()
    finally:
        _decided.reset(token)
    for one in decided:
        _count(one)


def _count(one: Decided) -> None:
    reason = one.reason or "none"
    FINISHED.add(1, {"order.status": one.status, "order.reason": reason if reason in REASONS else "other"})
    END_TO_END.record(max(one.age_s, 0.0), {"order.status": one.status})
    if one.status == "confirmed":
        REVENUE.add(one.total_cents)


# All answers in one queue: those about the same order often come together, and then cost one update.
@bus.on_batch(name="answers", most=200)
async def answered(batch: Batch[PaymentAuthorized | PaymentDeclined | StockReserved | StockRejected], tx: Tx) -> Finished:
    """Lock the orders, write down what was said, and finish those that are decided.

    The lock makes the later of two answers see the earlier one, and lets an order finish once.
    """
    orders = {row[0]: row for row in await tx.fetch_all(_LOCK, [Column({event.order_id for event in batch.events})])}
    decided = _decided.get([])
    said: dict[UUID, Said] = {}
    for item in batch:
        order = orders.get(item.event.order_id)
        if order is None:
            about = {**of_order(item.event.order_id), "event.id": str(item.delivery.id)}
            log.error("an answer for an order that there isn't: %s", type(item.event).__name__, extra=about)
            item.park("unknown-order")
        elif order[3] == "pending":
            before = said.get(item.event.order_id) or Said(payment=order[4], stock=order[5])
            said[item.event.order_id] = before.heard(item.event)
    finished: Finished = []
    written: list[tuple[UUID, str, str | None, str | None, str | None]] = []
    for order_id, heard in said.items():
        status = outcome(heard)
        written.append((order_id, status, heard.payment, heard.stock, heard.reason))
        customer_id, total_cents = orders[order_id][1:3]
        if status != "pending":
            decided.append(Decided(status, heard.reason, total_cents, orders[order_id][6]))
        if status == "confirmed":
            finished.append(OrderConfirmed(order_id=order_id, customer_id=customer_id, total_cents=total_cents))
        elif status == "cancelled":
            finished.append(OrderCancelled(order_id=order_id, customer_id=customer_id, reason=heard.reason or "unknown"))
    if written:
        await tx.execute(_WRITE, columns(written))
    return finished


@bus.every(1.0)
async def cancel_overdue(deadline: Deadline) -> None:
    """Cancel orders whose answers stay away."""
    async with bus.transaction() as tx:
        overdue = await tx.fetch_all(_CANCEL_OVERDUE, (deadline.deadline_s,))
        for order_id, customer_id, _ in overdue:
            tx.emit(OrderCancelled(order_id=order_id, customer_id=customer_id, reason="deadline"))
    for order_id, _, age_s in overdue:
        log.warning("cancelled: after %.0f s it has no two answers", age_s, extra=of_order(order_id))
        _count(Decided("cancelled", "deadline", 0, age_s))


@bus.every(10.0)
async def count_pending(tx: Tx) -> None:
    """How many orders are under way, for the metrics."""
    row = await tx.fetch_one("select count(*) from (select from orders where status = 'pending' limit 100000) as pending")
    assert row is not None
    PENDING.set(int(row[0]))


class Said(msgspec.Struct, frozen=True):
    """What is known of an order's two answers."""

    payment: str | None = None
    stock: str | None = None
    reason: str | None = None

    def heard(self, answer: Answer) -> Said:
        """With one more answer. The first word stands."""
        match answer:
            case PaymentAuthorized():
                return Said(self.payment or "authorized", self.stock, self.reason)
            case PaymentDeclined():
                return self if self.payment else Said("declined", self.stock, self.reason or answer.reason)
            case StockReserved():
                return Said(self.payment, self.stock or "reserved", self.reason)
            case StockRejected():
                return self if self.stock else Said(self.payment, "rejected", self.reason or answer.reason)


def outcome(said: Said) -> str:
    """The status of an order of which this is known.

    >>> outcome(Said(payment="authorized")), outcome(Said(stock="rejected"))
    ('pending', 'cancelled')
    """
    if said.payment == "declined" or said.stock == "rejected":
        return "cancelled"
    return "confirmed" if said.payment and said.stock else "pending"


# In the order of their keys, so that two batches with the same orders wait for each other instead of deadlocking.
_LOCK = """\
select order_id, customer_id, total_cents, status, payment, stock, extract(epoch from now() - placed_at)::float8
from orders where order_id = any(%s::uuid[]) order by order_id for update"""

_WRITE = """\
update orders set
    status = said.status,
    reason = said.reason,
    payment = said.payment,
    payment_at = case when said.payment is not null then coalesce(orders.payment_at, clock_timestamp()) end,
    stock = said.stock,
    stock_at = case when said.stock is not null then coalesce(orders.stock_at, clock_timestamp()) end,
    finished_at = case when said.status <> 'pending' then clock_timestamp() end
from unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::text[])
    as said (order_id, status, payment, stock, reason)
where orders.order_id = said.order_id"""

# Every process of the group runs it: each takes rows that no other has. By the time at which this database stored them: by that of an
# API whose clock is behind, they would be overdue when they come.
_CANCEL_OVERDUE = """\
update orders set status = 'cancelled', reason = 'deadline', finished_at = clock_timestamp()
where order_id in (
    select order_id from orders
    where status = 'pending' and stored_at < now() - make_interval(secs => %s)
    order by stored_at limit 500 for update skip locked)
returning order_id, customer_id, extract(epoch from now() - stored_at)::float8"""
