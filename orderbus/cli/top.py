"""`orderbus top`: what flows and what waits, live on a terminal, from the broker and the database alone."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Annotated, Any

import anyio
import msgspec
import typer
from rich import box
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orderbus._core.handler import Handler
from orderbus._core.settings import Settings
from orderbus._core.topology import RETRY_STEPS_S, dead_letter_queue, retry_exchange
from orderbus._runtime.dead_letters import DeadLetters
from orderbus._runtime.opening import adapter, open_broker, scheme_of
from orderbus.abc import Broker, OutboxDesk
from orderbus.cli.exits import clear_errors
from orderbus.cli.loading import load_buses, settings_of
from orderbus.cli.output import console, plain, print_json
from orderbus.errors import UnavailableError, UsageError

EXAMPLE = "Example: orderbus top services.payment:bus services.inventory:bus services.aggregator:bus"

WINDOW_S = 5.0
"""Rates and lags are those of the last seconds."""
MOST_LETTERS = 1_000


class Line(msgspec.Struct, frozen=True):
    """One consumer. None is what can't be known: a queue that is not there, a handler that the inbox does not guard."""

    consumer: str
    queue: str
    ready: int | None
    handled_per_s: float | None
    lag_p50_s: float | None
    lag_p99_s: float | None
    parked: int | None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    event: str = "top"
    consumers: tuple[Line, ...] = ()
    retrying: int | None = None
    """Messages that wait in the retry ladder, of all groups."""
    outbox_waiting: int | None = None
    outbox_oldest_s: float | None = None
    outbox_stuck: int | None = None
    buckets_held: int | None = None
    """Of 64; over all relays."""
    reasons: dict[str, dict[str, int]] = {}
    """Where asked for: why letters of each queue were parked (of the oldest 1,000), and why rows are stuck."""
    away: tuple[str, ...] = ()
    """Servers that did not answer."""


@clear_errors
def top(
    targets: Annotated[list[str], typer.Argument(metavar="MODULE:BUS", help="The buses to look at, on one broker and database.")],
    every: Annotated[float, typer.Option(min=0.5, max=3600, help="Seconds between looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and end; so it does without a terminal.")] = False,
    reasons: Annotated[bool, typer.Option("--reasons", help="Begin with the reasons of dead letters and stuck rows.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each look.")] = False,
) -> None:
    """Show, live, for each consumer: messages ready, handled a second, lag, dead letters; and outbox, retries, relays.

    Keys: `r` shows and hides the reasons (which looks into the dead letters), `q` ends. It needs nothing but the broker and the
    database, and changes nothing. A server that does not answer is said to be away, and asked again.
    """
    buses = load_buses(targets)
    handlers = [handler for bus in buses for handler in bus.handlers]
    if not handlers:
        raise UsageError(f"{', '.join(targets)}: has no handlers, and so nothing to look at", code="OB606")
    looking = Looking([settings_of(bus) for bus in buses], handlers)
    if once or not sys.stdout.isatty():
        anyio.run(_once, looking, reasons, as_json)
    else:
        with contextlib.suppress(KeyboardInterrupt), _keys_at_once():
            anyio.run(_live, looking, every, reasons, as_json)


class Looking:
    """Where to look, over one connection each, which are made when they are needed."""

    def __init__(self, settings: Sequence[Settings], handlers: Sequence[Handler]) -> None:
        first = settings[0]
        for other in settings[1:]:
            if (other.broker_url, other.database_url) != (first.broker_url, first.database_url):
                raise UsageError("the buses are on different brokers or databases; look at one at a time", code="OB607")
        assert first.broker_url is not None
        if scheme_of(first.broker_url) == "memory":
            raise UsageError(
                "ORDERBUS_BROKER_URL is memory://: its messages live inside the process that runs the bus, out of reach for any other",
                code="OB608",
            )
        self._broker_url = first.broker_url
        is_memory = first.database_url is not None and scheme_of(first.database_url) == "memory"
        self._database_url = None if is_memory else first.database_url
        """None where there is none, or only inside the process that runs the bus."""
        self._handlers = handlers
        self._open = AsyncExitStack()
        self._broker: Broker | None = None
        self._desk: OutboxDesk | None = None

    async def __aenter__(self) -> Looking:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def look(self, *, reasons: bool) -> Snapshot:
        """What there is now. A server that is away is named in it."""
        found: dict[str, Any] = {"away": []}
        why: dict[str, dict[str, int]] = {}
        await self._ask(found, self._ask_broker(found, why if reasons else None))
        if self._database_url is not None:
            await self._ask(found, self._ask_database(found, why if reasons else None))
        paces, ready = found.pop("paces", {}), found.pop("ready", {})
        lines = []
        for handler in self._handlers:
            pace = paces.get(handler.consumer)
            is_counted = "outbox_stuck" in found and handler.options.guard in (None, "inbox")
            lines.append(
                Line(
                    handler.consumer,
                    handler.queue,
                    ready.get(handler.queue),
                    (pace.per_s if pace else 0.0) if is_counted else None,
                    pace.lag_p50_s if pace else None,
                    pace.lag_p99_s if pace else None,
                    ready.get(dead_letter_queue(handler.queue)),
                )
            )
        away = tuple(found.pop("away"))
        return Snapshot(consumers=tuple(lines), away=away, reasons=why, **found)

    async def _ask(self, found: dict[str, Any], question: Any) -> None:
        try:
            await question
        except UnavailableError as error:
            found["away"].append(str(error))

    async def _ask_broker(self, found: dict[str, Any], why: dict[str, dict[str, int]] | None) -> None:
        broker = self._broker
        if broker is None:
            opening: AbstractAsyncContextManager[Broker] = open_broker(self._broker_url, name="orderbus top")
            broker = self._broker = await self._open.enter_async_context(opening)
        ready: dict[str, int] = {}
        for queue in dict.fromkeys(handler.queue for handler in self._handlers):
            for name in (queue, dead_letter_queue(queue)):
                if (depth := await _depth(broker, name)) is not None:
                    ready[name] = depth
        ladder = [await _depth(broker, retry_exchange(step)) for step in RETRY_STEPS_S]
        found |= {"ready": ready, "retrying": sum(depth or 0 for depth in ladder)}
        if why is not None:
            letters = DeadLetters(broker)
            for name in [name for name, depth in ready.items() if depth and name.endswith(".dlq")]:
                listing = await letters.list(name, limit=MOST_LETTERS)
                why[name] = dict(Counter(letter.reason for letter in listing.letters).most_common())
                await letters.returned(name, listing.ready)

    async def _ask_database(self, found: dict[str, Any], why: dict[str, dict[str, int]] | None) -> None:
        assert self._database_url is not None
        desk = self._desk
        if desk is None:
            opening: AbstractAsyncContextManager[OutboxDesk] = adapter(self._database_url).open_desk(
                self._database_url, name="orderbus top"
            )
            desk = self._desk = await self._open.enter_async_context(opening)
        stats = await desk.stats()
        waiting = [held for held in stats.held if held.state == "waiting"]
        found |= {
            "paces": {pace.consumer: pace for pace in await desk.paces(WINDOW_S)},
            "outbox_waiting": sum(held.count for held in waiting),
            "outbox_oldest_s": max((held.oldest_s for held in waiting), default=0.0),
            "outbox_stuck": sum(one.count for one in stats.stuck),
            "buckets_held": sum(holder.buckets for holder in stats.holders if holder.owner is not None),
        }
        if why is not None and stats.stuck:
            why["outbox"] = {one.reason: one.count for one in stats.stuck}


