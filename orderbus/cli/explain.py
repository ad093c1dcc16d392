"""`orderbus explain`: what outbox, inbox, queues, dead letters and claims know of one event; and what nobody knows."""

from __future__ import annotations

import importlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal
from uuid import UUID

import anyio
import msgspec
import typer
from rich.text import Text

from orderbus._core.handler import Handler
from orderbus._core.ids import uuid7_time_ms
from orderbus._core.outbox_rows import HeldRow, RowsWanted
from orderbus._core.parked import Parked, Wanted
from orderbus._core.settings import PREFIX, Settings, masked
from orderbus._core.topology import LOST_QUEUE, RETRY_STEPS_S, dead_letter_queue, retry_exchange
from orderbus._runtime.bus import Bus
from orderbus._runtime.dead_letters import DeadLetters
from orderbus._runtime.looking import MOST_HELD
from orderbus._runtime.opening import adapter, open_broker, scheme_of
from orderbus.cli.exits import ExitCode, clear_errors
from orderbus.cli.letters import brief_data, utc_time
from orderbus.cli.loading import load_buses, settings_of, settings_without_broker
from orderbus.cli.outbox_shown import row_data, tries
from orderbus.cli.output import console, plain, print_json
from orderbus.cli.parsing import parse_event_id
from orderbus.errors import UnavailableError, UsageError

EXAMPLE = "Example: orderbus explain 0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f services.payment:bus services.inventory:bus"

Status = Literal["found", "absent", "unknown", "away", "refused"]


class Fact(msgspec.Struct, frozen=True):
    """What one place knows of the event."""

    place: str
    status: Status
    text: str
    data: dict[str, Any] = {}


@clear_errors
def explain(
    event_id: Annotated[Any, typer.Argument(parser=parse_event_id, metavar="EVENT_ID", help="The event's id.")],
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="MODULE:BUS", help="Whose queues, dead letters and claims to look at.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each place.")] = False,
) -> None:
    """Tell an event's story: is it in the outbox, who has handled it, where is it parked and why? Changes nothing.

    Exit code 1: nothing is known of it; 2: nothing is known, or not all, for want of a right or of the schema; 4: since a server
    is not available.
    """
    buses = load_buses(targets or [])
    settings = {bus.group: settings_of(bus) for bus in buses} or {"": settings_without_broker()}
    facts: list[Fact] = []
    made_ms = uuid7_time_ms(event_id)
    when = "its id does not say when it was emitted" if made_ms is None else f"emitted at {utc_time(made_ms / 1000)}, says its id"
    anyio.run(_look_everywhere, facts, event_id, buses, settings)
    if as_json:
        print_json({"event": "explained", "id": event_id, "emitted_at": None if made_ms is None else utc_time(made_ms / 1000)})
        for fact in facts:
            print_json(fact)
    else:
        console().print(Text.assemble((str(event_id), "bold"), f": {when}"), soft_wrap=True)
        for fact in facts:
            style = {"found": "green", "absent": "dim", "unknown": "yellow", "away": "red", "refused": "red"}[fact.status]
            console().print(
                Text.assemble((f"{fact.status:<8}", style), (f"{fact.place}: ", "bold"), plain(fact.text)), soft_wrap=True
            )
    statuses = {fact.status for fact in facts}
    if "away" in statuses:
        raise typer.Exit(ExitCode.UNAVAILABLE)
    if "refused" in statuses:
        raise typer.Exit(ExitCode.USAGE)
    if "found" not in statuses:
        raise typer.Exit(ExitCode.FINDINGS)


async def _look_everywhere(facts: list[Fact], event_id: UUID, buses: Sequence[Bus], settings: dict[str, Settings]) -> None:
    handlers = [handler for bus in buses for handler in bus.handlers]
    for url in dict.fromkeys(one.database_url for one in settings.values()):
        if url is None:
            facts.append(Fact("database", "unknown", "ORDERBUS_DATABASE_URL is not set"))
            continue
        with_inbox = [
            handler for handler in handlers if settings[handler.group].database_url == url and _guard(handler, url) == "inbox"
        ]
        await _asked(facts, f"database {masked(url)}", lambda url=url, at=with_inbox: _in_database(facts, event_id, url, at))
    if not buses and f"{PREFIX}BROKER_URL" not in os.environ:
        facts.append(Fact("broker", "unknown", "ORDERBUS_BROKER_URL is not set"))
        return
    for url in dict.fromkeys(one.broker_url for one in settings.values()):
        assert url is not None
        there = [handler for handler in handlers if settings[handler.group].broker_url == url]
        await _asked(facts, f"broker {masked(url)}", lambda url=url, at=there: _on_broker(facts, event_id, url, at))
    for handler in handlers:
        one = settings[handler.group]
        if _guard(handler, one.database_url) == "claims":
            await _asked(facts, f"claim of {handler.consumer}", lambda one=one, at=handler: _claim(facts, event_id, one, at))


def _guard(handler: Handler, database_url: str | None) -> str:
    return handler.options.guard or ("claims" if database_url is None else "inbox")


async def _asked(facts: list[Fact], what: str, look: Callable[..., Awaitable[None]]) -> None:
    """A place that can't be asked is said to be so; the others are asked all the same."""
    if "memory://" in what:
        facts.append(Fact(what, "unknown", "it lives inside the process that runs the bus, out of reach for any other"))
        return
    try:
        await look()
    except UnavailableError as error:
        facts.append(Fact(what, "away", str(error)))
    except UsageError as error:
        facts.append(Fact(what, "refused", str(error)))


