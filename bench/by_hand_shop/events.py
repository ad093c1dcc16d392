"""The events: JSON bodies, read and written by msgspec with encoders and decoders that are made once."""

from __future__ import annotations

from typing import ClassVar
from uuid import UUID, uuid4

import msgspec

encode = msgspec.json.Encoder().encode


class Line(msgspec.Struct, frozen=True):
    sku: str
    quantity: int
    unit_cents: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`event_id` is what an inbox knows an event by."""

    topic: ClassVar[str]
    event_id: UUID = msgspec.field(default_factory=uuid4)
    order_id: UUID


class OrderPlaced(Event, frozen=True, kw_only=True):
    topic = "orders.placed"
    customer_id: UUID
    total_cents: int
    lines: tuple[Line, ...]


class PaymentAuthorized(Event, frozen=True, kw_only=True):
    topic = "payments.authorized"
    amount_cents: int


class PaymentDeclined(Event, frozen=True, kw_only=True):
    topic = "payments.declined"
    reason: str


class StockReserved(Event, frozen=True, kw_only=True):
    topic = "inventory.reserved"


class StockRejected(Event, frozen=True, kw_only=True):
    topic = "inventory.rejected"
    sku: str
    reason: str


class OrderConfirmed(Event, frozen=True, kw_only=True):
    topic = "orders.confirmed"
    customer_id: UUID
    total_cents: int


class OrderCancelled(Event, frozen=True, kw_only=True):
    topic = "orders.cancelled"
    customer_id: UUID
    reason: str
