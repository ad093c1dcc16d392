"""The Redis URL: what it may say, and the place that it names, for error texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redis.asyncio.connection import parse_url

from orderbus.errors import UsageError

__all__ = ["place_of"]

_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SHAPE = "the Redis URL can't be read; write redis://user:password@host:6379/0"


def place_of(url: str) -> str:
    """Check a URL `redis://…`, `rediss://…` or `unix://…`; its `host:port/db`, or the socket's path.

    Raises UsageError, without repeating the URL (it may hold a password): for one that can't be read, that asks not to check the
    server's certificate, or that names a file which is not there.
    """
    try:
        given: Mapping[str, Any] = parse_url(url)
    except ValueError:
        raise UsageError(_SHAPE, code="OB105") from None
    server = given.get("path") or f"{given.get('host', 'localhost')}:{given.get('port', 6379)}"
    place = f"{server}/{given.get('db', 0)}"
    if given.get("ssl_cert_reqs", "required") != "required" or not given.get("ssl_check_hostname", True):
        raise UsageError(
            f"the Redis URL for {place} asks not to check the server's certificate, which is refused: "
            "name the issuer of its certificate with ssl_ca_certs= instead",
            code="OB103",
        )
    for option in _FILES:
        if option in given and not Path(given[option]).is_file():
            raise UsageError(f"the Redis URL for {place}: {option}={given[option]}: there is no such file", code="OB105")
    return place
