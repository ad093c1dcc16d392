"""`orderbus dlq edit`: send a dead letter back with another body."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from uuid import UUID

import anyio
import click
import msgspec
import typer

from orderbus._core.codec import BodyDecoder
from orderbus._core.event import event_key, event_type
from orderbus._core.letter_record import edited_id
from orderbus._core.message import JSON
from orderbus._core.outbox_rows import Handled
from orderbus._core.parked import Parked, Wanted, refusal
from orderbus._core.settings import Settings
from orderbus._runtime.bus import Bus
from orderbus._runtime.dead_letters import Tally
from orderbus._runtime.looking import MOST_HELD
from orderbus._runtime.opening import adapter, scheme_of
from orderbus.cli.audit import ask, audited, can_ask, require_consent
from orderbus.cli.dlq_queues import Found, find_queues, on_each, opened, print_tally, teller
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.option_groups import Acting, AsJson, Hold, Queues, spread
from orderbus.errors import MessageError, UsageError

EXAMPLE = "Example: orderbus dlq edit 0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f services.payment:bus --body mended.json"


@clear_errors
@spread
def edit(
    event_id: Annotated[str, typer.Argument(help="The event's id, as `list` prints it.")],
    queues: Queues,
    acting: Acting,
    body: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The new body. Without it, $EDITOR opens the old one, on a terminal.")
    ] = None,
    keep_id: Annotated[bool, typer.Option("--keep-id", help="Keep the event's id, which makes it the same event.")] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="Do not check the body against the event class.")] = False,
    hold: Hold = MOST_HELD,
    as_json: AsJson = False,
) -> None:
    """Replay one dead letter with another body, to the queue that it came from; then take the parked copy away.

    With a bus among the targets the body must be what its handler can read, and the key must stay. It goes out as a new event, whose
    id follows from the old one: repeating an edit that was killed does no harm. With `--keep-id` it stays the same event, which its
    consumer parks as `id-reused` if it ever handled it. Exit code 1: it was not found, or not confirmed.
    """
    must_ask = require_consent("dlq edit", yes=acting.yes, dry_run=acting.dry_run)
    found = find_queues(queues.named)
    letter = _the_letter(found, event_id, hold)
    why = refusal(letter, now_s=time.time(), window_s=found.settings.dedupe_window_s)
    if why is not None:
        raise UsageError(f"event {event_id} can't be replayed, edited or not: {why}", code="OB704")
    new_body = _new_body(letter, body)
    if not unchecked:
        _check(letter, new_body, found.buses, found.settings)
    old_id = UUID(letter.event_id)
    new_id = old_id if keep_id else edited_id(old_id, letter.queue)
    if not unchecked and not keep_id and letter.handler is not None:
        _check_not_handled(old_id, letter.handler, found.settings.database_url)
    with audited("dlq edit", acting.audit) as audit:
        if must_ask:
            ask(
                f"send {letter.event_id} ({letter.reason}) to {letter.origin} as event {new_id}, with {len(new_body)} bytes "
                f"for {len(letter.body)}?"
            )
        tell = teller(as_json, acting.dry_run, audit, new_id=new_id)

        async def run() -> Tally:
            async with opened(found.settings) as (_, letters):
                await letters.returned(letter.queue, 1)
                return await letters.edit(letter, new_body, event_id=new_id, dry_run=acting.dry_run, hold=hold, tell=tell)

        done = anyio.run(run)
    print_tally(done, as_json, limited=True)
    if not as_json and done.complete and not acting.dry_run:
        typer.echo(f"event {new_id} is in {letter.origin}")
    if not done.complete:
        raise typer.Exit(ExitCode.FINDINGS)


def _check_not_handled(event_id: UUID, consumer: str, url: str | None) -> None:
    """A letter can be one that was handled: its process died after the commit, time and again. As a new event it would be twice."""
    if url is None or scheme_of(url) == "memory":
        return

    async def handled() -> Sequence[Handled]:
        async with adapter(url).open_desk(url, name="orderbus dlq") as desk:
            return await desk.handled(event_id)  # type: ignore[no-any-return]

    if any(one.consumer == consumer for one in anyio.run(handled)):
        raise UsageError(
            f"{consumer} has handled event {event_id}: its effect is there, and the edited one's would be beside it. "
            f"Purge the letter; or --unchecked sends it all the same. Nothing was changed",
            code="OB705",
        )


def _the_letter(found: Found, event_id: str, hold: int) -> Parked:
    wanted = Wanted(ids=(event_id,))
    listings = on_each(found, lambda letters, name: letters.list(name, wanted, limit=2, hold=hold))
    letters = [letter for listing in listings for letter in listing.letters]
    if not letters:
        complain(f"no dead letter of event {event_id!r} in {', '.join(found.names)}; nothing was changed")
        raise typer.Exit(ExitCode.FINDINGS)
    if len({letter.queue for letter in letters}) > 1:
        raise UsageError(
            f"event {event_id} is in {' and in '.join(letter.queue for letter in letters)}: name the queue to edit it in",
            code="OB706",
        )
    if len(letters) > 1:
        complain(f"event {event_id} is in {letters[0].queue} more than once; the oldest is edited")
    return letters[0]


def _new_body(letter: Parked, file: Path | None) -> bytes:
    if file is not None:
        try:
            new = file.read_bytes()
        except OSError as error:
            raise UsageError(f"the body {file} can't be read: {error.strerror}; nothing was changed", code="OB612") from None
    elif can_ask():
        new = _in_editor(letter)
    else:
        raise UsageError("there is no terminal to edit at: give the new body by --body FILE; nothing was changed", code="OB611")
    if new == letter.body:
        raise UsageError("the body is the same as before; to send it again use `orderbus dlq replay`", code="OB707")
    return new


def _in_editor(letter: Parked) -> bytes:
    is_json = letter.content_type in (JSON, None)
    try:
        text = letter.body.decode()
        shown = msgspec.json.format(text, indent=2) if is_json else text
    except msgspec.DecodeError:
        is_json, shown = False, text
    except UnicodeDecodeError:
        raise UsageError("the body is not text: give the new one by --body FILE; nothing was changed", code="OB707") from None
    edited = click.edit(shown, extension=".json" if is_json else ".txt")
    if edited is None or edited == shown:
        return letter.body
    try:
        return msgspec.json.format(edited.encode(), indent=-1) if is_json else edited.encode()
    except msgspec.DecodeError as error:
        raise UsageError(f"what was edited is no JSON: {error}; nothing was changed", code="OB707") from None


def _check(letter: Parked, body: bytes, buses: Sequence[Bus], settings: Settings) -> None:
    """The body as the queue's own handler would read it. Raises UsageError where it could not, or would find another key."""
    if not buses:
        complain("the body is not checked: name the MODULE:BUS that consumes it, and it is")
        return
    classes = [
        event
        for bus in buses
        for handler in bus.handlers
        for event in handler.events
        if handler.queue == letter.origin and event_type(event).topic == letter.topic
    ]
    if not classes:
        raise UsageError(
            f"no handler of {', '.join(bus.group for bus in buses)} reads {letter.topic!r} from {letter.origin}, so the body "
            f"can't be checked; --unchecked sends it all the same",
            code="OB708",
        )
    try:
        event = BodyDecoder(classes[0], limit_bytes=settings.max_body_bytes).decode(body, letter.content_type)
    except MessageError as error:
        raise UsageError(
            f"its handler would park it again as {error.reason}: {error}; nothing was changed", code="OB707"
        ) from None
    key = event_key(event)
    if key != letter.key:
        raise UsageError(
            f"its key would change from {letter.key!r} to {key!r}, and with it its place in the order; nothing was changed",
            code="OB707",
        )
