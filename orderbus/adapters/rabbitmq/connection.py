"""One connection to RabbitMQ: aiormq's control plane and our data plane on the same socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio
from aiormq.abc import AbstractChannel
from aiormq.connection import Connection as Control
from aiormq.exceptions import AMQPError, ChannelClosed

from orderbus.adapters.rabbitmq.address import Address
from orderbus.adapters.rabbitmq.calls import CALL_ERRORS, within
from orderbus.adapters.rabbitmq.content import ChannelSink, ConnectionSink
from orderbus.adapters.rabbitmq.frames import FrameSplitter
from orderbus.adapters.rabbitmq.transport import SplitTransport
from orderbus.errors import UnavailableError

CONNECT_S = 10.0
CALL_S = 30.0
"""The limit of one call: declaring a quorum queue on a busy cluster takes seconds."""
CLOSE_S = 5.0

_SERVERS_CHOICE = 131072
"""What RabbitMQ sends by default; used where it says that there is no limit."""

T = TypeVar("T")
log = logging.getLogger("orderbus.rabbitmq")


class _WithoutTraceback(logging.Filter):
    """aiormq tells of each lost connection with thirty lines of traceback. Who used it tells why it was lost."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.WARNING:
            record.exc_info = None
        return True


logging.getLogger("aiormq.connection").addFilter(_WithoutTraceback())


async def connect_to_one(addresses: Sequence[Address], name: str, limit_s: float = CONNECT_S) -> Connection:
    """A connection to the first of the addresses that takes one, each within `limit_s`. Raises UnavailableError that names all."""
    failures: list[UnavailableError] = []
    for address in addresses:
        connection = Connection(address, name)
        try:
            await connection.connect(limit_s)
        except UnavailableError as failure:
            failures.append(failure)
        else:
            if failures:
                log.warning("connected to %s instead: %s", address.shown, "; ".join(map(str, failures)))
            return connection
    if len(failures) == 1:
        raise failures[0]
    raise UnavailableError("; ".join(map(str, failures))) from failures[-1]


class Connection:
    """Open from `connect` on; `lost` says why it ended, and is None before."""

    def __init__(self, address: Address, name: str) -> None:
        self.address = address
        self.lost: str | None = None
        self.blocked: str | None = None
        """Why the broker takes no publishes at present (a memory or disk alarm), or None."""
        self._changed = asyncio.Event()
        self._splitter = FrameSplitter()
        self._splitter.routes[0] = ConnectionSink(self._on_lost, self._on_blocked)
        self._transport = SplitTransport(self._splitter, self._on_lost)
        properties: dict[str, Any] = {"connection_name": name, "product": "orderbus"}
        self._control = Control(address.url, transport_factory=self._transport, client_properties=properties)

    @property
    def frame_max(self) -> int:
        return self._control.connection_tune.frame_max or _SERVERS_CHOICE

    async def connect(self, limit_s: float = CONNECT_S) -> None:
        """Connect and authenticate. Raises UnavailableError, saying where and what was tried."""
        try:
            await within(limit_s, self._control.connect(), "connecting", on_giving_up=self._on_lost)
        except (*CALL_ERRORS, UnavailableError) as failure:
            detail = f"no answer within {limit_s:g} s" if isinstance(failure, UnavailableError) else describe(failure)
            if self.lost is not None and self.lost.startswith("what the broker sent"):
                detail = self.lost
            raise UnavailableError(f"can't connect to RabbitMQ at {self.address.shown}: {detail}") from failure
        else:
            assert self._transport.protocol is not None
            self._transport.protocol.is_ready = True
        finally:
            if self._transport.protocol is None or not self._transport.protocol.is_ready:
                self.abort("connecting failed or was cancelled")

    async def open_channel(self, make_sink: Callable[[int], ChannelSink]) -> AbstractChannel:
        """A channel whose content goes to a sink of ours. Raises UnavailableError."""
        channel = await self.open_plain_channel()
        self._splitter.routes[channel.number] = make_sink(channel.number)
        return channel

    async def open_plain_channel(self) -> AbstractChannel:
        """A channel that is aiormq's alone, for declarations. Raises UnavailableError."""
        return await self.call(self._control.channel(publisher_confirms=False), "opening a channel", on_giving_up=self._ignore)

    async def call(
        self, call: Coroutine[Any, Any, T], what: str, *, on_giving_up: Callable[[str], None], limit_s: float = CALL_S
    ) -> T:
        """A call of aiormq's. Raises ChannelClosed where the broker refused it, and UnavailableError for everything else."""
        try:
            return await within(limit_s, call, what, on_giving_up=on_giving_up)
        except ChannelClosed:
            raise
        except (*CALL_ERRORS, UnavailableError) as failure:
            raise UnavailableError(f"{what}, {self.address.shown}: {self.lost or describe(failure)}") from failure

    def write(self, data: bytes) -> None:
        """Send whole frames. Does nothing once the connection is lost."""
        if self.lost is None:
            assert self._transport.writer is not None
            try:
                self._transport.writer.write(data)
            except RuntimeError:  # aiormq has ended the stream already, and its word of that is still on its way to us
                self.abort("the connection was closed")

    async def drain(self) -> None:
        """Wait until the write buffer is below its high-water mark. Heartbeats bound it: a peer that is silent is given up."""
        assert self._transport.writer is not None
        try:
            await self._transport.writer.drain()
        except OSError as failure:
            raise UnavailableError(f"{self.address.shown}: {self.lost or failure}") from failure

    async def unblocked(self) -> None:
        """Wait while the broker takes no publishes. Raises UnavailableError when the connection goes."""
        while self.blocked is not None and self.lost is None:
            await self._changed.wait()
        if self.lost is not None:
            raise UnavailableError(f"{self.address.shown}: {self.lost}")

    async def close(self) -> None:
        """Say goodbye, and wait for the answer; after `CLOSE_S`, hang up."""
        with anyio.CancelScope(shield=True):
            try:
                await within(CLOSE_S, self._control.close(), "closing", on_giving_up=self._ignore)
            except (*CALL_ERRORS, UnavailableError) as failure:
                log.debug("closing the connection to %s: %s", self.address.shown, describe(failure))
            finally:
                self._on_lost("the connection was closed by us")
                self._transport.abort()

    def abort(self, reason: str) -> None:
        """Hang up. aiormq notices, and ends its tasks."""
        self._on_lost(reason)
        self._transport.abort()

    def _on_lost(self, reason: str) -> None:
        if self.lost is not None:
            return
        self.lost = reason
        self._changed.set()
        for sink in list(self._splitter.routes.values()):
            if isinstance(sink, ChannelSink):
                sink.fail(reason)

    def _on_blocked(self, reason: str | None) -> None:
        if reason is not None:
            log.warning("RabbitMQ at %s takes no publishes: %s", self.address.shown, reason)
        self.blocked = reason
        self._changed.set()
        self._changed.clear()

    def _ignore(self, reason: str) -> None:
        """Nothing of ours depends on it."""


def describe(failure: BaseException) -> str:
    """What the server said, or what the system did, in one line."""
    if isinstance(failure, AMQPError) and failure.args:
        return f"{type(failure).__name__}: {' '.join(str(argument) for argument in failure.args)}"
    if isinstance(failure, UnavailableError):
        return str(failure)
    if isinstance(failure, StopAsyncIteration):
        return "the server hung up"
    return f"{type(failure).__name__}: {failure}" if str(failure) else type(failure).__name__
