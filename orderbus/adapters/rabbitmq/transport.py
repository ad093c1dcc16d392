"""The socket: its bytes split between aiormq (control) and our sinks (data).

aiormq lets its user make the transport, and reads frames from a StreamReader. Ours is fed the control frames only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from aiormq.connection import TransportFactory
from yarl import URL

from orderbus.adapters.rabbitmq.frames import HEARTBEAT_FRAME, FrameError, FrameSplitter

_LIVENESS_INTERVAL_S = 1.0


class SplitTransport(TransportFactory):
    """Makes one transport for one aiormq connection, plain or TLS by the scheme of its URL."""

    def __init__(self, splitter: FrameSplitter, on_lost: Callable[[str], None]) -> None:
        self._splitter = splitter
        self._on_lost = on_lost
        self.writer: asyncio.StreamWriter | None = None
        self.protocol: SplitProtocol | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        contexts = kwargs.pop("ssl_context_provider")
        context = await contexts.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = SplitProtocol(reader, self._splitter, self._on_lost)
        transport, _ = await loop.create_connection(lambda: protocol, url.host or "", url.port or 0, ssl=context, **kwargs)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        self.writer, self.protocol = writer, protocol
        return reader, writer

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()


class SplitProtocol(asyncio.StreamReaderProtocol):
    """Feeds a StreamReader with the frames that the splitter leaves over."""

    def __init__(self, reader: asyncio.StreamReader, splitter: FrameSplitter, on_lost: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(reader, loop=loop)
        self._reader = reader
        self._splitter = splitter
        self._on_lost = on_lost
        self._now = loop.time
        self._fed_at = self._now()
        self.is_ready = False
        """The handshake is over: only now may a heartbeat be slipped in."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not super(): it would let the StreamReader pause the socket. Prefetch bounds what arrives, and acks must go on.
        self._transport = transport
        self._over_ssl = transport.get_extra_info("sslcontext") is not None

    def data_received(self, data: bytes) -> None:
        try:
            control = self._splitter.feed(data)
        except FrameError as failure:
            self._on_lost(f"what the broker sent is not AMQP 0-9-1: {failure}")
            cast(asyncio.Transport, self._transport).abort()  # not isinstance: uvloop's transports are no subclasses
            return
        if control:
            self._fed_at = self._now()
            self._reader.feed_data(control)
        elif self.is_ready and self._now() - self._fed_at >= _LIVENESS_INTERVAL_S:
            # aiormq takes a connection for stuck when it reads no frame for three heartbeats; it sees none of the content.
            self._fed_at = self._now()
            self._reader.feed_data(HEARTBEAT_FRAME)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost(f"the connection was lost: {exc}" if exc else "the connection was closed")
        super().connection_lost(exc)
