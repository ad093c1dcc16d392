"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

import orderbus
from orderbus.cli import check, describe, dlq, explain, messages, outbox, publish, run, schema, top, topology

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 findings or something left undone, 2 wrong use, 3 a stop that was not clean, "
    "4 a server is not available.",
)
app.command("run", epilog=run.EXAMPLE)(run.run)
app.command("describe", epilog=describe.EXAMPLE)(describe.describe)
app.command("check", epilog=check.EXAMPLE)(check.check)
app.add_typer(messages.app, name="messages")
app.add_typer(schema.app, name="schema")
app.add_typer(topology.app, name="topology")
app.add_typer(dlq.app, name="dlq")
app.add_typer(outbox.app, name="outbox")
app.command("publish", epilog=publish.EXAMPLE)(publish.publish)
app.command("top", epilog=top.EXAMPLE)(top.top)
app.command("explain", epilog=explain.EXAMPLE)(explain.explain)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orderbus {orderbus.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Runs and looks after event-driven services built on orderbus. Settings come from the environment (ORDERBUS_…)."""
