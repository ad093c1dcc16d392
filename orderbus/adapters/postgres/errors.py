"""Which of PostgreSQL's errors are whose: a server that is away, a clash to retry at once, or the statement's own fault."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg import errors

from orderbus.errors import TransientError, UnavailableError

__all__ = ["classify", "limited"]


@asynccontextmanager
async def limited(where: str, limit_s: float, *, is_ours: bool = False) -> AsyncIterator[None]:
    """Give a conversation with the server a time limit, and its errors a class: see `classify`.

    Raises UnavailableError when the limit is over; whether a commit in it took place is then unknown. Where the statements are
    ours (`is_ours`: the relay's, the upkeep's), one that the server cancels for its length is a server that is too slow: waited for.
    """
    try:
        async with asyncio.timeout(limit_s):
            yield
    except psycopg.Error as error:
        first = first_error(error)
        known = classify(first, where)
        if known is None and is_ours and isinstance(first, errors.QueryCanceled):
            known = UnavailableError(f"{where}: {str(first).splitlines()[0]}")
        if known is None:
            raise first from None
        raise known from first
    except TimeoutError as error:
        raise UnavailableError(f"{where}: no answer within {limit_s:g} s") from error


def classify(error: psycopg.Error, where: str) -> UnavailableError | None:
    """The orderbus error for a driver's error; None where it is the statement's own (a constraint, a syntax error, …)."""
    text = str(error).strip().splitlines()
    detail = f"{where}: {text[0] if text else type(error).__name__}"
    if _is_of_a_new_partition(error):
        return UnavailableError(detail) if error.diag.constraint_name else TransientError(detail)
    if isinstance(error, _TRANSIENT):
        return TransientError(detail)
    if isinstance(error, _UNAVAILABLE) or (error.sqlstate is None and isinstance(error, psycopg.OperationalError)):
        return UnavailableError(detail)
    if isinstance(error, errors.ConfigurationLimitExceeded) and "temp_file_limit" not in detail:  # which a statement exceeds
        return UnavailableError(detail)
    if isinstance(error, errors.ProgramLimitExceeded) and error.diag.source_file in _OUT_OF_IDS:
        return UnavailableError(detail)
    return None


def _is_of_a_new_partition(error: psycopg.Error) -> bool:
    """An inbox row was on its way into the default partition while the partition of its day was attached: the next try finds that.
    Or a constraint refuses it, until that is done."""
    return isinstance(error, errors.CheckViolation) and (error.diag.schema_name, error.diag.table_name) == (
        "orderbus",
        "inbox_default",
    )


def first_error(error: psycopg.Error) -> psycopg.Error:
    """The error that aborted a pipeline: psycopg raises the last it met, often PipelineAborted, with the cause in __context__."""
    while isinstance(error, errors.PipelineAborted) and isinstance(error.__context__, psycopg.Error):
        error = error.__context__
    return error


_OUT_OF_IDS = ("varsup.c", "multixact.c")
"""Where PostgreSQL stops before transaction ids wrap around. It says so in a language of its own choice; with the same code a
statement is told that a value is too large."""

_TRANSIENT = (errors.DeadlockDetected, errors.SerializationFailure, errors.LockNotAvailable)

_UNAVAILABLE = (
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.TooManyConnections,
    errors.DiskFull,
    errors.OutOfMemory,
    errors.InsufficientResources,
    errors.SystemError,
    errors.IoError,
    errors.IdleInTransactionSessionTimeout,
    errors.IdleSessionTimeout,
    errors.DatabaseDropped,
    errors.ReadOnlySqlTransaction,  # after a failover, until the name points to the new primary
    errors.ConnectionException,
    errors.ConnectionDoesNotExist,
    errors.ConnectionFailure,
    errors.SqlclientUnableToEstablishSqlconnection,
    errors.SqlserverRejectedEstablishmentOfSqlconnection,
)
