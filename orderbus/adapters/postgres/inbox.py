"""The inbox: a row for each (event, consumer), inserted in the effect's own transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orderbus.abc import InboxEntry, Verdict
from orderbus.adapters.postgres.arrays import int4_array, int8_array, uuid_array
from orderbus.adapters.postgres.trip import Call, Connection, rows_of, trip
from orderbus.errors import TransientError

__all__ = ["begin", "forget", "keep_windows", "number_consumers"]

_BEGIN = "begin isolation level read committed read write"

_INSERT = """\
insert into orderbus.inbox (event_id, consumer, body_hash)
select * from unnest(%b, %b, %b)
on conflict do nothing
returning event_id, consumer"""

# The rare statements are planned each time: a plan that was kept while a day's partition was empty may read all of it later.

_LOOK_UP = """\
select event_id, consumer, body_hash
from unnest(%b, %b) as wanted (event_id, consumer) join orderbus.inbox using (event_id, consumer)"""

_FORGET = """\
delete from orderbus.inbox using unnest(%b, %b) as gone (event_id, consumer)
where inbox.event_id = gone.event_id and inbox.consumer = gone.consumer"""


async def begin(connection: Connection, entries: Sequence[InboxEntry], numbers: Mapping[str, int]) -> list[Verdict]:
    """Begin a transaction and insert the entries in one round trip; a second one only where some were there already.

    Rows are inserted in the order of their ids: two batches that share ids then wait for each other instead of deadlocking.
    """
    if not entries:
        await trip(connection, [Call(_BEGIN)])
        return []
    wanted = _hash_by_row(entries, numbers)
    rows = sorted(wanted)
    columns = (
        uuid_array([event_id for event_id, _ in rows]),
        int4_array([number for _, number in rows]),
        int8_array([wanted[row] for row in rows]),
    )
    _, result = await trip(connection, [Call(_BEGIN), Call(_INSERT, columns)])
    if result.command_tuples == len(entries):
        return [Verdict.NEW] * len(entries)
    inserted = set(rows_of(connection, result))
    found = await _look_up(connection, [row for row in rows if row not in inserted])
    return _verdicts(entries, numbers, inserted, {**wanted, **found})


def forget(entries: Sequence[InboxEntry], numbers: Mapping[str, int]) -> Call:
    """Drop entries again, inside the transaction that inserted them."""
    ids = uuid_array([entry.event_id for entry in entries])
    return Call(_FORGET, (ids, int4_array([numbers[entry.consumer] for entry in entries])), keeps_plan=False)


async def number_consumers(connection: Connection, names: Sequence[str], window_s: float | None) -> dict[str, int]:
    """The number of each consumer, given to it now if it is new. In a transaction of its own: numbers outlive a rollback."""
    ordered = sorted(names)
    await connection.execute("insert into orderbus.consumer (name) select unnest(%s::text[]) on conflict do nothing", (ordered,))
    return await keep_windows(connection, ordered, window_s)


async def keep_windows(connection: Connection, names: Sequence[str], window_s: float | None) -> dict[str, int]:
    """Tell the upkeep, in whichever process it runs, how long these consumers need their rows; their numbers."""
    cursor = await connection.execute(_KEEP_WINDOWS, (window_s, list(names)))
    return dict(await cursor.fetchall())


# Locked in one order: the processes of a group do so at the same time.
_KEEP_WINDOWS = """\
update orderbus.consumer set window_s = coalesce(%s, window_s), seen_at = now()
from (select id from orderbus.consumer where name = any (%s) order by id for no key update) mine
where consumer.id = mine.id
returning name, consumer.id"""


def _hash_by_row(entries: Sequence[InboxEntry], numbers: Mapping[str, int]) -> dict[tuple[Any, int], int]:
    """What to insert: of entries that stand twice in a batch, the first."""
    wanted: dict[tuple[Any, int], int] = {}
    for entry in entries:
        wanted.setdefault((entry.event_id, numbers[entry.consumer]), entry.body_hash)
    return wanted


async def _look_up(connection: Connection, rows: Sequence[tuple[Any, int]]) -> dict[tuple[Any, int], int]:
    if not rows:
        return {}
    columns = uuid_array([event_id for event_id, _ in rows]), int4_array([number for _, number in rows])
    [result] = await trip(connection, [Call(_LOOK_UP, columns, keeps_plan=False)])
    found = {(event_id, number): body_hash for event_id, number, body_hash in rows_of(connection, result)}
    if len(found) < len(rows):
        raise TransientError("an inbox row that stood in the way is gone again; the next try will see it clearly")
    return found


def _verdicts(
    entries: Sequence[InboxEntry],
    numbers: Mapping[str, int],
    inserted: set[Any],
    hashes: dict[tuple[Any, int], int],
) -> list[Verdict]:
    new = set(inserted)
    verdicts = []
    for entry in entries:
        row = (entry.event_id, numbers[entry.consumer])
        if row in new:
            new.discard(row)
            verdicts.append(Verdict.NEW)
        else:
            verdicts.append(Verdict.DUPLICATE if hashes[row] == entry.body_hash else Verdict.CONFLICT)
    return verdicts
