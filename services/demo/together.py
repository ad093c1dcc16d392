"""All six services in one process: the memory broker needs no server, and PostgreSQL is real."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack

import anyio

from orderbus import collect_rarely
from orderbus.adapters import memory
from orderbus.telemetry import exported
from services import aggregator, inventory, notification, orders_api, outbox_dispatcher, payment
from services.demo import queues
from services.orders_api.serve import serve
from services.shared.logs import print_receipt, set_up_logs

BUSES = (outbox_dispatcher.bus, payment.bus, inventory.bus, aggregator.bus, notification.bus, orders_api.bus)


async def main() -> None:
    """Run until SIGTERM or SIGINT. The API stops first, the dispatcher last, so that what was begun flows out."""
    async with AsyncExitStack() as stack:
        for bus in BUSES:
            await stack.enter_async_context(bus)
        if os.environ.get(queues.TELL):
            broker = await stack.enter_async_context(memory.open_broker(os.environ["ORDERBUS_BROKER_URL"], name="demo"))
            await stack.enter_async_context(queues.telling(broker, queues.of_buses(BUSES)))
        collect_rarely()
        host, port = os.environ.get("ORDERS_API_HOST", "127.0.0.1"), int(os.environ.get("ORDERS_API_PORT", "8000"))
        await serve(orders_api.bus, host, port)
    for bus in BUSES:
        print_receipt(bus)


if __name__ == "__main__":
    set_up_logs("orders")
    with exported("orders"):
        anyio.run(main, backend_options={"use_uvloop": True})
