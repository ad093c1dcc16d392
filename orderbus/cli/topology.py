"""`orderbus topology`: what the broker lacks of what the buses need, and making it so."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import anyio
import msgspec
import typer
from rich.text import Text

from orderbus._core.settings import Settings, masked
from orderbus._core.topology import Binding, Topology
from orderbus._core.topology_plan import Action, Change, to_create, united
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import adapter, scheme_of
from orderbus.cli.audit import ask, audited, require_consent
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.loading import load_buses, settings_of
from orderbus.cli.option_groups import AsJson
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import TopologyError, UsageError

app = typer.Typer(no_args_is_help=True, help="The exchanges, queues and bindings of buses: what is missing, and making it.")

Targets = Annotated[list[str], typer.Argument(metavar="MODULE:BUS", help="The buses, all on one broker.")]


@app.command(epilog="Example: orderbus topology plan services.payment:bus services.inventory:bus")
@clear_errors
def plan(targets: Targets, as_json: AsJson = False) -> None:
    """Show what the broker has beside what the buses need. Changes nothing; exit code 1 where something differs.

    `+` is missing, `~` exists with other properties, `-` is left over from handlers that are gone, `?` can't be known.
    With ORDERBUS_MANAGEMENT_URL everything is compared. Without it, what exists is declared again as it should be, which
    changes nothing and is refused where it differs; bindings and leftovers stay unknown.
    """
    wanted = Wanted(load_buses(targets))
    found = anyio.run(_look, wanted)
    _show(found, wanted, as_json=as_json)
    if any(change.action != "unknown" for change in found):
        raise typer.Exit(ExitCode.FINDINGS)


@app.command(epilog="Example: orderbus topology apply services.payment:bus --prune --yes")
@clear_errors
def apply(
    targets: Targets,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove what is left over, too: bindings, and queues that are empty and unused.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where there is no terminal to ask at.")] = False,
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the audit lines, which go to stderr, to this file, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the plan, ask, and make what is missing. What differs is never changed, and nothing is removed without `--prune`.

    Exit code 0: the broker is as it should be. 1: something is left, which the last lines name.
    """
    wanted = Wanted(load_buses(targets))
    if prune and wanted.settings.management_url is None:
        raise UsageError(
            "--prune needs ORDERBUS_MANAGEMENT_URL: what is left over can't be listed over AMQP; nothing was changed",
            code="OB613",
        )
    must_ask = require_consent("topology apply", yes=yes, dry_run=False)
    found = anyio.run(_look, wanted)
    _show(found, wanted, as_json=as_json)
    to_do = [change for change in found if change.action in ("create", "unknown") or (prune and change.action == "leftover")]
    done: list[tuple[Change, str]] = []
    refused = False
    if to_do:
        if must_ask:
            ask(f"Change {wanted.shown}?")
        with audited("topology apply", audit) as note:
            try:
                found, done, refused = anyio.run(_apply, wanted, to_do)
            except BaseException:  # in the middle of it: a broker that went, or Ctrl-C
                for change in to_do:
                    note("unknown", kind=change.kind, name=str(change))
                raise
            for change, outcome in done:
                note(outcome, kind=change.kind, name=str(change))
    left = [change for change in found if change.action != "unknown"]
    if as_json:
        outcomes = Counter(outcome for _, outcome in done)
        print_json(
            {"event": "topology-applied", "created": outcomes["created"], "removed": outcomes["removed"], "left": len(left)}
        )
    elif left:
        complain(f"left as it was: {', '.join(map(str, left))}")
    if left or refused:
        raise typer.Exit(ExitCode.FINDINGS)


class Wanted:
    """What the buses need together, and where."""

    def __init__(self, buses: Sequence[Bus]) -> None:
        several = [settings_of(bus) for bus in buses]
        self.settings: Settings = several[0]
        if any(one.broker_url != self.settings.broker_url for one in several):
            raise UsageError("the buses are on different brokers; plan for one at a time", code="OB607")
        self.url = self.settings.broker_url or ""
        if scheme_of(self.url) == "memory":
            raise UsageError(
                "ORDERBUS_BROKER_URL is memory://: its queues live inside the process that runs the bus, and are made by it",
                code="OB608",
            )
        self.topology: Topology = united(bus.topology() for bus in buses)
        self.groups = frozenset(bus.group for bus in buses)
        self.shown = masked(self.url)


