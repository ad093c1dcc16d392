"""`orderbus run`: open the buses, run until a signal, drain, and say what the stop did."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Literal

import anyio
import msgspec
import typer

from orderbus._runtime.bus import Bus
from orderbus._runtime.collecting import collect_rarely
from orderbus._runtime.opening import scheme_of
from orderbus._runtime.signals import listen
from orderbus._runtime.stats import DrainReceipt
from orderbus.cli.describing import banner
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.loading import load_buses, settings_of
from orderbus.cli.output import error_console, print_json
from orderbus.cli.risks import risks
from orderbus.cli.workers import Workers
from orderbus.errors import UsageError
from orderbus.logs import configure, levels_of
from orderbus.telemetry import exported

EXAMPLE = "Example: orderbus run services.payment:bus services.inventory:bus --loop uvloop --log-json"

Loop = Literal["auto", "asyncio", "uvloop", "trio"]

MOST_WORKERS = 64

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
    workers: Annotated[int, typer.Option(min=1, max=MOST_WORKERS, help="So many processes, each with all the buses.")] = 1,
    reload: Annotated[
        bool, typer.Option("--reload", help="Drain and begin again when a .py file below this folder changes. For development.")
    ] = False,
    worker: Annotated[int | None, typer.Option(hidden=True, help="Which of several workers this process is.")] = None,
) -> None:
    """Run buses until SIGTERM or SIGINT, then drain them. Risky settings are warned of at the start.

    Each drained bus prints a receipt, one JSON line on stdout. The exit code is 0 after a clean drain, 3 where work had to be
    cancelled and given back to the broker, 4 where a server was not available at the start.

    With `--workers`, one that dies is replaced after 1 to 30 s; where one fails to start at the beginning, all are
    stopped. When the process that started them dies, they drain.
    """
    levels_of(log_level)
    buses = load_buses(targets)
    name = os.environ.get("OTEL_SERVICE_NAME") or "+".join(bus.group for bus in buses)
    configure(name, levels=log_level, as_json=log_json)
    _check_memory_is_shared(buses)
    backend, options = _backend(loop)
    if worker is None and (workers > 1 or reload):
        if workers > 1:
            _check_can_be_several(buses)
        command = [sys.executable, "-m", "orderbus", "run", *targets, "--loop", loop, "--log-level", log_level]
        code = anyio.run(Workers([*command, *(["--log-json"] if log_json else [])], workers, reload=reload).run)
        raise typer.Exit(code)
    is_first = not worker
    if is_first:
        _warn(buses)
    with exported(name):
        try:
            quiet = log_json or not is_first
            anyio.run(_run, buses, quiet, worker is not None, backend=backend, backend_options=options)
        finally:
            _print_receipts(buses)
    if not all(bus.receipt is None or bus.receipt.clean for bus in buses):
        raise typer.Exit(ExitCode.UNCLEAN)


async def _run(buses: Sequence[Bus], quiet: bool, is_worker: bool) -> None:
    stop, opened = anyio.Event(), anyio.Event()
    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as everything:
            await tasks.start(listen, everything, opened, stop)
            if is_worker:
                tasks.start_soon(_end_with_parent)
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


async def _end_with_parent() -> None:
    """Stdin is a pipe that only the process which started the workers writes to, and it never does."""
    await anyio.wait_readable(sys.stdin)
    log.warning("the process that started this worker is gone")
    os.kill(os.getpid(), signal.SIGTERM)


def _warn(buses: Sequence[Bus]) -> None:
    for warning in dict.fromkeys(warning for bus in buses for warning in risks(bus, settings_of(bus))):
        logging.getLogger("orderbus.risks").warning("%s", warning)


def _print_receipts(buses: Sequence[Bus]) -> None:
    """Where nobody reads stdout any more, the exit code still says how the drains went."""
    try:
        for bus in buses:
            if bus.receipt is not None:
                print_json(_as_line(bus.group, bus.receipt))
    except OSError as error:
        log.warning("the receipts can't be printed: %s", error)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what is left in the old one's buffer would fail once more at the exit


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


def _check_can_be_several(buses: Sequence[Bus]) -> None:
    for bus in buses:
        settings = settings_of(bus)
        for name, url in (("BROKER", settings.broker_url), ("DATABASE", settings.database_url)):
            if url is not None and scheme_of(url) == "memory":
                raise UsageError(
                    f"--workers: ORDERBUS_{name}_URL is {url}, which each process would have for itself; use a server",
                    code="OB618",
                )
    if "prometheus" in os.environ.get("OTEL_METRICS_EXPORTER", ""):
        raise UsageError(
            "--workers: OTEL_METRICS_EXPORTER=prometheus serves one process at its port; send them by OTLP", code="OB618"
        )
