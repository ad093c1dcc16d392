"""`orderbus dlq export` and `import`: dead letters as JSON lines, exact in their bytes, and back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import anyio
import typer

from orderbus._core.letter_record import read_record, write_record
from orderbus._core.message import Incoming
from orderbus._core.parked import Wanted, read_parked
from orderbus._runtime.dead_letters import DeadLetters, Looked, Tally
from orderbus.cli.audit import ask, audited, require_consent
from orderbus.cli.dlq_queues import find_queues, on_each, opened, print_tally, teller
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.loading import environment_settings
from orderbus.cli.option_groups import Acting, AsJson, LetterFilter, Most, Queues, Rate, spread
from orderbus.errors import UsageError

EXPORT_EXAMPLE = "Example: orderbus dlq export services.payment:bus --since 1d --output letters.jsonl"
IMPORT_EXAMPLE = "Example: orderbus dlq import letters.jsonl --dry-run"

NewFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Store them here first, as `dlq export` does; a new file.")]


@clear_errors
@spread
def export_letters(
    queues: Queues,
    choice: LetterFilter,
    limit: Most = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="A new file; stdout unless given.")] = None,
    audit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the audit lines, which go to stderr, to this file, too.")
    ] = None,
) -> None:
    """Write dead letters as JSON lines: exact bytes (in base64), all headers. They stay where they are.

    Exit code 1: there are more letters than were looked at; raise `--hold`.
    """
    found = find_queues(queues.named)
    exported = dict.fromkeys(found.names, 0)
    with audited("dlq export", audit) as note, writer(output) as keep:

        async def export(letters: DeadLetters, name: str) -> Looked:
            def store(deliveries: Sequence[Incoming]) -> None:
                (keep or _to_stdout)(deliveries)
                exported[name] += len(deliveries)

            return await letters.visit(name, store, choice.wanted, limit=limit, hold=choice.hold)

        try:
            looks = on_each(found, export)
        finally:
            for name, count in exported.items():
                if count:
                    note("exported", queue=name, count=count)
    complain(f"{sum(exported.values())} letters exported")
    left = [
        f"{look.queue}: {look.looked_at} of {look.ready} letters were looked at; raise --hold to export more"
        for look in looks
        if look.looked_at < look.ready and (limit is None or exported[look.queue] < limit)
    ]
    for line in left:
        complain(line)
    if left:
        raise typer.Exit(ExitCode.FINDINGS)


@clear_errors
@spread
def import_letters(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `dlq export` or `dlq purge --export` wrote.")],
    choice: LetterFilter,
    acting: Acting,
    rate: Rate = None,
    as_json: AsJson = False,
) -> None:
    """Put exported letters back in their dead letter queues, but for those that are there: the same id with the same body.

    The whole file is read first, and nothing is changed where a line of it is wrong. Exit code 1: some were not confirmed.
    """
    must_ask = require_consent("dlq import", yes=acting.yes, dry_run=acting.dry_run)
    by_queue = _read(file, choice.wanted)
    with audited("dlq import", acting.audit) as audit:
        if must_ask:
            ask(f"put back {', '.join(f'{len(letters)} letters in {name}' for name, letters in by_queue.items())}?")
        tell = teller(as_json, acting.dry_run, audit)

        async def run() -> list[Tally]:
            async with opened(environment_settings()) as (broker, letters):
                for name in by_queue:
                    await broker.depth(name)
                return [
                    await letters.put_back(name, deliveries, dry_run=acting.dry_run, rate=rate, tell=tell)
                    for name, deliveries in by_queue.items()
                ]

        tallies = anyio.run(run)
    for done in tallies:
        print_tally(done, as_json)
    if not all(done.complete for done in tallies):
        raise typer.Exit(ExitCode.FINDINGS)


@contextmanager
def writer(file: Path | None) -> Iterator[Callable[[Sequence[Incoming]], None] | None]:
    """Something that stores letters in a new file, on disk when it returns; None without a file."""
    if file is None:
        yield None
        return
    try:
        stored = file.open("xb", buffering=0)
    except FileExistsError:
        raise UsageError(f"{file} is there already; name a new file", code="OB612") from None
    except OSError as error:
        raise UsageError(f"{file} can't be written: {error.strerror}", code="OB612") from None

    def keep(deliveries: Sequence[Incoming]) -> None:
        whole_bytes = stored.tell()
        left = memoryview(b"".join(map(write_record, deliveries)))
        try:
            while left:
                left = left[stored.write(left) :]
            os.fsync(stored.fileno())
        except OSError as error:
            stored.truncate(whole_bytes)  # a line that is cut short would make the file unreadable
            raise UsageError(
                f"{file} can't be written: {error.strerror}; what was stored there before this is whole", code="OB612"
            ) from error

    with stored:
        yield keep


def _to_stdout(deliveries: Sequence[Incoming]) -> None:
    sys.stdout.buffer.write(b"".join(map(write_record, deliveries)))
    sys.stdout.flush()


def _read(file: Path, wanted: Wanted) -> dict[str, list[Incoming]]:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}", code="OB612") from None
    by_queue: dict[str, list[Incoming]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            delivery = read_record(line)
        except UsageError as error:
            raise UsageError(f"{file}, line {number}: {error.text}; nothing was changed", code=error.code) from None
        if wanted.matches(read_parked(delivery)):
            by_queue.setdefault(delivery.queue, []).append(delivery)
    if not by_queue:
        raise UsageError(f"{file}: none of its {len(lines)} lines is a letter that was asked for", code="OB710")
    return by_queue
