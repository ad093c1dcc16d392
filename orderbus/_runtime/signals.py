"""Running buses as a program: until somebody says stop."""

from __future__ import annotations

import logging
import signal
from contextlib import AsyncExitStack

import anyio
import anyio.abc

from orderbus._runtime.bus import Bus
from orderbus._runtime.stats import DrainReceipt

log = logging.getLogger("orderbus")


async def run_until_signalled(*buses: Bus) -> list[DrainReceipt]:
    """Open the buses, wait for SIGTERM or SIGINT, drain them all at once; their receipts.

    A signal before all are open cancels the opening; then there are receipts of those that were.
    """
    stop, opened, everything = anyio.Event(), anyio.Event(), anyio.CancelScope()
    entered: list[Bus] = []
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        await tasks.start(listen, everything, opened, stop)
        try:
            with everything:
                async with AsyncExitStack() as stack:
                    for bus in buses:
                        await stack.enter_async_context(bus)
                        entered.append(bus)
                    opened.set()
                    await stop.wait()
                    async with anyio.create_task_group() as drains:
                        for bus in buses:
                            drains.start_soon(bus.drain)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            failure = error  # raised outside of the task group, which would wrap it in a group
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return [bus.receipt for bus in entered if bus.receipt is not None]


async def listen(
    everything: anyio.CancelScope, opened: anyio.Event, stop: anyio.Event, *, task_status: anyio.abc.TaskStatus[None]
) -> None:
    """A signal before everything is open cancels the opening: there is nothing to drain yet."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("received %s: %s", signal.Signals(number).name, "draining" if opened.is_set() else "not open yet, leaving")
            stop.set()
            if not opened.is_set():
                everything.cancel()