async def _in_database(facts: list[Fact], event_id: UUID, url: str, handlers: Sequence[Handler]) -> None:
    async with adapter(url).open_desk(url, name="orderbus explain") as desk:
        rows = await desk.rows(RowsWanted(ids=(event_id,)))
        handled = {one.consumer: one for one in await desk.handled(event_id)}
    for row in rows:
        facts.append(Fact("outbox", "found", _row_text(row), row_data(row)))
    if not rows:
        facts.append(Fact("outbox", "absent", "published and deleted, discarded, or never emitted"))
    for one in handled.values():
        at = utc_time(one.handled_at_s)
        facts.append(Fact("inbox", "found", f"handled by {one.consumer} at {at}", {"consumer": one.consumer, "handled_at": at}))
    for handler in handlers:
        if handler.consumer not in handled:
            text = f"not handled by {handler.consumer}, or longer ago than the inbox remembers"
            facts.append(Fact("inbox", "absent", text, {"consumer": handler.consumer}))
    if not handled and not handlers:
        facts.append(Fact("inbox", "absent", "handled by no consumer of this database, or longer ago than the inbox remembers"))


async def _on_broker(facts: list[Fact], event_id: UUID, url: str, handlers: Sequence[Handler]) -> None:
    queues = list(dict.fromkeys(handler.queue for handler in handlers))
    wanted = Wanted(ids=(str(event_id),))
    async with open_broker(url, name="orderbus explain") as broker:
        letters = DeadLetters(broker)
        for name in [*map(dead_letter_queue, queues), LOST_QUEUE]:
            async with _if_there(facts, f"queue {name}"):
                listing = await letters.list(name, wanted, limit=100, hold=MOST_HELD)
                facts += [Fact("dead letters", "found", _letter_text(letter), brief_data(letter)) for letter in listing.letters]
                if listing.looked_at < listing.ready:
                    text = f"{listing.looked_at} of {listing.ready} letters in {name} were looked at"
                    facts.append(Fact("dead letters", "unknown", text))
                elif not listing.letters:
                    facts.append(Fact("dead letters", "absent", f"not among the {listing.ready} in {name}"))
        for name in queues:
            async with _if_there(facts, f"queue {name}"):
                ready = await broker.depth(name)
                text = f"{ready} ready; whether it is one of them can't be seen without taking it from its consumer"
                facts.append(Fact(f"queue {name}", "unknown" if ready else "absent", text if ready else "nothing is ready in it"))
        await _in_the_ladder(facts, broker)


async def _in_the_ladder(facts: list[Fact], broker: Any) -> None:
    waiting = 0
    for step in RETRY_STEPS_S:
        async with _if_there([], ""):
            waiting += await broker.depth(retry_exchange(step))
    if waiting:
        text = f"{waiting} messages of all groups wait for their next try; whether it is one of them can't be seen"
        facts.append(Fact("retries", "unknown", text))
    else:
        facts.append(Fact("retries", "absent", "no message of any group waits for its next try"))


@asynccontextmanager
async def _if_there(facts: list[Fact], place: str) -> AsyncIterator[None]:
    try:
        yield
    except UsageError as error:
        facts.append(Fact(place, "unknown", str(error)))


async def _claim(facts: list[Fact], event_id: UUID, settings: Settings, handler: Handler) -> None:
    url = settings.redis_url
    place = f"claim of {handler.consumer}"
    if url is None or scheme_of(url) == "memory":
        facts.append(Fact(place, "unknown", "ORDERBUS_REDIS_URL is not set, or inside the process that runs the bus"))
        return
    looking = importlib.import_module(f"{adapter(url).__name__}.looking")
    [(state, left_s)] = await looking.claims_seen(url, [f"{settings.redis_prefix}inbox:{handler.consumer}:{event_id}"])
    if state == "none":
        facts.append(Fact(place, "absent", "none: not handled, or longer ago than it is kept"))
    else:
        text = "handled; kept" if state == "done" else "in progress, or its process died; it runs out"
        facts.append(
            Fact(
                place,
                "found",
                f"{text} {'for another' if state == 'done' else 'in'} {left_s:.1f} s",
                {"state": state, "left_s": left_s},
            )
        )


def _row_text(row: HeldRow) -> str:
    where = f"{row.topic}, key {row.key}" if row.key is not None else row.topic
    if row.state == "waiting":
        return f"waits for the relay ({where}, bucket {row.bucket})"
    if row.state == "scheduled":
        return f"scheduled for {utc_time(row.due_at_s)} ({where})"
    if row.waits_for is not None:
        return f"stuck behind event {row.waits_for} of its key ({where})"
    return f"stuck: {row.reason} since {utc_time(row.first_failed_at_s)}, {tries(row.attempts)}, next {utc_time(row.next_try_at_s)} ({where})"


def _letter_text(letter: Parked) -> str:
    after = "" if letter.attempts is None else f" after {tries(letter.attempts)}"
    error = f": {letter.error}: {letter.error_text}" if letter.error else ""
    return f"parked in {letter.queue} at {utc_time(letter.parked_at_s)} for {letter.reason!r}{after}{error}"
