"""`orderbus run`: open the buses, run until a signal, drain, and say what the stop did."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

import anyio
import anyio.abc
import msgspec
import typer

from orderbus._runtime.bus import Bus
from orderbus._runtime.collecting import collect_rarely
from orderbus._runtime.stats import DrainReceipt
from orderbus.cli.describing import banner
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.loading import load_buses, settings_of
from orderbus.cli.output import error_console, print_json
from orderbus.errors import UsageError
from orderbus.logs import configure, levels_of
from orderbus.telemetry import exported

EXAMPLE = "Example: orderbus run services.payment:bus services.inventory:bus --loop uvloop --log-json"

Loop = Literal["auto", "asyncio", "uvloop", "trio"]

log = logging.getLogger("orderbus")


@clear_errors
def run(
    targets: Annotated[list[str], typer.Argument(metavar="MODULE:BUS", help="The buses to run, in one process.")],
    loop: Annotated[Loop, typer.Option(help="The event loop; auto is uvloop where it is installed.")] = "auto",
    log_level: Annotated[
        str,
        typer.Option(
            envvar="ORDERBUS_LOG_LEVEL",
            help="The least level that is logged, and those of single loggers: info,orderbus.relay=debug",
        ),
    ] = "info",
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log JSON lines on stdout, in the Elastic Common Schema, and print no banner.")
    ] = False,
) -> None:
    """Run buses until SIGTERM or SIGINT, then drain them.

    Each drained bus prints a receipt, one JSON line on stdout. The exit code is 0 after a clean drain, 3 where work had to be
    cancelled and given back to the broker, 4 where a server was not available at the start.
    """
    levels_of(log_level)
    buses = load_buses(targets)
    name = os.environ.get("OTEL_SERVICE_NAME") or "+".join(bus.group for bus in buses)
    configure(name, levels=log_level, as_json=log_json)
    _check_memory_is_shared(buses)
    backend, options = _backend(loop)
    with exported(name):
        try:
            anyio.run(_run, buses, log_json, backend=backend, backend_options=options)
        finally:
            for bus in buses:
                if bus.receipt is not None:
                    print_json(_as_line(bus.group, bus.receipt))
    if not all(bus.receipt is None or bus.receipt.clean for bus in buses):
        raise typer.Exit(ExitCode.UNCLEAN)


async def _run(buses: Sequence[Bus], quiet: bool) -> None:
    stop, opened = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as everything:
            await tasks.start(_listen, everything, opened, stop)
            async with AsyncExitStack() as stack:
                for bus in buses:
                    await stack.enter_async_context(bus)
                opened.set()
                collect_rarely()
                if not quiet:
                    error_console().print(banner(buses))
                log.info("running: %s", ", ".join(bus.group for bus in buses))
                await stop.wait()
                async with anyio.create_task_group() as drains:
                    for bus in buses:
                        drains.start_soon(bus.drain)
        tasks.cancel_scope.cancel()


async def _listen(
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


def _as_line(group: str, receipt: DrainReceipt) -> dict[str, Any]:
    return {"event": "drained", "group": group, **msgspec.to_builtins(receipt)}


def _backend(loop: Loop) -> tuple[str, dict[str, Any]]:
    if loop == "auto":
        loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
    for needed in ("uvloop", "trio"):
        if loop == needed and importlib.util.find_spec(needed) is None:
            raise UsageError(f"--loop {needed} needs the package {needed}: pip install 'orderbus[{needed}]'", code="OB108")
    return ("trio", {}) if loop == "trio" else ("asyncio", {"use_uvloop": loop == "uvloop"})


def _check_memory_is_shared(buses: Sequence[Bus]) -> None:
    """Each bus opens a broker of its own at `memory://`: two buses would never hear of each other."""
    alone = [bus.group for bus in buses if settings_of(bus).broker_url == "memory://"]
    if len(buses) > 1 and alone:
        raise UsageError(
            f"{', '.join(alone)}: at memory:// each bus has a broker of its own; set ORDERBUS_BROKER_URL=memory://NAME to share one",
            code="OB112",
        )
