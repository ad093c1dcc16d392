"""The services' logs: JSON lines on stdout unless stderr is a terminal; and the drain's receipt, a JSON line among them."""

from __future__ import annotations

import os

import msgspec
import orjson

from orderbus import Bus
from orderbus.logs import configure


def set_up_logs(service: str) -> None:
    """With the levels of ORDERBUS_LOG_LEVEL."""
    configure(os.environ.get("OTEL_SERVICE_NAME") or service, levels=os.environ.get("ORDERBUS_LOG_LEVEL") or "info")


def print_receipt(bus: Bus) -> None:
    """What the stop of a bus did, for whoever started the process."""
    if bus.receipt is not None:
        print(orjson.dumps({"event": "drained", "group": bus.group, **_plain(bus.receipt)}).decode(), flush=True)


def _plain(receipt: object) -> dict[str, object]:
    plain: dict[str, object] = msgspec.to_builtins(receipt)
    return plain
