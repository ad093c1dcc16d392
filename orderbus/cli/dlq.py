"""`orderbus dlq`: look at dead letters, and send them back to their queues."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio
import typer

from orderbus._core.parked import Parked, Wanted
from orderbus._core.settings import Settings, masked
from orderbus._runtime.dead_letters import HOLD, MOST_HELD, DeadLetters, Listing, Outcome, Replay
from orderbus._runtime.opening import open_broker, scheme_of
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.letters import as_data, brief_data, letters_table, shown_letter
from orderbus.cli.loading import environment_settings, load_bus, settings_of
from orderbus.cli.output import console, plain, print_json
from orderbus.cli.parsing import parse_rate, parse_time
from orderbus.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Dead letters: messages that were parked, each with its reason. Looking at them takes none of them away.",
)

T = TypeVar("T")

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODULE:BUS|QUEUE", help="A bus, for the dead letters of all its queues, or a queue's name."),
]
Queues = Annotated[
    list[str] | None, typer.Option("--queue", help="A queue's name, with .dlq or without; `ob.lost` keeps what no queue took.")
]
Reasons = Annotated[list[str] | None, typer.Option("--reason", help="Only with this reason; `*` and `?` match anything.")]
Errors = Annotated[list[str] | None, typer.Option("--error", help="Only after this exception, by its class name.")]
Handlers = Annotated[list[str] | None, typer.Option("--handler", help="Only of this handler, such as payment.orders.placed.")]
Ids = Annotated[list[str] | None, typer.Option("--id", help="Only this event.")]
Since = Annotated[
    float | None, typer.Option(parser=parse_time, metavar="TIME", help="Only parked since: 15m, 2h, 3d, or 2026-01-31T12:00.")
]
Before = Annotated[float | None, typer.Option(parser=parse_time, metavar="TIME", help="Only parked before.")]
Hold = Annotated[
    int, typer.Option(min=1, max=MOST_HELD, help="How many letters to hold in memory while looking for others behind them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line for each letter.")]


@app.command("list", epilog="Example: orderbus dlq list services.payment:bus --reason 'retries*' --since 2h")
@clear_errors
def list_letters(
    targets: Targets = None,
    queue: Queues = None,
    reason: Reasons = None,
    error: Errors = None,
    handler: Handlers = None,
    event_id: Ids = None,
    since: Since = None,
    before: Before = None,
    limit: Annotated[int, typer.Option(min=1, help="The most letters to list of each queue.")] = 100,
    hold: Hold = HOLD,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first, without their bodies. They stay where they are, in their order."""
    wanted = _wanted(reason, error, handler, event_id, since, before)
    listings = _on_each(targets, queue, lambda letters, name: letters.list(name, wanted, limit=limit, hold=hold))
    for listing in listings:
        if as_json:
            for letter in listing.letters:
                print_json(brief_data(letter))
        else:
            _print_listing(listing)
        if listing.looked_at < listing.ready and len(listing.letters) < limit:
            complain(
                f"{listing.queue}: {listing.looked_at} of {listing.ready} letters were looked at; raise --hold to look further"
            )


