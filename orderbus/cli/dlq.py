"""`orderbus dlq`: look at dead letters, send them back to their queues, edit, remove, export and import them."""

from __future__ import annotations

from typing import Annotated

import typer

from orderbus._core.parked import Wanted
from orderbus._runtime.dead_letters import Listing, Tally
from orderbus._runtime.looking import MOST_HELD
from orderbus.cli import dlq_edit, dlq_files
from orderbus.cli.audit import audited, require_consent
from orderbus.cli.dlq_queues import ask_about, find_queues, on_each, print_tally, teller
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.letters import as_data, brief_data, letters_table, shown_letter
from orderbus.cli.option_groups import Acting, All, AsJson, Hold, LetterFilter, Most, Queues, Rate, spread
from orderbus.cli.output import console, print_json

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Dead letters: messages that were parked, each with its reason. Looking at them takes none of them away.",
)


@app.command("list", epilog="Example: orderbus dlq list services.payment:bus --reason 'retries*' --since 2h")
@clear_errors
@spread
def list_letters(
    queues: Queues,
    choice: LetterFilter,
    limit: Annotated[int, typer.Option(min=1, help="The most letters to list of each queue.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List dead letters, oldest first, without their bodies. They stay where they are, in their order."""
    listings = on_each(
        find_queues(queues.named), lambda letters, name: letters.list(name, choice.wanted, limit=limit, hold=choice.hold)
    )
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
@spread
def show(
    event_id: Annotated[str, typer.Argument(help="The event's id, as `list` prints it.")],
    queues: Queues,
    hold: Hold = MOST_HELD,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a dead letter: reason, exception, times, headers, and its body. Exit code 1: not found."""
    wanted = Wanted(ids=(event_id,))
    listings = on_each(find_queues(queues.named), lambda letters, name: letters.list(name, wanted, limit=10, hold=hold))
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
@spread
def replay(
    queues: Queues,
    choice: LetterFilter,
    acting: Acting,
    everything: All = False,
    limit: Most = None,
    rate: Rate = None,
    as_json: AsJson = False,
) -> None:
    """Send dead letters back to the queues that they came from; their attempts are counted anew.

    Each is published, confirmed, and only then taken away; of one key, one after the other. It is safe to run this twice, and to
    kill it: an event keeps its id, and its handler's effect is applied once. Asks first, but for a single `--id`. Exit code 1: some
    were refused or not confirmed, and are still there.
    """
    wanted = choice.chosen(everything)
    is_many = len(wanted.ids) != 1
    must_ask = is_many and require_consent("dlq replay", yes=acting.yes, dry_run=acting.dry_run)
    found = find_queues(queues.named)
    with audited("dlq replay", acting.audit) as audit:
        if must_ask:
            ask_about("replay", found, wanted, limit=limit, hold=choice.hold)
        tell = teller(as_json, acting.dry_run, audit)
        tallies = on_each(
            found,
            lambda letters, name: letters.replay(
                name, wanted, limit=limit, rate=rate, dry_run=acting.dry_run, hold=choice.hold, tell=tell
            ),
        )
    _report(tallies, as_json, limit)


@app.command(epilog="Example: orderbus dlq purge --queue payment.orders.placed --reason unknown-topic --export gone.jsonl")
@clear_errors
@spread
def purge(
    queues: Queues,
    choice: LetterFilter,
    acting: Acting,
    everything: All = False,
    limit: Most = None,
    export: dlq_files.NewFile = None,
    as_json: AsJson = False,
) -> None:
    """Remove dead letters for good. With `--export FILE` each is on disk before it is removed, and `import` can put it back."""
    wanted = choice.chosen(everything)
    must_ask = require_consent("dlq purge", yes=acting.yes, dry_run=acting.dry_run)
    found = find_queues(queues.named)
    with audited("dlq purge", acting.audit) as audit, dlq_files.writer(None if acting.dry_run else export) as keep:
        if must_ask:
            ask_about("remove for good", found, wanted, limit=limit, hold=choice.hold)
        tell = teller(as_json, acting.dry_run, audit)
        tallies = on_each(
            found,
            lambda letters, name: letters.purge(
                name, wanted, limit=limit, dry_run=acting.dry_run, hold=choice.hold, keep=keep, tell=tell
            ),
        )
    _report(tallies, as_json, limit)


app.command("edit", epilog=dlq_edit.EXAMPLE)(dlq_edit.edit)
app.command("export", epilog=dlq_files.EXPORT_EXAMPLE)(dlq_files.export_letters)
app.command("import", epilog=dlq_files.IMPORT_EXAMPLE)(dlq_files.import_letters)


def _report(tallies: list[Tally], as_json: bool, limit: int | None) -> None:
    for done in tallies:
        print_tally(done, as_json, limited=limit is not None)
    if not all(done.complete for done in tallies):
        raise typer.Exit(ExitCode.FINDINGS)


def _print_listing(listing: Listing) -> None:
    console().print(f"{listing.queue}: {listing.ready} dead letters, {len(listing.letters)} listed")
    if listing.letters:
        console().print(letters_table(listing.letters))
