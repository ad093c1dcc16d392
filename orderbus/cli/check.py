"""`orderbus check`: is everything as the next `orderbus run` needs it?"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

import anyio
import msgspec
import typer
from rich.text import Text

from orderbus._core.settings import Settings, masked
from orderbus._core.topology import Topology
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import adapter, open_broker, open_store, scheme_of
from orderbus.abc import Broker
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.loading import environment_settings, load_buses, settings_of
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import SettingsError, TopologyError, UnavailableError, UsageError

EXAMPLE = "Example: orderbus check services.payment:bus && orderbus run services.payment:bus"
LIMIT_S = 60.0
"""For each server: beside the limits of its adapter, so that the command ends in any case."""


class Found(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    what: str
    status: Literal["ok", "note", "finding", "unavailable"]
    """A note is no fault: `orderbus run` mends it by itself."""
    text: str


@clear_errors
def check(
    targets: Annotated[list[str] | None, typer.Argument(metavar="MODULE:BUS", help="Check these buses' topology, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each thing looked at.")] = False,
) -> None:
    """Check settings, handlers, servers, the database schema and the topology; each finding says its fix.

    Queues and exchanges that exist are compared by declaring them again as they should be, which changes nothing: the broker
    refuses what differs. Missing queues are not declared; a missing exchange is, where queues of the bus exist already.
    Bindings can't be read over AMQP and are not compared.

    Exit code 0: fine, 1: findings, 4: nothing is wrong but a server is not available.
    """
    buses = load_buses(targets or [])
    found = [*_handlers(buses)]
    settings: dict[str, Settings] = {}
    try:
        settings = {bus.group: settings_of(bus) for bus in buses} or {"": environment_settings()}
        found.append(Found("settings", "ok", "as documented"))
    except SettingsError as error:
        found += [Found("settings", "finding", mistake) for mistake in error.mistakes]
    if settings:
        anyio.run(_servers, found, settings)
        anyio.run(_topologies, found, settings, buses)
    for one in found:
        if as_json:
            print_json(one)
        else:
            _print(one)
    statuses = {one.status for one in found}
    if "finding" in statuses:
        raise typer.Exit(ExitCode.FINDINGS)
    if "unavailable" in statuses:
        raise typer.Exit(ExitCode.UNAVAILABLE)


def _handlers(buses: Sequence[Bus]) -> list[Found]:
    found = []
    for bus in buses:
        try:
            count = len(bus.plans())
        except UsageError as error:
            found.append(Found(f"handlers of {bus.group}", "finding", str(error)))
        else:
            found.append(Found(f"handlers of {bus.group}", "ok", f"{count} registered"))
    return found


async def _servers(found: list[Found], settings: dict[str, Settings]) -> None:
    """Each server that the buses name, once; and the schema of each database."""
    seen: set[str] = set()
    for each in settings.values():
        for what, url in (("broker", each.broker_url), ("database", each.database_url), ("redis", each.redis_url)):
            if url is None or url in seen:
                continue
            seen.add(url)
            if scheme_of(url) == "memory":
                found.append(Found(f"{what} {url}", "ok", "inside the process that runs the bus"))
                continue
            name = f"{what} {masked(url)}"
            is_there = await _looked_at(found, name, _version(url))
            if is_there and what == "database":
                await _looked_at(found, f"schema in {masked(url)}", _schema(url))


async def _topologies(found: list[Found], settings: dict[str, Settings], buses: Sequence[Bus]) -> None:
    for bus in buses:
        url = settings[bus.group].broker_url or ""
        down = any(one.status != "ok" and one.what == f"broker {masked(url)}" for one in found)
        if scheme_of(url) != "memory" and not down:
            await _looked_at(found, f"topology of {bus.group}", _topology(url, bus))


def _version(url: str) -> Callable[[], Awaitable[Found]]:
    async def version() -> Found:
        module = importlib.import_module(f"{adapter(url).__name__}.version")
        return Found("", "ok", await module.server_version(url))

    return version


def _schema(url: str) -> Callable[[], Awaitable[Found]]:
    async def schema() -> Found:
        async with open_store(url, name="orderbus check", pool_size=1) as store:
            await store.check()
        return Found("", "ok", "of the version that this orderbus needs")

    return schema


def _topology(url: str, bus: Bus) -> Callable[[], Awaitable[Found]]:
    async def topology() -> Found:
        wanted = bus.topology()
        async with open_broker(url, name="orderbus check") as broker:
            missing = {queue.name for queue in wanted.queues if not await _exists(broker, queue.name)}
            there = tuple(queue for queue in wanted.queues if queue.name not in missing)
            if there:
                await broker.apply(Topology(wanted.exchanges, there))
        if missing:
            names = ", ".join(sorted(missing, key=lambda name: (name.startswith("ob."), name))[:5]) + (
                ", …" if len(missing) > 5 else ""
            )
            return Found("", "note", f"{len(missing)} queues are missing ({names}); `orderbus run` declares them")
        return Found("", "ok", f"{len(there)} queues as they should be")

    return topology


async def _exists(broker: Broker, queue: str) -> bool:
    try:
        await broker.depth(queue)
    except UsageError:
        return False
    return True


async def _looked_at(found: list[Found], what: str, look: Callable[[], Awaitable[Found]]) -> bool:
    """Whether it was reached and is as it should be."""
    try:
        with anyio.fail_after(LIMIT_S):
            one = await look()
    except TopologyError as error:
        found += [Found(what, "finding", line.strip(" -")) for line in str(error).splitlines() if line.startswith("  - ")]
        return False
    except UsageError as error:
        found.append(Found(what, "finding", str(error)))
        return False
    except UnavailableError as error:
        found.append(Found(what, "unavailable", str(error)))
        return False
    except TimeoutError:
        found.append(Found(what, "unavailable", f"no answer within {LIMIT_S:g} s"))
        return False
    found.append(msgspec.structs.replace(one, what=what))
    return True


_SIGNS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "finding": ("FINDING", "red"), "unavailable": ("AWAY", "red")}


def _print(one: Found) -> None:
    sign, style = _SIGNS[one.status]
    console().print(Text.assemble((f"{sign:<8}", style), (f"{one.what}: ", "bold"), plain(one.text)))
