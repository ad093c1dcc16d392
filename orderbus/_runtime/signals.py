"""Running buses as a program: until somebody says stop."""

from __future__ import annotations

import logging
import signal
from contextlib import AsyncExitStack

import anyio

from orderbus._runtime.bus import Bus
from orderbus._runtime.stats import DrainReceipt

log = logging.getLogger("orderbus")


async def run_until_signalled(*buses: Bus) -> list[DrainReceipt]:
    """Open the buses, wait for SIGTERM or SIGINT, drain them all at once; their receipts."""
    async with AsyncExitStack() as stack:
        signals = stack.enter_context(anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT))  # also while they open
        for bus in buses:
            await stack.enter_async_context(bus)
        async for number in signals:
            log.info("received %s: draining", signal.Signals(number).name)
            break
        async with anyio.create_task_group() as drains:
            for bus in buses:
                drains.start_soon(bus.drain)
    return [bus.receipt for bus in buses if bus.receipt is not None]
