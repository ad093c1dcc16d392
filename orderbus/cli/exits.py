"""How a command ends: its exit code, and an error as one clear message instead of a traceback."""

from __future__ import annotations

import enum
import functools
import sys
from collections.abc import Callable, Iterator
from typing import ParamSpec

import typer

from orderbus.errors import UnavailableError, UsageError, with_code

P = ParamSpec("P")


class ExitCode(enum.IntEnum):
    """The table is in the package's docstring."""

    FINE = 0
    FINDINGS = 1
    USAGE = 2
    UNCLEAN = 3
    UNAVAILABLE = 4


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Print what the caller or a server must mend as one message, with its exit code. Bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            for single in leaves(error):
                complain(str(single) if isinstance(single, UsageError) else with_code(str(single), getattr(single, "code", None)))
            raise typer.Exit(code) from None

    return wrapped


def complain(message: str) -> None:
    sys.stderr.write(f"orderbus: {message}\n")


def exit_code(error: Exception) -> ExitCode | None:
    """The code for an error (or a group of such errors) that needs no traceback; None for any other."""
    errors = list(leaves(error))
    if all(isinstance(single, UnavailableError) for single in errors):
        return ExitCode.UNAVAILABLE
    if all(isinstance(single, (UsageError, UnavailableError)) for single in errors):
        return ExitCode.USAGE
    return None


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The error itself, or those in a group: a task group wraps what its tasks raised."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
