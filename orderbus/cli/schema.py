"""`orderbus schema`: the tables of orderbus in your database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
import typer

from orderbus._core.settings import masked
from orderbus._runtime.opening import adapter, open_store, scheme_of
from orderbus.cli.exits import ExitCode, clear_errors, complain
from orderbus.cli.loading import settings_without_broker
from orderbus.cli.output import print_json
from orderbus.errors import UsageError

app = typer.Typer(no_args_is_help=True, help="The tables of orderbus in ORDERBUS_DATABASE_URL: print, apply, check, keep up.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]


@app.command(epilog="Example: orderbus schema sql > migrations/0007_orderbus.sql")
@clear_errors
def sql(
    since: Annotated[int, typer.Option(min=0, help="The version that the database has already; 0 where there is nothing.")] = 0,
) -> None:
    """Print the SQL, for those who have migrations of their own. Needs no server; run it in one transaction."""
    module = adapter("postgresql://")
    typer.echo(module.schema.schema_sql(since))


@app.command("apply", epilog="Example: ORDERBUS_DATABASE_URL=postgresql://localhost/shop orderbus schema apply")
@clear_errors
def apply_schema(as_json: AsJson = False) -> None:
    """Bring the database to this version. Safe to run again, and from several places at once."""
    where, applied = anyio.run(_apply)
    if as_json:
        print_json({"event": "schema-applied", "database": where, "versions": applied})
    elif applied:
        typer.echo(f"{where}: applied version {', '.join(map(str, applied))}")
    else:
        typer.echo(f"{where}: is up to date")


@app.command(epilog="Example: orderbus schema check || orderbus schema apply")
@clear_errors
def check(as_json: AsJson = False) -> None:
    """Compare the database's version with the one that this library needs. Changes nothing; exit code 1 where they differ."""
    where, finding = anyio.run(_check)
    if as_json:
        print_json({"event": "schema-checked", "database": where, "ok": finding is None, "finding": finding})
    elif finding is None:
        typer.echo(f"{where}: is up to date")
    if finding is not None:
        if not as_json:
            complain(f"{where}: {finding}")
        raise typer.Exit(ExitCode.FINDINGS)


@app.command(epilog="Example: 17 3 * * * orderbus schema upkeep")
@clear_errors
def upkeep() -> None:
    """Make the inbox's partitions of the coming days, and drop those outside the dedupe window, as the tables' owner.

    That is ORDERBUS_DEDUPE_WINDOW_S, or the longest that the services using the database have.

    Every bus whose role owns the tables does so each hour. Where none does, run it once a day.
    """
    typer.echo(f"{anyio.run(_upkeep)}: is kept up")


async def _apply() -> tuple[str, list[int]]:
    async with _database() as (where, store):
        return where, await store.apply_schema()


async def _check() -> tuple[str, str | None]:
    async with _database() as (where, store):
        try:
            await store.check()
        except UsageError as error:
            return where, str(error)
        return where, None


async def _upkeep() -> str:
    async with _database() as (where, store):
        await store.check()
        await store.maintain(settings_without_broker().dedupe_window_s)
        return where


@asynccontextmanager
async def _database() -> AsyncIterator[tuple[str, Any]]:
    url = settings_without_broker().database_url
    if url is None:
        raise UsageError(
            "ORDERBUS_DATABASE_URL is not set; write postgresql://user:password@host:5432/dbname, or embedded", code="OB609"
        )
    if scheme_of(url) == "memory":
        raise UsageError("ORDERBUS_DATABASE_URL=memory:// keeps its rows inside one process and has no schema", code="OB608")
    async with open_store(url, name="orderbus schema", pool_size=1) as store:
        yield masked(url), store
