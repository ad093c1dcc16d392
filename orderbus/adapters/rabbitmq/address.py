"""The broker's URL: what it may say, and how it is shown (without the password)."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from yarl import URL

from orderbus.errors import UsageError

_PORTS = {"amqp": 5672, "amqps": 5671}
_FILES = ("cafile", "certfile", "keyfile")
_TLS_OPTIONS = frozenset({*_FILES, "capath", "cadata"})
_OPTIONS = _TLS_OPTIONS | {"heartbeat"}

_AROUND_THE_HOSTS = re.compile(r"([^/?#]+://(?:[^/?#]*@)?)([^/?#@]*)(.*)", re.DOTALL)

HEARTBEAT_S = 20
"""The default: a peer that fell silent is noticed after about a minute."""


class Address(msgspec.Struct, frozen=True):
    """A checked URL. `url` holds the password; `shown` is for people."""

    url: str
    shown: str
    host: str
    port: int

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"


def parse_addresses(text: str) -> tuple[Address, ...]:
    """Check a URL whose host may be several, `amqp://user:password@one,two:5673/vhost`; an address for each, in their order.

    All else in it holds for each of them. Raises UsageError, never showing the password.
    """
    split = _AROUND_THE_HOSTS.fullmatch(text)
    if split is None:
        return (parse_address(text),)
    before, hosts, after = split.groups()
    return tuple(parse_address(f"{before}{host}{after}") for host in hosts.split(","))


def parse_address(text: str) -> Address:
    """Check a URL `amqp[s]://user:password@host[:port][/vhost][?option=value]`. Raises UsageError, never showing the password."""
    try:
        url = URL(text)
        port = url.port
    except ValueError as failure:
        raise UsageError(
            "the broker's URL can't be read; it should look like amqp://user:password@host:5672/vhost", code="OB102"
        ) from failure
    if url.scheme not in _PORTS:
        raise UsageError(f"the broker's URL has the scheme {url.scheme!r}; use amqp:// or amqps://", code="OB102")
    if not url.host:
        raise UsageError("the broker's URL names no host; it should look like amqp://user:password@host:5672/vhost", code="OB102")
    if not url.user or not url.password:
        raise UsageError(
            f"the broker's URL for {url.host} lacks user or password; there is no default for them: give both", code="OB102"
        )
    if "no_verify_ssl" in url.query:
        raise UsageError(
            "no_verify_ssl in the broker's URL is refused: name the issuer of its certificate with cafile= instead", code="OB103"
        )
    if unknown := sorted(set(url.query) - _OPTIONS):
        raise UsageError(
            f"the broker's URL has the unknown option {unknown[0]!r}; it may have {', '.join(sorted(_OPTIONS))}", code="OB102"
        )
    if url.scheme == "amqp" and (misplaced := sorted(set(url.query) & _TLS_OPTIONS)):
        raise UsageError(
            f"the broker's URL has the TLS option {misplaced[0]!r}, but its scheme is amqp://; use amqps://", code="OB102"
        )
    for option in _FILES:
        if option in url.query and not Path(url.query[option]).is_file():
            raise UsageError(
                f"the broker's URL for {url.host} has {option}={url.query[option]}, but there is no such file", code="OB102"
            )
    heartbeat = url.query.get("heartbeat", str(HEARTBEAT_S))
    if not heartbeat.isdecimal() or not 5 <= int(heartbeat) <= 600:
        raise UsageError(
            f"heartbeat={heartbeat} in the broker's URL: use 5 to 600 seconds; it is how a dead peer is noticed", code="OB102"
        )
    port = port or _PORTS[url.scheme]
    complete = url.with_port(port).update_query(heartbeat=heartbeat)
    shown = f"{url.scheme}://{url.host}:{port}{url.path if url.path != '/' else ''}"
    return Address(str(complete), shown, url.host, port)
