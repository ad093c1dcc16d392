"""`orderbus describe`: every handler of a bus, and the events between several."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import msgspec
import typer
from rich.text import Text

from orderbus.cli.asyncapi import asyncapi
from orderbus.cli.describing import describe_bus, tables
from orderbus.cli.exits import clear_errors
from orderbus.cli.graph import flow_table, mermaid
from orderbus.cli.loading import load_buses
from orderbus.cli.output import console, print_json
from orderbus.errors import UsageError

EXAMPLE = "Example: orderbus describe services.payment:bus services.inventory:bus --format mermaid"

Format = Literal["table", "mermaid", "asyncapi"]


@clear_errors
def describe(
    targets: Annotated[list[str], typer.Argument(metavar="MODULE:BUS", help="The buses to describe.")],
    form: Annotated[
        Format,
        typer.Option("--format", help="table: the handlers; mermaid: who sends what to whom; asyncapi: an AsyncAPI 3 document."),
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON, one line for each bus.")] = False,
) -> None:
    """Show every handler with its event, queue, options and retry policy, and who sends what to whom. Needs no server and no settings.

    A group sends what its functions say they return; what code emits by `tx.emit` can't be seen from outside.
    """
    if as_json and form != "table":
        raise UsageError(f"--json prints the tables as JSON; leave it out with --format {form}", code="OB617")
    buses = load_buses(targets)
    described = [describe_bus(bus) for bus in buses]
    if form == "mermaid":
        typer.echo(mermaid(buses))
    elif form == "asyncapi":
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(asyncapi(buses)), indent=2).decode() + "\n")
    elif as_json:
        for one in described:
            print_json(one)
    else:
        for one in described:
            console().print(tables(one))
        if len(buses) > 1:
            console().print(Text("\nwho sends what to whom", style="bold"), flow_table(buses))
