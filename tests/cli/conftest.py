"""A project of the user's own for each test, and the command line in it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from typer.testing import CliRunner, Result

from orderbus.cli.app import app
from tests.rabbitmq.conftest import delete_queue

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
"""Nothing here takes this long; it ends a test that would wait for ever."""


class Project:
    """A folder with the user's modules, the environment of his shell, and the command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module = f"shop_{secrets.token_hex(6)}"
        self.environment = {"ORDERBUS_BROKER_URL": "memory://", "NO_COLOR": "1", "COLUMNS": "100"}
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def bus(self) -> str:
        return f"{self.module}:bus"

    def write(self, source: str, module: str = "") -> None:
        Path(self.folder, f"{module or self.module}.py").write_text(dedent(source), encoding="utf-8")

    def run(self, *arguments: str) -> Result:
        """The command line inside this process."""
        return CliRunner().invoke(app, arguments, env=self.environment)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command line as a process; ended with the test."""
        process = subprocess.Popen(
            [sys.executable, "-m", "orderbus", *arguments],
            cwd=self.folder,
            env={**os.environ, **self.environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def finish(self, *arguments: str) -> tuple[int, str, str]:
        """The command line as a process that ends by itself: exit code, stdout, stderr."""
        return ended(self.start(*arguments))


async def delete_queues(broker: Any, *queues: str) -> None:
    """A quorum queue holds three files open, and a node that has no more to open accepts no connection."""
    for queue in queues:
        await delete_queue(broker, queue)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=LIMIT_S)
    return process.returncode, output, errors


def lines_until(lines: Iterable[str], text: str) -> list[str]:
    """Read up to the line that has the text."""
    seen: list[str] = []
    for line in lines:
        seen.append(line)
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{''.join(seen)}")


@contextmanager
def stranger(database_url: str) -> Iterator[tuple[str, str]]:
    """A role without any right: its name, and the database's URL for it."""
    name = f"stranger_{secrets.token_hex(4)}"
    parts = urlsplit(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"create role {name} login")  # type: ignore[arg-type]
        try:
            yield name, urlunsplit(parts._replace(netloc=f"{name}@{parts.netloc.rpartition('@')[2]}"))
        finally:
            connection.execute(f"drop owned by {name}")  # type: ignore[arg-type]
            connection.execute(f"drop role {name}")  # type: ignore[arg-type]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in _settings():
        monkeypatch.delenv(name)
    yield project
    for process in project.processes:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=LIMIT_S)


def _settings() -> list[str]:
    return [name for name in os.environ if name.startswith("ORDERBUS_") and not name.startswith("ORDERBUS_TEST_")]
