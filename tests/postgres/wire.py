"""A tap on the wire: a proxy in front of PostgreSQL or Redis that tells what went through it, statement by statement.

Counted at the socket, so nothing that a driver does by itself stays unseen: a Parse before a Bind, a Sync in the middle, a
`begin` of its own. It also keeps PostgreSQL's notices, by which auto_explain tells the plan of each statement that was run.
Formats: chapter "Frontend/Backend Protocol" of PostgreSQL's manual; the Redis serialization protocol (RESP).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import hiredis
from psycopg.conninfo import conninfo_to_dict

__all__ = ["Trip", "Wire", "open_postgres_wire", "open_redis_wire"]


class Trip(NamedTuple):
    """A round trip: what a client sent before it stopped to wait for the answer."""

    statements: tuple[str, ...]
    """What was executed, in order."""
    parsed: tuple[str, ...] = ()
    """What was sent to be parsed: nothing, once every statement of a path is prepared."""


class Wire:
    """What went over all connections made to `url` since the last `clear`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.trips: list[Trip] = []
        self.notices: list[str] = []
        self._changed = asyncio.Event()

    def clear(self) -> None:
        self.trips.clear()
        self.notices.clear()

    async def executed(self, words: str) -> None:
        """Wait until a statement with these words in it was sent."""
        async with asyncio.timeout(20):
            while not any(words in statement for statement in self.statements):
                await self._changed.wait()

    @property
    def statements(self) -> list[str]:
        return [statement for trip in self.trips for statement in trip.statements]

    @property
    def parsed(self) -> list[str]:
        return [statement for trip in self.trips for statement in trip.parsed]

    @property
    def plans(self) -> list[dict[str, Any]]:
        """What auto_explain said: for each statement an object with its `Query Text` and its `Plan`."""
        return [json.loads(notice[notice.index("{") :]) for notice in self.notices if notice.startswith("duration: ")]

    def add(self, trip: Trip) -> None:
        self.trips.append(trip)
        self._changed.set()
        self._changed = asyncio.Event()

    def __str__(self) -> str:
        """A line for each trip: what a test that fails should show."""
        lines = [f"{len(self.trips)} round trips with {len(self.statements)} statements:"]
        for n, trip in enumerate(self.trips, 1):
            parsed = f"  (parsed: {' | '.join(map(_brief, trip.parsed))})" if trip.parsed else ""
            lines.append(f"  {n}. {' | '.join(map(_brief, trip.statements)) or '-'}{parsed}")
        return "\n".join(lines)


@asynccontextmanager
async def open_postgres_wire(url: str) -> AsyncIterator[Wire]:
    """A trip ends with what is answered, a Sync, a Query or a Flush: psycopg waits for the answer to each.

    But a Flush with nothing before it is none: psycopg sends one after the Sync of a pipeline, and nobody answers it.
    """
    given = conninfo_to_dict(url)
    host, port = str(given.get("host") or "127.0.0.1"), int(given.get("port") or 5432)

    async def connect() -> _Streams:
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        return await asyncio.open_connection(host, port)

    async with _listening(connect, _PostgresTap) as (wire, own_port):
        plain = {"host": "127.0.0.1", "port": own_port, "sslmode": "disable", "gssencmode": "disable"}
        wire.url = "postgresql:///?" + urlencode({**given, **plain}, quote_via=quote)
        yield wire


@asynccontextmanager
async def open_redis_wire(url: str) -> AsyncIterator[Wire]:
    """A trip is a command, by its name alone."""
    parts = urlsplit(url)

    async def connect() -> _Streams:
        return await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 6379)

    async with _listening(connect, _RedisTap) as (wire, own_port):
        user, at, _ = parts.netloc.rpartition("@")
        wire.url = urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{own_port}"))
        yield wire


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _PostgresTap:
    """What one connection's bytes say, in both directions."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._up, self._down = bytearray(), bytearray()
        self._begun = False
        self._asks = False
        self._texts: dict[bytes, str] = {}
        self._portals: dict[bytes, str] = {}
        self._executed: list[str] = []
        self._parsed: list[str] = []

    def sent(self, data: bytes) -> None:
        self._up += data
        if not self._begun:  # the startup packet alone has no type, so it gets one
            self._up[:0] = b"\x00"
            self._begun = True
        for kind, body in _messages(self._up):
            if kind == b"P":
                name, text, *_ = body.split(b"\x00", 2)
                self._texts[name] = text.decode()
                self._parsed.append(text.decode())
            elif kind == b"B":
                portal, name, _ = body.split(b"\x00", 2)
                self._portals[portal] = self._texts[name]
            elif kind == b"E":
                self._executed.append(self._portals[body.split(b"\x00", 1)[0]])
            elif kind == b"Q":
                self._executed.append(body.rstrip(b"\x00").decode())
                self._end()
            elif kind == b"S" or (kind == b"H" and self._asks):
                self._end()
            self._asks = kind not in b"SQH"

    def answered(self, data: bytes) -> None:
        self._down += data
        for kind, body in _messages(self._down):
            if kind == b"N":
                fields = {field[:1]: field[1:] for field in body.split(b"\x00") if field}
                self._wire.notices.append(fields[b"M"].decode())

    def _end(self) -> None:
        self._wire.add(Trip(tuple(self._executed), tuple(self._parsed)))
        self._executed.clear()
        self._parsed.clear()


class _RedisTap:
    """A command has the form of an answer: an array of strings."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._commands = hiredis.Reader()

    def sent(self, data: bytes) -> None:
        self._commands.feed(data)
        while (command := self._commands.gets()) is not False:
            self._wire.add(Trip((command[0].decode().upper(),)))

    def answered(self, data: bytes) -> None:
        pass


def _messages(buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Take the whole messages out of a buffer: a byte for the kind, four for the size, which counts itself."""
    while len(buffer) >= 5 and len(buffer) > (size := int.from_bytes(buffer[1:5], "big")):
        kind, body = bytes(buffer[:1]), bytes(buffer[5 : size + 1])
        del buffer[: size + 1]
        yield kind, body


@asynccontextmanager
async def _listening(
    connect: Callable[[], Awaitable[_Streams]], tap: Callable[[Wire], _PostgresTap | _RedisTap]
) -> AsyncIterator[tuple[Wire, int]]:
    wire = Wire("")
    carriers: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await connect()
        tapped = tap(wire)
        await asyncio.gather(
            _pump(reader, upstream_writer, tapped.sent),
            _pump(upstream_reader, writer, tapped.answered),
        )

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        carriers.add(asyncio.create_task(carry(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as listener:
        yield wire, listener.sockets[0].getsockname()[1]
        for carrier in carriers:
            carrier.cancel()
        for outcome in await asyncio.gather(*carriers, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tell: Callable[[bytes], None]) -> None:
    """Told before it is passed on: who has the answer finds it counted."""
    try:
        while data := await reader.read(1 << 16):
            tell(data)
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass  # one end is gone, so the other one may go
    finally:
        writer.close()


def _brief(statement: str) -> str:
    words = " ".join(statement.split())
    return words if len(words) <= 60 else f"{words[:59]}…"
