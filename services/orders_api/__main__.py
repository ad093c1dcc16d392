"""`python -m services.orders_api`: ORDERS_API_HOST and ORDERS_API_PORT say where, 127.0.0.1:8000 unless set."""

from __future__ import annotations

import os

import anyio

from orderbus import collect_rarely
from orderbus.telemetry import exported
from services.orders_api.serve import serve
from services.orders_api.service import bus
from services.shared.logs import print_receipt, set_up_logs


async def main() -> None:
    """Open the bus, serve, drain."""
    async with bus:
        collect_rarely()
        await serve(bus, os.environ.get("ORDERS_API_HOST", "127.0.0.1"), int(os.environ.get("ORDERS_API_PORT", "8000")))
    print_receipt(bus)


if __name__ == "__main__":
    set_up_logs(bus.group)
    with exported(bus.group):
        anyio.run(main, backend_options={"use_uvloop": True})
