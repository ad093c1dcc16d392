"""What a bus consists of: as data for `--json`, and as tables."""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orderbus._core.event import Event, event_type
from orderbus._core.handler import Handler, Plan
from orderbus._core.policy import Retry
from orderbus._core.settings import Settings
from orderbus._runtime.bus import Bus
from orderbus.errors import SettingsError


class EventDescription(msgspec.Struct, frozen=True):
    event: str
    topic: str
    version: int


class HandlerDescription(msgspec.Struct, frozen=True):
    """A handler as `describe` shows it. Times in seconds."""

    name: str
    function: str
    place: str
    events: tuple[EventDescription, ...]
    queue: str
    dead_letters: str
    batch: bool
    ordered: bool
    concurrency: int
    fuse: int
    prefetch: int
    timeout_s: float
    guard: str
    retry: str
    retry_brief: str
    emits: tuple[str, ...]


class PeriodicDescription(msgspec.Struct, frozen=True):
    function: str
    every_s: float
    timeout_s: float


class BusDescription(msgspec.Struct, frozen=True):
    group: str
    handlers: tuple[HandlerDescription, ...]
    periodics: tuple[PeriodicDescription, ...]
    resources: tuple[str, ...]


def describe_bus(bus: Bus) -> BusDescription:
    """Everything the bus will do. Raises UsageError where a handler's signature is wrong; needs no settings and no server."""
    default_guard = _default_guard(bus)
    return BusDescription(
        bus.group,
        tuple(_describe(handler, plan, default_guard) for handler, plan in bus.plans()),
        tuple(
            PeriodicDescription(periodic.function.__qualname__, periodic.every_s, periodic.timeout_s)
            for periodic in bus._periodics
        ),
        tuple(kind.__qualname__ for kind in bus._resources),
    )


def banner(buses: Sequence[Bus]) -> RenderableType:
    """What runs now, for the terminal of whoever started it."""
    table = _table("handler", "consumes", "queue", "retry", "guard")
    for bus in buses:
        for handler in (described := describe_bus(bus)).handlers:
            guard = f"{handler.guard}, ordered" if handler.ordered else handler.guard
            topics = "\n".join(event.topic for event in handler.events)
            table.add_row(handler.function, topics, handler.queue, handler.retry_brief, guard)
        for periodic in described.periodics:
            table.add_row(periodic.function, f"every {periodic.every_s:g} s", "-", "-", "-")
        if not described.handlers and not described.periodics:
            table.add_row("-", f"group {bus.group} consumes nothing", "-", "-", "-")
    return table


def tables(described: BusDescription) -> RenderableType:
    """The whole description, fitted to the terminal."""
    overview = _table("handler", "event", "queue", "runs", "guard", "emits")
    for handler in described.handlers:
        overview.add_row(
            Text.assemble((handler.name, "bold"), f"\n{handler.place}"),
            "\n".join(f"{event.event}\n{event.topic} v{event.version}" for event in handler.events),
            f"{handler.queue}\nprefetch {handler.prefetch}",
            _runs_text(handler),
            handler.guard,
            "\n".join(handler.emits) or "-",
        )
    parts: list[RenderableType] = [Text(f"group {described.group}", style="bold")]
    parts.append(overview if described.handlers else Text("  no handlers"))
    by_policy: dict[str, list[str]] = {}
    for handler in described.handlers:
        by_policy.setdefault(handler.retry, []).append(handler.name)
    for policy, names in by_policy.items():
        parts += [Text(f"\nretry policy of {', '.join(names)}", style="bold"), Text(policy)]
    for periodic in described.periodics:
        parts.append(Text(f"\nevery {periodic.every_s:g} s: {periodic.function}, timeout {periodic.timeout_s:g} s"))
    if described.resources:
        parts.append(Text(f"\nresources: {', '.join(described.resources)}"))
    return Group(*parts)


def _describe(handler: Handler, plan: Plan, default_guard: str) -> HandlerDescription:
    options, code = handler.options, handler.function.__code__
    return HandlerDescription(
        name=handler.name,
        function=handler.function.__qualname__,
        place=f"{os.path.relpath(code.co_filename)}:{code.co_firstlineno}",
        events=tuple(_describe_event(event) for event in handler.events),
        queue=handler.queue,
        dead_letters=f"{handler.queue}.dlq",
        batch=handler.batch,
        ordered=options.ordered,
        concurrency=options.concurrency,
        fuse=options.fuse,
        prefetch=handler.prefetch,
        timeout_s=options.timeout_s,
        guard=options.guard or default_guard,
        retry=str(options.retry),
        retry_brief=_brief(options.retry),
        emits=tuple(event.__name__ for event in plan.emits),
    )


def _describe_event(event: type[Event]) -> EventDescription:
    kind = event_type(event)
    return EventDescription(event.__name__, kind.topic, kind.version)


def _default_guard(bus: Bus) -> str:
    """What a handler without `guard=` gets: it depends on whether there is a database."""
    try:
        settings = Settings.load(os.environ, bus._given)
    except SettingsError:
        return "inbox, or claims without a database"
    has_database = settings.database_url is not None or (settings.broker_url or "").startswith("memory:")
    return "inbox" if has_database else "claims"


def _brief(policy: Retry) -> str:
    tries = len(policy.rules[-1].delays_s) + 1
    return f"{tries} {'try' if tries == 1 else 'tries'}"


def _runs_text(handler: HandlerDescription) -> str:
    lines = ["in order, by key" if handler.ordered else "", f"{handler.concurrency} at a time"]
    if handler.batch:
        lines.append(f"batches of up to {handler.fuse}")
    elif handler.fuse > 1:
        lines.append(f"up to {handler.fuse} fused")
    return "\n".join([*(line for line in lines if line), f"timeout {handler.timeout_s:g} s"])


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
