"""The events that the services exchange. All of one order carry its id as their key."""

from __future__ import annotations

from uuid import UUID

import msgspec

from orderbus import Event


class Line(msgspec.Struct, frozen=True):
    """So many pieces of an article, at a price in cents each."""

    sku: str
    quantity: int
    unit_cents: int


class OrderPlaced(Event, topic="orders.placed", key="order_id"):
    order_id: UUID
    customer_id: UUID
    total_cents: int
    lines: tuple[Line, ...]


class PaymentAuthorized(Event, topic="payments.authorized", key="order_id"):
    order_id: UUID
    amount_cents: int


class PaymentDeclined(Event, topic="payments.declined", key="order_id"):
    order_id: UUID
    reason: str


class StockReserved(Event, topic="inventory.reserved", key="order_id"):
    order_id: UUID


class StockRejected(Event, topic="inventory.rejected", key="order_id"):
    order_id: UUID
    sku: str
    reason: str


class OrderConfirmed(Event, topic="orders.confirmed", key="order_id"):
    order_id: UUID
    customer_id: UUID
    total_cents: int


class OrderCancelled(Event, topic="orders.cancelled", key="order_id"):
    order_id: UUID
    customer_id: UUID
    reason: str