async def _depth(broker: Broker, queue: str) -> int | None:
    try:
        return await broker.depth(queue)
    except UsageError:  # it is not there (yet)
        return None


async def _once(looking: Looking, reasons: bool, as_json: bool) -> None:
    async with looking:
        snapshot = await looking.look(reasons=reasons)
    if snapshot.away:
        raise UnavailableError("; ".join(snapshot.away))
    if as_json:
        print_json(snapshot)
    else:
        console().print(shown(snapshot))


async def _live(looking: Looking, every: float, reasons: bool, as_json: bool) -> None:
    asked = {"reasons": reasons}
    again = anyio.Event()

    async def listen() -> None:
        while True:
            await anyio.wait_readable(sys.stdin)
            pressed = os.read(sys.stdin.fileno(), 1)
            if pressed in (b"q", b""):
                tasks.cancel_scope.cancel()
                return
            if pressed == b"r":
                asked["reasons"] = not asked["reasons"]
                again.set()

    async with looking:
        with contextlib.nullcontext() if as_json else Live(console=console(), screen=True, auto_refresh=False) as live:
            async with anyio.create_task_group() as tasks:
                if sys.stdin.isatty():
                    tasks.start_soon(listen)
                while True:
                    again = anyio.Event()
                    snapshot = await looking.look(reasons=asked["reasons"])
                    if live is None:
                        print_json(snapshot)
                    else:
                        live.update(shown(snapshot), refresh=True)
                    with anyio.move_on_after(every):
                        await again.wait()


@contextlib.contextmanager
def _keys_at_once() -> Iterator[None]:
    """Keys are read as they are pressed, without Enter, and not shown."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def shown(snapshot: Snapshot) -> RenderableType:
    """A snapshot as text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("consumer", no_wrap=True)
    for name in ("ready", "handled/s", "lag p50", "lag p99", "parked"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in snapshot.consumers:
        table.add_row(
            plain(line.consumer),
            _count(line.ready, warn_at=1_000),
            "–" if line.handled_per_s is None else f"{line.handled_per_s:.1f}",
            _seconds(line.lag_p50_s),
            _seconds(line.lag_p99_s),
            _count(line.parked, warn_at=1),
        )
    outbox = Text.assemble(
        ("outbox ", "bold"),
        _count(snapshot.outbox_waiting, warn_at=1_000),
        f" waiting, oldest {_seconds(snapshot.outbox_oldest_s)}, ",
        _count(snapshot.outbox_stuck, warn_at=1),
        " stuck; relays hold ",
        Text(_or_dash(snapshot.buckets_held), "" if snapshot.buckets_held in (64, None) else "bold red"),
        f" of 64 buckets; {_or_dash(snapshot.retrying)} wait for a retry",
    )
    parts: list[RenderableType] = [Text(time.strftime("%H:%M:%S"), style="dim"), table, outbox]
    for queue, reasons in snapshot.reasons.items():
        why = ", ".join(f"{count} {plain(reason)}" for reason, count in reasons.items())
        parts.append(Text.assemble((f"{plain(queue)}: ", "bold"), why))
    parts += [Text(f"away: {plain(what)}", style="bold red") for what in snapshot.away]
    parts.append(Text("r reasons, q end", style="dim"))
    return Group(*parts)


def _count(value: int | None, *, warn_at: int) -> Text:
    return Text(_or_dash(value), "bold red" if value is not None and value >= warn_at else "")


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
