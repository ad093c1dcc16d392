"""Follows a page as a reader would: writes its files, types its commands in one shell, and compares what they print.

A block with a title is a file (`title="shop.py"`), or is added at its end (`title="shop.py, added"`). In a `console` block each line
after `$ ` is typed; the lines below it must be printed, in order, with `…` for what differs from run to run.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from tests.programs import ROOT

BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NEEDS_A_NETWORK = ("python -m venv", ". .venv/", "pip install", "docker ")
"""What a machine without one can't do; the tests have it all already."""
SHOWS_WHAT_OTHERS_DO = ("orderbus dlq list",)
"""Commands that look at what another process is about to do: typed again until it has, as a reader would."""
PATIENCE_S = 15.0


def follow(page: Path, folder: Path, environment: Mapping[str, str], instead: Mapping[str, str] | None = None) -> None:
    """Raises AssertionError, naming the command, where it fails or prints something else. `instead` replaces commands by their beginning."""
    with Shell(folder, environment) as shell:
        for language, title, text in BLOCK.findall(page.read_text()):
            if title:
                name, _, added = title.partition(", ")
                with (folder / name).open("a" if added else "w") as file:
                    file.write(text)
            elif language == "console":
                for command, expected in commands(text):
                    typed = next((to for beginning, to in (instead or {}).items() if command.startswith(beginning)), command)
                    if not typed.startswith(NEEDS_A_NETWORK):
                        check(command, expected, _seen(shell, typed, expected))


def _seen(shell: Shell, typed: str, expected: str) -> str:
    printed = shell.type(typed)
    deadline = time.monotonic() + PATIENCE_S
    while typed.startswith(SHOWS_WHAT_OTHERS_DO) and not is_as_said(expected, printed) and time.monotonic() < deadline:
        printed = shell.type(typed)
    return printed


def commands(text: str) -> list[tuple[str, str]]:
    """Each command of a console block with what stands below it."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def check(command: str, expected: str, printed: str) -> None:
    assert is_as_said(expected, printed), f"$ {command}\nprinted:\n{printed}\nthe page says:\n{expected}"


def is_as_said(expected: str, printed: str) -> bool:
    pattern = r"\s*".join(re.escape(line.strip()).replace("…", ".*?") for line in expected.splitlines() if line.strip())
    return re.search(pattern, printed) is not None


class Shell:
    """One bash, as in a terminal: what is exported or started in the background stays. Ended with all that it started."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("ORDERBUS_")}
        path = f"{Path(sys.executable).parent}:{plain['PATH']}"
        self._errors = Path(folder, "stderr.txt")
        with self._errors.open("w") as errors:
            self._bash = subprocess.Popen(
                ["bash", "--norc"],
                cwd=folder,
                env={**plain, "PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "140", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.communicate()

    def type(self, command: str) -> str:
        """What it printed on stdout. Raises AssertionError, with what it said on stderr, where its exit code is not 0."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        end = secrets.token_hex(8)
        self._bash.stdin.write(f"{command}\necho {end} $?\n")
        self._bash.stdin.flush()
        printed: list[str] = []
        for line in self._bash.stdout:
            if line.startswith(end):
                assert line == f"{end} 0\n", f"$ {command}\n{''.join(printed)}{self._errors.read_text()}"
                return "".join(printed)
            printed.append(line)
        raise AssertionError(f"$ {command}: the shell has ended\n{self._errors.read_text()}")
