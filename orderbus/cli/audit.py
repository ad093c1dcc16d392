"""Before and after a change: asking for it, and writing down who did what."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import typer

from orderbus.cli.exits import ExitCode, complain
from orderbus.errors import UsageError


class Audit:
    """One line of JSON for each thing that was done, on stderr and at the end of a file: who, when, what, with which outcome."""

    def __init__(self, verb: str, descriptor: int | None) -> None:
        self._verb = verb
        self._descriptor = descriptor
        self._user = _user()
        self.failure: OSError | None = None
        """Why a line is not in the file. What is being done goes on: the line is on stderr."""

    def __call__(self, outcome: str, **what: Any) -> None:
        line = msgspec.json.encode(
            {
                "audit": self._verb,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "user": self._user,
                **{name: value for name, value in what.items() if value is not None},
                "outcome": outcome,
            }
        )
        sys.stderr.write(line.decode() + "\n")
        if self._descriptor is not None:
            try:
                os.write(self._descriptor, line + b"\n")  # one write at the end: two people's lines do not mix
            except OSError as error:
                self.failure = self.failure or error


@contextmanager
def audited(verb: str, file: Path | None) -> Iterator[Audit]:
    """Opens the file before anything is changed. Raises UsageError where it can't be written, then or at the end."""
    if file is None:
        yield Audit(verb, None)
        return
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    except OSError as error:
        raise UsageError(f"the audit file {file} can't be written: {error.strerror}; nothing was changed", code="OB612") from None
    audit = Audit(verb, descriptor)
    try:
        yield audit
    finally:
        with suppress(OSError):  # a pipe, such as `>(logger)`, has nothing to sync
            os.fsync(descriptor)
        os.close(descriptor)
        if audit.failure is not None:
            complain(f"the audit file {file} lacks lines: {audit.failure.strerror}; all of them are on stderr")
    if audit.failure is not None:
        raise UsageError(f"what was asked for was done, and the audit file {file} does not have all of it", code="OB612")


def can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def require_consent(verb: str, *, yes: bool, dry_run: bool) -> bool:
    """Whether a person must still be asked. Raises UsageError where nobody can be."""
    if yes or dry_run:
        return False
    if not can_ask():
        raise UsageError(
            f"{verb} asks before it changes anything, and there is no terminal to ask at: say --yes; nothing was changed",
            code="OB611",
        )
    return True


def ask(question: str) -> None:
    """Ends the command where the answer is not yes."""
    if not typer.confirm(question, err=True):
        complain("nothing was changed")
        raise typer.Exit(ExitCode.FINDINGS)


def _user() -> str:
    """The account that the process runs as, and who became it by sudo: the environment alone could say anything."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    before = os.environ.get("SUDO_USER")
    return f"{name} (sudo by {before})" if before else name
