"""The tables of orderbus: as text for those with migrations of their own, applied, and checked. Versions are files in schema/."""

from __future__ import annotations

from importlib import resources
from typing import Any

import psycopg

from orderbus.adapters.postgres.partitions import create_first_partitions
from orderbus.adapters.postgres.pool import where_of
from orderbus.errors import UsageError

__all__ = ["apply", "check", "schema_sql", "versions"]

Connection = psycopg.AsyncConnection[Any]


def schema_sql(since: int = 0) -> str:
    """The SQL that brings a database from version `since` (0: nothing there) to this library's, to be run in one transaction."""
    return "\n".join([_BEGINNING, *(_step(version, sql) for version, sql in versions() if version > since)])


async def apply(connection: Connection) -> list[int]:
    """Bring the database to this library's version; which versions were applied. A new inbox has partitions for the coming days;
    those of an inbox that is there already are the upkeep's, which may be at work.

    One transaction, or a savepoint inside the caller's. Two appliers take turns. Raises UsageError where the database is newer.
    """
    if connection.info.encoding == "ascii":  # in SQL_ASCII psycopg gives text as bytes
        await connection.execute("set client_encoding = 'UTF8'")
    async with connection.transaction():
        await connection.execute(_LOCK)
        await connection.execute(_BEGINNING)
        present = await _present(connection)
        known = versions()
        _refuse_newer(where_of(connection.info.dsn), present, known[-1][0])
        applied = [version for version, _ in known if version > present]
        for version, sql in known:
            if version > present:
                await connection.execute(_step(version, sql))
        if not present:
            await create_first_partitions(connection)
    return applied


async def check(connection: Connection) -> None:
    """Raise UsageError where the schema is missing or of another version, naming the command that mends it."""
    cursor = await connection.execute("select to_regclass('orderbus.schema_version') is not null")
    row = await cursor.fetchone()
    present = await _present(connection) if row and row[0] else 0
    wanted = versions()[-1][0]
    where = where_of(connection.info.dsn)
    _refuse_newer(where, present, wanted)
    if present < wanted:
        what = f"is of version {present}; this orderbus needs {wanted}" if present else "is missing"
        raise UsageError(f"{where}: the database schema orderbus {what}; run `orderbus schema apply`", code="OB502")


def versions() -> list[tuple[int, str]]:
    """Every version's number and SQL, ascending."""
    folder = resources.files("orderbus.adapters.postgres") / "schema"
    files = [(int(file.name[:4]), file.read_text(encoding="utf-8")) for file in folder.iterdir() if file.name.endswith(".sql")]
    return sorted(files)


_LOCK = "select pg_advisory_xact_lock(hashtextextended('orderbus.schema', 0))"

_BEGINNING = """\
create schema if not exists orderbus;
create table if not exists orderbus.schema_version (
    version    integer     not null primary key,
    applied_at timestamptz not null default now()
);
"""


def _step(version: int, sql: str) -> str:
    return f"{sql}\ninsert into orderbus.schema_version (version) values ({version:d});\n"


async def _present(connection: Connection) -> int:
    cursor = await connection.execute("select coalesce(max(version), 0) from orderbus.schema_version")
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


def _refuse_newer(where: str, present: int, wanted: int) -> None:
    if present > wanted:
        raise UsageError(
            f"{where}: the database schema orderbus is of version {present}, this orderbus knows {wanted}; install a newer orderbus",
            code="OB503",
        )
