"""`orderbus describe`: every handler of a bus, as a table."""

from __future__ import annotations

from typing import Annotated

import typer

from orderbus.cli.describing import describe_bus, tables
from orderbus.cli.exits import clear_errors
from orderbus.cli.loading import load_buses
from orderbus.cli.output import console, print_json

EXAMPLE = "Example: orderbus describe services.payment:bus --json"


@clear_errors
def describe(
    targets: Annotated[list[str], typer.Argument(metavar="MODULE:BUS", help="The buses to describe.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each bus.")] = False,
) -> None:
    """Show every handler with its event, queue, options and retry policy. Needs no server and no settings."""
    for bus in load_buses(targets):
        described = describe_bus(bus)
        if as_json:
            print_json(described)
        else:
            console().print(tables(described))
