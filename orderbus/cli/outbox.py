"""`orderbus outbox`: what has not gone out yet, why, and trying or discarding it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, TypeVar

import anyio
import typer

from orderbus._core.outbox_rows import HeldRow, RowsWanted, State
from orderbus._runtime.opening import adapter, scheme_of
from orderbus.abc import OutboxDesk
from orderbus.cli.audit import Audit, ask, audited, require_consent
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.loading import settings_without_broker
from orderbus.cli.option_groups import Acting, All, AsJson, spread
from orderbus.cli.outbox_shown import row_data, rows_table, stats_tables
from orderbus.cli.output import console, plain, print_json
from orderbus.cli.parsing import parse_age, parse_event_id, parse_state
from orderbus.errors import UsageError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Events that have not gone out: waiting, scheduled or stuck in the outbox of ORDERBUS_DATABASE_URL.",
)

T = TypeVar("T")
Became = tuple[HeldRow, str, str]
"""A row, what became of it, and why."""

AT_A_TIME = 1_000


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """Which rows; each option but the age may be given more than once."""

    topic: Annotated[list[str] | None, typer.Option("--topic", help="Only of this topic; `*` and `?` match anything.")] = None
    key: Annotated[list[str] | None, typer.Option("--key", help="Only of this key; `*` and `?` match anything.")] = None
    event_id: Annotated[list[Any] | None, typer.Option("--id", parser=parse_event_id, metavar="ID", help="Only this event.")] = (
        None
    )
    reason: Annotated[
        list[str] | None, typer.Option("--reason", help="Only stuck ones with this reason; `*` and `?` match anything.")
    ] = None
    older_than: Annotated[
        float | None, typer.Option("--older-than", parser=parse_age, metavar="AGE", help="Only emitted longer ago: 15m, 2h, 3d.")
    ] = None

    def wanted(self, *states: State) -> RowsWanted:
        return RowsWanted(
            states=states,
            topics=tuple(self.topic or ()),
            keys=tuple(self.key or ()),
            ids=tuple(self.event_id or ()),
            reasons=tuple(self.reason or ()),
            older_than_s=self.older_than,
        )

    def check_chosen(self, everything: bool) -> None:
        """Raises UsageError for neither a filter nor `--all`, and for both."""
        if (self.wanted() == RowsWanted()) is not everything:
            raise UsageError(
                "say which events, by --topic, --key, --id, --reason or --older-than; or --all, without any", code="OB610"
            )

    @property
    def is_one(self) -> bool:
        return len(self.event_id or ()) == 1


States = Annotated[
    list[Any] | None, typer.Option("--state", parser=parse_state, metavar="waiting|scheduled|stuck", help="Only in this state.")
]
Limit = Annotated[int, typer.Option(min=1, help="The most events to list, the oldest first.")]
MostRows = Annotated[int | None, typer.Option("--limit", min=1, help="The most events, the oldest first.")]
Followers = Annotated[bool, typer.Option("--followers", help="Also the later events of their keys that are stuck behind them.")]


@app.command("list", epilog="Example: orderbus outbox list --state stuck --topic 'orders.*' --older-than 15m")
@clear_errors
@spread
def list_rows(choice: RowFilter, state: States = None, limit: Limit = 100, as_json: AsJson = False) -> None:
    """List events that have not gone out, oldest first, without their bodies."""
    rows = _at_desk(lambda desk: desk.rows(choice.wanted(*(state or ())), limit + 1))
    for row in rows[:limit] if as_json else ():
        print_json(row_data(row))
    if not as_json:
        console().print(rows_table(rows[:limit]) if rows else "nothing that was asked for is in the outbox")
    if len(rows) > limit:
        complain(f"there are more than {limit}; raise --limit to see them")


@app.command(epilog="Example: orderbus outbox stats --json")
@clear_errors
def stats(as_json: AsJson = False) -> None:
    """Count what has not gone out: by state and topic, with the oldest age; why it is stuck; which relays hold the buckets."""
    found = _at_desk(lambda desk: desk.stats())
    if as_json:
        print_json({"event": "outbox-stats", "held": found.held, "stuck": found.stuck, "holders": found.holders})
    else:
        console().print(stats_tables(found))


@app.command(epilog="Example: orderbus outbox retry --topic orders.placed")
@clear_errors
@spread
def retry(choice: RowFilter, acting: Acting, everything: All = False, limit: MostRows = None, as_json: AsJson = False) -> None:
    """Let stuck events be tried now instead of at their next time; those behind them follow. Asks first, but for a single `--id`.

    Exit code 1: one was not found, or waits for an earlier event of its key that was not chosen.
    """
    choice.check_chosen(everything)
    must_ask = not choice.is_one and require_consent("outbox retry", yes=acting.yes, dry_run=acting.dry_run)
    rows = _at_desk(lambda desk: desk.rows(choice.wanted("stuck"), limit))
    missing = _missing(choice, rows, limit)
    first = [row for row in rows if row.waits_for is None]
    with audited("outbox retry", acting.audit) as audit:
        if must_ask:
            ask(f"try {len(first)} stuck events now ({len(rows) - len(first)} more wait behind earlier ones)?")
        tried = frozenset[int]()
        if not acting.dry_run:
            tried = _at_desk(lambda desk: desk.retry([row.row_id for row in first]))
        became = []
        for row in rows:
            if row.waits_for is not None:
                became.append((row, "behind", f"it follows event {row.waits_for}"))
            elif acting.dry_run:
                became.append((row, "would-retry", ""))
            elif row.row_id in tried:
                became.append((row, "retried", ""))
            else:
                became.append((row, "gone", "it went out meanwhile, or was discarded"))
        _tell(became, as_json, audit if not acting.dry_run else None)
    heads = {row.event_id for row in first}
    left_behind = any(row.waits_for not in heads for row in rows if row.waits_for is not None)
    if left_behind:
        complain("some wait for an earlier event of their key that was not chosen: retry that one")
    if left_behind or missing:
        raise typer.Exit(ExitCode.FINDINGS)


@app.command(epilog="Example: orderbus outbox discard --id 0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f")
@clear_errors
@spread
def discard(
    choice: RowFilter,
    acting: Acting,
    state: States = None,
    followers: Followers = False,
    everything: All = False,
    limit: MostRows = None,
    as_json: AsJson = False,
) -> None:
    """Delete stuck or scheduled events for good: nobody will ever receive them.

    Events that are stuck behind one of them go out without it, unless `--followers` discards them, too. Exit code 1: one was not
    found, or is on its way already.
    """
    choice.check_chosen(everything)
    must_ask = require_consent("outbox discard", yes=acting.yes, dry_run=acting.dry_run)
    chosen, behind = _at_desk(lambda desk: _with_followers(desk, choice.wanted(*(state or ())), limit))
    missing = _missing(choice, chosen, limit)
    rows = [*chosen, *behind] if followers else chosen
    doomed = [row for row in rows if row.state != "waiting"]
    if behind and not followers:
        complain(f"{len(behind)} later events of their keys are stuck behind them, and go out without them; or say --followers")
    with audited("outbox discard", acting.audit) as audit:
        if must_ask:
            ask(f"discard {len(doomed)} events for good?")
        why = "it is on its way: only what is stuck or scheduled can be discarded"
        refused = [(row, "refused", why) for row in rows if row.state == "waiting"]
        _tell(refused, as_json, audit if not acting.dry_run else None)
        if acting.dry_run:
            _tell([(row, "would-discard", "") for row in doomed], as_json, None)
        is_complete = not refused and not missing
        if not acting.dry_run:
            is_complete &= _at_desk(lambda desk: _discard(desk, doomed, partial(_tell, as_json=as_json, audit=audit)))
    if not is_complete:
        raise typer.Exit(ExitCode.FINDINGS)


async def _with_followers(desk: OutboxDesk, wanted: RowsWanted, limit: int | None) -> tuple[list[HeldRow], list[HeldRow]]:
    chosen = list(await desk.rows(wanted, limit))
    stuck = tuple(row.row_id for row in chosen if row.state == "stuck" and row.key is not None)
    return chosen, list(await desk.rows(RowsWanted(behind=stuck))) if stuck else []


async def _discard(desk: OutboxDesk, rows: Sequence[HeldRow], tell: Callable[[Sequence[Became]], None]) -> bool:
    """Whether all of them were still there. Some at a time, for the relay waits meanwhile; of each key the last first, or those
    left would go out in between.
    """
    last_first = sorted(rows, key=lambda row: row.row_id, reverse=True)
    is_complete = True
    for start in range(0, len(last_first), AT_A_TIME):
        some = last_first[start : start + AT_A_TIME]
        gone = await desk.discard(some)
        tell([(row, "discarded", "") if row.event_id in gone else (row, "gone", "it went out meanwhile") for row in some])
        is_complete &= len(gone) == len(some)
    return is_complete


def _at_desk(work: Callable[[OutboxDesk], Awaitable[T]]) -> T:
    url = settings_without_broker().database_url
    if url is None:
        raise UsageError(
            "ORDERBUS_DATABASE_URL is not set; write postgresql://user:password@host:5432/dbname, or embedded", code="OB609"
        )
    if scheme_of(url) == "memory":
        raise UsageError(
            "ORDERBUS_DATABASE_URL is memory://: its rows live inside the process that runs the bus, out of reach for any other",
            code="OB608",
        )

    async def run() -> T:
        async with adapter(url).open_desk(url, name="orderbus outbox") as desk:
            return await work(desk)

    return anyio.run(run)


def _missing(choice: RowFilter, rows: Sequence[HeldRow], limit: int | None) -> bool:
    """Whether one that was asked for by its id is not there; it is named. Where none is there at all, that is the end."""
    if not rows:
        complain("nothing that was asked for is in the outbox; nothing was changed")
        raise typer.Exit(ExitCode.FINDINGS)
    if limit is not None and len(rows) >= limit:
        return False
    found = {row.event_id for row in rows}
    lacking = [event_id for event_id in choice.event_id or () if event_id not in found]
    for event_id in lacking:
        complain(f"event {event_id} is not there: it went out, is in another state, or is not of this outbox")
    return bool(lacking)


def _tell(became: Sequence[Became], as_json: bool, audit: Audit | None) -> None:
    """All are written down before the first is printed: nobody may be reading any more, and it is done all the same."""
    if audit is not None:
        for row, outcome, why in became:
            audit(outcome, state=row.state, topic=row.topic, id=str(row.event_id), why=why or None)
    for row, outcome, why in became:
        if as_json:
            print_json({"event": outcome, "id": row.event_id, "topic": row.topic, "state": row.state, "why": why or None})
        else:
            said = f"{outcome}: {row.event_id} {row.topic}{f': {why}' if why else ''}"
            console().print(plain(said), soft_wrap=True)
