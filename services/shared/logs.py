"""The services' logs: JSON lines on stdout unless stderr is a terminal; and the drain's receipt, a JSON line among them.

A line about an order has its id as `order.id`: a random number, and so not about a person.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import msgspec
import orjson
from structlog.contextvars import bind_contextvars, reset_contextvars

from orderbus import Bus
from orderbus.logs import configure

ORDER_ID = "order.id"


def set_up_logs(service: str) -> None:
    """With the levels of ORDERBUS_LOG_LEVEL."""
    configure(os.environ.get("OTEL_SERVICE_NAME") or service, levels=os.environ.get("ORDERBUS_LOG_LEVEL") or "info")


def of_order(order_id: UUID) -> dict[str, object]:
    """The `extra=` of a line about an order."""
    return {ORDER_ID: order_id}  # made a text where a line is written, which is seldom


def bind_order(order_id: UUID) -> None:
    """The rest of the task is about an order, and so are all its lines."""
    bind_contextvars(**of_order(order_id))


@contextmanager
def about_order(order_id: UUID) -> Iterator[None]:
    """All lines that are logged inside, those of libraries too, are about an order."""
    tokens = bind_contextvars(**of_order(order_id))
    try:
        yield
    finally:
        reset_contextvars(**tokens)


def print_receipt(bus: Bus) -> None:
    """What the stop of a bus did, for whoever started the process."""
    if bus.receipt is not None:
        print(orjson.dumps({"event": "drained", "group": bus.group, **_plain(bus.receipt)}).decode(), flush=True)


def _plain(receipt: object) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(receipt)
    return plain
