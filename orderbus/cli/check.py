"""`orderbus check`: is everything as the next `orderbus run` needs it?"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import anyio
import typer
from rich.text import Text

from orderbus._core.handler import guard_kind
from orderbus._core.settings import Settings, masked
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import adapter, open_store, scheme_of
from orderbus.cli.check_servers import broker_clock, clock, permissions, rights
from orderbus.cli.check_topology import topology
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.found import Found, Seen
from orderbus.cli.loading import environment_settings, load_buses, settings_of
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import SettingsError, UnavailableError, UsageError

EXAMPLE = "Example: orderbus check services.payment:bus && orderbus run services.payment:bus"
LIMIT_S = 60.0
"""For each server: beside the limits of its adapter, so that the command ends in any case."""


@clear_errors
def check(
    targets: Annotated[list[str] | None, typer.Argument(metavar="MODULE:BUS", help="Check these buses' topology, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each thing looked at.")] = False,
) -> None:
    """Check settings, handlers, servers, the database schema and the topology; each finding says its fix.

    It changes nothing. With ORDERBUS_MANAGEMENT_URL the topology is compared as a whole; without it, what exists is declared again
    as it should be, which the broker refuses where it differs, and bindings and leftovers are not known.

    Exit code 0: fine, 1: findings, 4: nothing is wrong but a server is not available.
    """
    buses = load_buses(targets or [])
    settings: dict[str, Settings] = {}
    mistakes: Sequence[str] = ()
    try:
        settings = {bus.group: settings_of(bus) for bus in buses} or {"": environment_settings()}
    except SettingsError as error:
        mistakes = error.mistakes
    found = [*_handlers(buses, settings)]
    found += [Found("settings", "finding", mistake) for mistake in mistakes] or [Found("settings", "ok", "as documented")]
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


def _handlers(buses: Sequence[Bus], settings: Mapping[str, Settings]) -> list[Found]:
    """Whether each has what its signature and its guard ask for, as far as settings say."""
    found = []
    for bus in buses:
        try:
            plans = bus.plans()
            bus._periodic_plans()
            if each := settings.get(bus.group):
                is_memory = scheme_of(each.broker_url or "") == "memory"
                for handler, plan in plans:
                    guard_kind(
                        handler,
                        plan,
                        has_store=is_memory or each.database_url is not None,
                        has_claims=is_memory or each.redis_url is not None,
                    )
        except UsageError as error:
            found.append(Found(f"handlers of {bus.group}", "finding", str(error)))
        else:
            found.append(Found(f"handlers of {bus.group}", "ok", f"{len(plans)} registered"))
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
            where = masked(url)
            is_there = await _looked_at(found, f"{what} {where}", partial(_version, url))
            if not is_there or scheme_of(url) == "embedded":
                continue
            if what == "broker":
                if each.management_url is not None:
                    await _looked_at(found, f"clock of {what} {where}", partial(broker_clock, each))
                continue
            await _looked_at(found, f"clock of {what} {where}", partial(clock, url))
            if what == "database" and await _looked_at(found, f"schema in {where}", partial(_schema, url)):
                relays = any(one.database_url == url and one.relay is not False for one in settings.values())
                await _looked_at(found, f"rights in {where}", partial(rights, url, relays=relays))


async def _topologies(found: list[Found], settings: dict[str, Settings], buses: Sequence[Bus]) -> None:
    for bus in buses:
        url = settings[bus.group].broker_url or ""
        down = any(one.status == "unavailable" and one.what == f"broker {masked(url)}" for one in found)
        if scheme_of(url) != "memory" and not down:
            await _looked_at(found, f"topology of {bus.group}", partial(topology, settings[bus.group], bus))
            await _looked_at(found, f"permissions of {bus.group}", partial(permissions, settings[bus.group], bus))


async def _version(url: str) -> list[Seen]:
    module = importlib.import_module(f"{adapter(url).__name__}.version")
    return [("ok", await module.server_version(url))]


async def _schema(url: str) -> list[Seen]:
    async with open_store(url, name="orderbus check", pool_size=1) as store:
        await store.check()
    return [("ok", "of the version that this orderbus needs")]


async def _looked_at(found: list[Found], what: str, look: Callable[[], Awaitable[Sequence[Seen]]]) -> bool:
    """Whether it was reached and is as it should be."""
    try:
        with anyio.fail_after(LIMIT_S):
            seen = await look()
    except UsageError as error:
        seen = [("finding", str(error))]
    except UnavailableError as error:
        seen = [("unavailable", str(error))]
    except TimeoutError:
        seen = [("unavailable", f"no answer within {LIMIT_S:g} s")]
    found += [Found(what, status, text) for status, text in seen]
    return all(status in ("ok", "note") for status, _ in seen)


_SIGNS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "finding": ("FINDING", "red"), "unavailable": ("AWAY", "red")}


def _print(one: Found) -> None:
    sign, style = _SIGNS[one.status]
    console().print(Text.assemble((f"{sign:<8}", style), (f"{one.what}: ", "bold"), plain(one.text)))
