"""`orderbus publish`: an event by hand, read as its class reads it, and confirmed by the broker."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import anyio
import msgspec
import typer

from orderbus._core.codec import BodyDecoder
from orderbus._core.event import Event
from orderbus._core.message import JSON, Receipt
from orderbus._core.naming import nearest
from orderbus._core.samples import unread
from orderbus._core.settings import Settings, masked
from orderbus._core.signing import signing_keys
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import open_broker, scheme_of
from orderbus._runtime.relay import publish_rows
from orderbus._runtime.tx import Encoding
from orderbus.abc import OutboxRow
from orderbus.cli.audit import Audit, audited
from orderbus.cli.events import event_of
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.loading import load_bus, settings_of
from orderbus.cli.output import console, print_json
from orderbus.errors import MessageError, UnavailableError, UsageError

EXAMPLE = (
    "Example: orderbus publish services.payment:bus payments.declined "
    """'{"order_id": "0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f", "reason": "by hand"}'"""
)
AT_A_TIME = 500
MOST_EVENTS = 100_000
MOST_BYTES = 256 * 1024 * 1024
"""All of stdin is read and checked before the first event goes out; these bound the memory for it."""
_TAKEN = frozenset({Receipt.CONFIRMED, Receipt.UNROUTABLE})


@clear_errors
def publish(
    target: Annotated[str, typer.Argument(metavar="MODULE:BUS", help="A bus that consumes or returns the event.")],
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Such as orders.placed.")],
    body: Annotated[str, typer.Argument(metavar="BODY", help="The event as JSON; `-` reads stdin, one event a line.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the event, and send nothing.")] = False,
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the audit lines, which go to stderr, to this file, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each event.")] = False,
) -> None:
    """Publish an event at once, signed where the bus signs, and wait for the broker's confirm.

    It must be as its class says, and have no field that the class does not know: a misspelled one would be ignored by readers.
    Of several lines none is sent unless all are right; they go out in their order. Each gets a new event id, so what is
    published twice is handled twice. It does not go through the outbox, and asks nothing.

    Exit code 1: no queue is bound to the topic. 4: the broker is away, or did not confirm; then the event may have been sent.
    """
    bus = load_bus(target)
    settings = settings_of(bus)
    event = event_of(bus, topic)
    rows = _rows(bus, event, settings, body)
    with audited("publish", audit) as note:
        if dry_run:
            _tell([(row, "would-publish") for row in rows], note=None, as_json=as_json)
            return
        url = settings.broker_url or ""
        if scheme_of(url) == "memory":
            raise UsageError(
                "ORDERBUS_BROKER_URL is memory://: its queues live inside the process that runs the bus, out of reach",
                code="OB608",
            )
        receipts = anyio.run(_publish, url, rows, partial(_tell, note=note, as_json=as_json))
    if len(receipts) < len(rows) or not _TAKEN.issuperset(receipts):
        raise UnavailableError(f"{masked(url)} did not confirm all of them; {len(rows) - len(receipts)} were not sent")
    if event.__event_type__.unrouted == "keep" and Receipt.UNROUTABLE in receipts:
        complain(f"no queue is bound to {topic!r}, so nobody receives it: start its consumers first")
        raise typer.Exit(ExitCode.FINDINGS)


async def _publish(url: str, rows: Sequence[OutboxRow], tell: Callable[[Sequence[tuple[OutboxRow, str]]], None]) -> list[Receipt]:
    """Receipts of what was sent: it ends after the first part that was not taken, so that later events don't overtake."""
    receipts: list[Receipt] = []
    async with open_broker(url, name="orderbus publish") as broker:
        for start in range(0, len(rows), AT_A_TIME):
            some = rows[start : start + AT_A_TIME]
            try:
                answers = await publish_rows(broker, some, None, None)
            except UnavailableError:  # none of these was sent
                raise
            except BaseException:  # Ctrl-C
                tell([(row, Receipt.UNKNOWN.value) for row in some])
                raise
            tell(
                [
                    (row, "published" if receipt is Receipt.CONFIRMED else receipt.value)
                    for row, receipt in zip(some, answers, strict=True)
                ]
            )
            receipts += answers
            if not _TAKEN.issuperset(answers):
                break
    return receipts


def _rows(bus: Bus, event: type[Event], settings: Settings, body: str) -> list[OutboxRow]:
    """Every event read and encoded. Raises UsageError that names the line."""
    encoding = Encoding(
        form=bus._format,
        limit_bytes=settings.max_body_bytes,
        clock=time.time,
        rng=random.SystemRandom(),
        signing=signing_keys(settings.signing_keys),
    )
    decoder = BodyDecoder(event, limit_bytes=settings.max_body_bytes)
    rows = []
    for place, text in _lines(settings.max_body_bytes) if body == "-" else [("", body.encode(errors="surrogateescape"))]:
        try:
            read = decoder.decode(text, JSON)
            _check_fields(read, text)
            rows.append(encoding.row(read))
        except UsageError as error:
            raise UsageError(f"{place}{error.text}; nothing was sent", code=error.code) from None
        except MessageError as error:
            raise UsageError(f"{place}{error}; nothing was sent", code="OB615") from None
    if not rows:
        raise UsageError("stdin has no line with an event; nothing was sent", code="OB615")
    return rows


def _lines(limit_bytes: int) -> Iterator[tuple[str, bytes]]:
    read_bytes = count = number = 0
    while line := sys.stdin.buffer.readline(limit_bytes + 2):
        number += 1
        if not line.strip():
            continue
        count += 1
        read_bytes += len(line)
        if count > MOST_EVENTS or read_bytes > MOST_BYTES:
            raise UsageError(
                f"stdin has more than {MOST_EVENTS} events or {MOST_BYTES >> 20} MiB; split it. Nothing was sent", code="OB615"
            )
        yield f"line {number}: ", line.rstrip(b"\r\n")


def _check_fields(event: Event, text: bytes) -> None:
    """Readers ignore what they don't know, as they must; a person who writes it has misspelled something."""
    kind = type(event)
    try:
        sent = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # in what the class does not read
        raise UsageError(f"the body can't be read as a whole: {error}", code="OB615") from None
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    for path in unread(sent, event):
        name = path.removeprefix("$.")
        if not isinstance(sent, dict) or name not in sent:
            raise UsageError(f"{kind.__name__} has no field for {path}, which readers would ignore", code="OB615")
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
        raise UsageError(f"{kind.__name__} has no field {name!r}; {hint}", code="OB615")


def _tell(became: Sequence[tuple[OutboxRow, str]], *, note: Audit | None, as_json: bool) -> None:
    """All are written down before the first is printed: nobody may be reading any more, and they are sent all the same."""
    if note is not None:
        for row, outcome in became:
            note(outcome, topic=row.topic, id=str(row.event_id), key=row.key)
    for row, outcome in became:
        if as_json:
            print_json({"event": outcome, "id": row.event_id, "topic": row.topic, "key": row.key})
        else:
            console().print(f"{outcome}: {row.event_id} {row.topic}", soft_wrap=True)