@app.command(epilog="Example: orderbus dlq show 0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f services.payment:bus")
@clear_errors
def show(
    event_id: Annotated[str, typer.Argument(help="The event's id, as `list` prints it.")],
    targets: Targets = None,
    queue: Queues = None,
    hold: Hold = MOST_HELD,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a dead letter: reason, exception, times, headers, and its body. Exit code 1: not found."""
    wanted = Wanted(ids=(event_id,))
    listings = _on_each(targets, queue, lambda letters, name: letters.list(name, wanted, limit=10, hold=hold))
    found = [letter for listing in listings for letter in listing.letters]
    for letter in found:
        if as_json:
            print_json(as_data(letter))
        else:
            console().print(shown_letter(letter))
    if not found:
        complain(f"no dead letter of event {event_id!r} in {', '.join(listing.queue for listing in listings)}")
        raise typer.Exit(ExitCode.FINDINGS)


@app.command(epilog="Example: orderbus dlq replay services.payment:bus --error GatewayTimeout --rate 20/s --dry-run")
@clear_errors
def replay(
    targets: Targets = None,
    queue: Queues = None,
    reason: Reasons = None,
    error: Errors = None,
    handler: Handlers = None,
    event_id: Ids = None,
    since: Since = None,
    before: Before = None,
    everything: Annotated[bool, typer.Option("--all", help="Replay without any filter.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="The most letters to replay of each queue.")] = None,
    rate: Annotated[
        float | None, typer.Option(parser=parse_rate, metavar="N/s", help="How many letters a second, such as 20/s.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be replayed, and do nothing.")] = False,
    hold: Hold = HOLD,
    as_json: AsJson = False,
) -> None:
    """Send dead letters back to the queues that they came from; their attempts are counted anew.

    Each is published, confirmed, and only then taken away. It is safe to run this twice, and to kill it: an event keeps its
    id, and its handler's effect is applied once. Exit code 1: some were refused or not confirmed, and are still there.
    """
    wanted = _wanted(reason, error, handler, event_id, since, before)
    if (wanted == Wanted()) is not everything:
        raise UsageError("say what to replay by --reason, --error, --handler, --id, --since or --before; or --all, without any")
    tell = partial(_tell, as_json, dry_run)
    replays = _on_each(
        targets,
        queue,
        lambda letters, name: letters.replay(name, wanted, limit=limit, rate=rate, dry_run=dry_run, hold=hold, tell=tell),
    )
    for done in replays:
        _print_replay(done, as_json)
        if done.looked_at < done.ready and limit is None:
            complain(f"{done.queue}: {done.looked_at} of {done.ready} letters were looked at; run again, or raise --hold")
    if not all(done.complete for done in replays):
        raise typer.Exit(ExitCode.FINDINGS)


def _wanted(
    reasons: Sequence[str] | None,
    errors: Sequence[str] | None,
    handlers: Sequence[str] | None,
    ids: Sequence[str] | None,
    since_s: float | None,
    before_s: float | None,
) -> Wanted:
    return Wanted(tuple(reasons or ()), tuple(errors or ()), tuple(handlers or ()), tuple(ids or ()), since_s, before_s)


def _on_each(
    targets: Sequence[str] | None, queues: Sequence[str] | None, work: Callable[[DeadLetters, str], Awaitable[T]]
) -> list[T]:
    """Run the work on every dead letter queue that was named, on one connection."""
    settings, names = _resolve([*(targets or ()), *(queues or ())])

    async def run() -> list[T]:
        async with _opened(settings) as letters:
            return [await work(letters, name) for name in names]

    return anyio.run(run)


def _resolve(targets: Sequence[str]) -> tuple[Settings, list[str]]:
    if not targets:
        raise UsageError("name a bus as MODULE:BUS, for all its queues, or a queue with --queue NAME")
    settings: Settings | None = None
    names: dict[str, None] = {}
    for target in targets:
        if ":" not in target:
            names[target if target.endswith(".dlq") or target == "ob.lost" else f"{target}.dlq"] = None
            continue
        bus = load_bus(target)
        of_bus = settings_of(bus)
        if settings is not None and settings.broker_url != of_bus.broker_url:
            raise UsageError(f"{target} is on another broker ({masked(of_bus.broker_url or '')}); look at one broker at a time")
        settings = of_bus
        for handler in bus.handlers:
            names[f"{handler.queue}.dlq"] = None
    if not names:
        raise UsageError(f"{', '.join(targets)}: has no handlers, and so no queues")
    return settings or environment_settings(), list(names)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[DeadLetters]:
    assert settings.broker_url is not None
    if scheme_of(settings.broker_url) == "memory":
        raise UsageError(
            "ORDERBUS_BROKER_URL is memory://: its messages live inside the process that runs the bus, out of reach for any other; "
            "to look after dead letters from outside, run on RabbitMQ"
        )
    async with open_broker(settings.broker_url, name="orderbus dlq") as broker:
        yield DeadLetters(broker, window_s=settings.dedupe_window_s)


def _print_listing(listing: Listing) -> None:
    console().print(f"{listing.queue}: {listing.ready} dead letters, {len(listing.letters)} listed")
    if listing.letters:
        console().print(letters_table(listing.letters))


def _tell(as_json: bool, dry_run: bool, letter: Parked, outcome: Outcome, why: str) -> None:
    if as_json:
        print_json(
            {"event": outcome.value, "id": letter.event_id, "queue": letter.queue, "to": letter.origin, "why": why or None}
        )
    elif dry_run or outcome in (Outcome.REFUSED, Outcome.FAILED):
        name = letter.event_id or "a letter without an id"
        console().print(plain(f"{outcome.value}: {name} to {letter.origin}{f': {why}' if why else ''}"), soft_wrap=True)


def _print_replay(done: Replay, as_json: bool) -> None:
    counts: dict[str, Any] = {outcome.value: count for outcome, count in done.counts.items()}
    if as_json:
        print_json({"event": "done", "queue": done.queue, "ready": done.ready, "looked_at": done.looked_at, **counts})
    else:
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        console().print(f"{done.queue}: {said or 'nothing to replay'}; it held {done.ready}")