async def _look(wanted: Wanted) -> list[Change]:
    async with _opened(wanted) as drift:
        found: list[Change] = await drift.look(wanted.topology, wanted.groups)
    return found


async def _apply(wanted: Wanted, to_do: Sequence[Change]) -> tuple[list[Change], list[tuple[Change, str]], bool]:
    """What is left then, what became of each change, and whether the broker refused something.

    It is read from the broker again, not concluded from its answers; but where bindings can't be read, and one was refused, it may be any.
    """
    kept: dict[str, str] = {}
    refused = False
    async with _opened(wanted) as drift:
        try:
            await drift.create(_to_make(wanted.topology, to_do))
        except TopologyError as error:
            complain(str(error))
            refused = True
        for change in to_do:
            if change.action == "leftover":
                await _remove(drift, change, kept)
        after = await drift.look(wanted.topology, wanted.groups)
    undone = {str(change) for change in after if change.action != "unknown"}
    is_unseen = refused and any(change.action == "unknown" and change.kind == "binding" for change in after)
    done = []
    for change in to_do:
        if change.action == "unknown":
            continue
        outcome = "created" if change.action == "create" else "removed"
        if str(change) in undone:
            outcome = "failed"
        elif change.action == "create" and change.kind == "binding" and is_unseen:
            outcome = "unknown"
        done.append((change, kept.get(str(change), outcome)))
    return after, done, refused


async def _remove(drift: Any, change: Change, kept: dict[str, str]) -> None:
    """A dead letter queue stays where its own queue does, which would write to it."""
    try:
        if change.kind == "binding":
            await drift.unbind(Binding(change.exchange or "", change.name, change.routing_key or ""))
        elif f"queue {change.name.removesuffix('.dlq')}" in kept:
            raise UsageError(f"{change} is kept, as its own queue is", code="OB510")
        else:
            await drift.remove(change.name)
    except UsageError as error:
        kept[str(change)] = "kept"
        complain(str(error))


def _to_make(topology: Topology, to_do: Sequence[Change]) -> Topology:
    """Bindings that can't be read are all declared again, which changes nothing where they are there."""
    missing = to_create(topology, to_do)
    if any(change.action == "unknown" and change.kind == "binding" for change in to_do):
        return msgspec.structs.replace(missing, bindings=topology.bindings)
    return missing


def _opened(wanted: Wanted) -> Any:
    module = importlib.import_module(f"{adapter(wanted.url).__name__}.drift")
    return module.open_drift(wanted.url, name="orderbus topology", management_url=wanted.settings.management_url)


_SIGNS: dict[Action, tuple[str, str]] = {
    "create": ("+", "green"),
    "differs": ("~", "yellow"),
    "leftover": ("-", "red"),
    "unknown": ("?", "cyan"),
}
_WORDS: dict[Action, str] = {"create": "to make", "differs": "differ", "leftover": "left over", "unknown": "can't be known"}
_ADVICE: dict[Action, str] = {
    "differs": "~ is never changed by orderbus: drain and delete it, so that it can be declared anew, or go back to what it has.",
    "leftover": "- is removed by `orderbus topology apply --prune`, queues only where they are empty and unused.",
}


def _show(found: Sequence[Change], wanted: Wanted, *, as_json: bool) -> None:
    if as_json:
        for change in found:
            print_json({"event": "topology-change", "broker": wanted.shown, **msgspec.to_builtins(change)})
        return
    out = console()
    out.print(Text(wanted.shown, style="bold"))
    for change in found:
        sign, style = _SIGNS[change.action]
        out.print(Text.assemble((f"  {sign} ", style), plain(change)), soft_wrap=True)
        for one in change.differences:
            out.print(f"      {plain(one.name)}: {_value(one.there)} → {_value(one.wanted)}", soft_wrap=True)
        if change.said:
            out.print(f"      {plain(change.said)}")
    counts = Counter(change.action for change in found)
    listed = ", ".join(f"{counts[action]} {word}" for action, word in _WORDS.items() if counts[action])
    out.print(f"{listed}." if listed else "Everything is as it should be.")
    for action, advice in _ADVICE.items():
        if counts[action]:
            out.print(advice)


def _value(value: object) -> str:
    return "not set" if value is None else plain(msgspec.json.encode(value).decode())
