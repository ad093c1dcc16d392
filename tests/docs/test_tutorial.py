"""The tutorial, followed to the letter: its files written, its commands typed, what they print compared."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.programs import ROOT

KEEP = "from orderbus.adapters.postgres.embedded import start_in; import pathlib; start_in(pathlib.Path('build/postgres').absolute()); input()"


@pytest.mark.servers
def test_the_tutorial_works_as_it_is_written(vhost_url: str) -> None:
    # Not pytest's own folder, which it closes to other users: run by root, the embedded PostgreSQL is one of them.
    with tempfile.TemporaryDirectory(prefix="orderbus-tutorial-", ignore_cleanup_errors=True) as name:
        with database_kept_up(Path(name)):
            follow(
                ROOT / "docs" / "tutorial.md",
                Path(name),
                {},
                instead={"export ORDERBUS_BROKER_URL=amqp:": f"export ORDERBUS_BROKER_URL={vhost_url}"},
            )


@contextmanager
def database_kept_up(folder: Path) -> Iterator[None]:
    """Spares each of the page's commands the start and the stop of the embedded PostgreSQL, which takes longer than the command."""
    with subprocess.Popen([sys.executable, "-c", KEEP], cwd=folder, stdin=subprocess.PIPE) as keeper:
        yield
        keeper.communicate(b"\n")
