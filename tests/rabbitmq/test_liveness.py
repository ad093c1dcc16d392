"""Heartbeats on a socket that is split: who is alive stays connected, and who is not is noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import anyio
import msgspec
import pytest

from orderbus._core.message import Outgoing, Receipt, Settlement
from orderbus._core.topology import Topology
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from orderbus.adapters.rabbitmq.address import HEARTBEAT_S, parse_address
from orderbus.adapters.rabbitmq.connection import CONNECT_S, Connection
from orderbus.adapters.rabbitmq.frames import HEARTBEAT, Sink
from orderbus.adapters.rabbitmq.publisher import CONFIRM_S
from orderbus.errors import UnavailableError
from tests.rabbitmq.conftest import Place, have_closed
from tests.servers import Rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

SHORT_S = 2  # with 1, RabbitMQ gives up a client that is late by a second
LONG_S = 3 * (SHORT_S + 1) + 1
"""Longer than three heartbeats, and longer than aiormq waits for a frame."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
async def within_two_minutes() -> AsyncIterator[None]:
    with anyio.fail_after(120):
        yield


@asynccontextmanager
async def impatient_broker(url: str) -> AsyncIterator[RabbitBroker]:
    """One with a heartbeat that no URL may ask for."""
    address = parse_address(url)
    short = msgspec.structs.replace(address, url=address.url.replace(f"heartbeat={HEARTBEAT_S}", f"heartbeat={SHORT_S}"))
    assert short != address
    broker = RabbitBroker([short], "test", CONNECT_S, CONFIRM_S)
    try:
        await broker.open()
        yield broker
    finally:
        await broker.close()


class Heartbeats:
    """Hears the heartbeats of the broker on a connection."""

    is_closed = False

    def __init__(self, connection: Connection) -> None:
        self._sink: Sink = connection._splitter.routes[0]
        self._heard = asyncio.Event()
        connection._splitter.routes[0] = self

    def frame(self, kind: int, data: bytes, start: int, end: int) -> bool:
        if kind == HEARTBEAT:
            self._heard.set()
        return self._sink.frame(kind, data, start, end)

    async def for_long(self) -> None:
        """Until they have come for longer than anyone would wait for the next."""
        now = asyncio.get_running_loop().time
        end = now() + LONG_S
        while now() < end:
            self._heard.clear()
            await self._heard.wait()


def message(place: Place, body: bytes = b"") -> Outgoing:
    return Outgoing(place.exchange, Place.key, body, "m", "test")


def connections(broker: RabbitBroker) -> tuple[Connection, Connection]:
    assert broker._publishing is not None
    assert broker._consuming is not None
    return broker._publishing, broker._consuming


async def test_idle_connections_stay(vhost_url: str) -> None:
    place = Place()
    async with impatient_broker(vhost_url) as broker:
        await broker.apply(place.topology())
        assert await broker.publish([message(place, b"before")]) == [Receipt.CONFIRMED]
        before = connections(broker)
        async with broker.subscribe(place.queue, prefetch=2) as subscription:
            (first,) = await subscription.receive()
            async with anyio.create_task_group() as tasks:
                for connection in before:
                    tasks.start_soon(Heartbeats(connection).for_long)
            assert await broker.publish([message(place, b"after")]) == [Receipt.CONFIRMED]
            (second,) = await subscription.receive()
            assert (first.body, second.body) == (b"before", b"after")
            subscription.settle(first, Settlement.ACK)
            subscription.settle(second, Settlement.ACK)
            await subscription.flush()
        assert connections(broker) == before


async def test_connections_that_carry_nothing_but_content_stay(vhost_url: str) -> None:
    place = Place()
    now = asyncio.get_running_loop().time
    async with impatient_broker(vhost_url) as broker:
        await broker.apply(place.topology())
        async with broker.subscribe(place.queue, prefetch=10) as subscription:
            end, count = now() + LONG_S, 0
            while now() < end:
                # The broker has something to send all the time, so it sends no heartbeat.
                assert await broker.publish([message(place, b"%d" % count)]) == [Receipt.CONFIRMED]
                (delivery,) = await subscription.receive()
                assert delivery.body == b"%d" % count
                subscription.settle(delivery, Settlement.ACK)
                count += 1
            await subscription.flush()
        assert [connection.lost for connection in connections(broker)] == [None, None]


class Line:
    """Passes bytes on between us and a real server, until it is dead: then both sides hear nothing, and no end either."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._alive = asyncio.Event()
        self._alive.set()

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[tuple[Line, str]]:
        """A line to the server of that URL, and the URL of its near end."""
        parts = urlsplit(url)
        line = cls(parts.hostname or "", parts.port or 5672)
        async with await asyncio.start_server(line._serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            yield line, urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}"))

    def die(self) -> None:
        self._alive.clear()

    def revive(self) -> None:
        self._alive.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection(*self._address)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._copy(reader, behind_writer))
            tasks.create_task(self._copy(behind_reader, writer))

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._alive.wait()
                target.write(data)
                await target.drain()
        except OSError:
            pass  # either side may hang up
        finally:
            target.close()


async def test_a_server_that_falls_silent_is_noticed_by_who_waits_for_it_and_found_again(vhost_url: str) -> None:
    place = Place()
    async with Line.to(vhost_url) as (line, url):
        async with impatient_broker(url) as broker:
            await broker.apply(place.topology())
            assert await broker.publish([message(place, b"1")]) == [Receipt.CONFIRMED]
            async with broker.subscribe(place.queue, prefetch=10) as subscription:
                (delivery,) = await subscription.receive()
                assert delivery.body == b"1"
                line.die()
                async with anyio.create_task_group() as tasks:
                    receipts: list[Receipt] = []

                    async def publish() -> None:
                        receipts.extend(await broker.publish([message(place, b"2")] * 3))

                    tasks.start_soon(publish)
                    with pytest.raises(UnavailableError, match=place.queue):
                        await subscription.receive()
                assert receipts == [Receipt.UNKNOWN] * 3
                subscription.settle(delivery, Settlement.ACK)  # to nobody: it comes again
            line.revive()
            assert await broker.publish([message(place, b"3")]) == [Receipt.CONFIRMED]
            async with broker.subscribe(place.queue, prefetch=10) as subscription:
                bodies: list[bytes] = []
                while not {b"1", b"3"} <= set(bodies):
                    for delivery in await subscription.receive():
                        bodies.append(delivery.body)
                        subscription.settle(delivery, Settlement.ACK)
                await subscription.flush()
            assert set(bodies) <= {b"1", b"2", b"3"}


async def test_a_publish_that_a_silent_server_does_not_even_read_is_given_up(vhost_url: str) -> None:
    place = Place()
    async with Line.to(vhost_url) as (line, url), impatient_broker(url) as broker:
        await broker.apply(place.topology())
        assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]
        line.die()
        receipts = await broker.publish([message(place, bytes(1_000_000))] * 40)  # more than all buffers on the way hold
        assert receipts == [Receipt.UNKNOWN] * 40
        assert connections(broker)[0].lost is not None
        line.revive()
        assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]


async def test_a_write_after_the_stream_was_ended_is_a_lost_connection_and_no_error(vhost_url: str) -> None:
    """aiormq ends the stream when it sees that the broker has gone, a moment before it says so."""
    connection = Connection(parse_address(vhost_url), "test")
    await connection.connect(CONNECT_S)
    writer = connection._transport.writer
    assert writer is not None
    writer.write_eof()

    connection.write(b"whatever")

    assert connection.lost == "the connection was closed"
    await connection.close()


async def test_a_lost_connection_is_told_of_without_a_traceback(
    rabbit: Rabbit, vhost_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_broker(vhost_url, name="told") as broker:
        await broker.apply(Topology())
        await have_closed(rabbit, vhost_url, "told")

    told = [record for record in caplog.records if record.name == "aiormq.connection"]
    assert told
    assert not any(record.exc_info for record in told)


async def test_whatever_aiormq_raises_for_a_server_that_hung_up_is_a_lost_connection(vhost_url: str) -> None:
    """Over TLS, where the last frame and the end arrive together, it raises Exception itself."""
    connection = Connection(parse_address(vhost_url), "test")

    async def hung_up() -> None:
        raise Exception

    with pytest.raises(UnavailableError, match=r"asking, .*: ConnectionError: the server closed the connection"):
        await connection.call(hung_up(), "asking", on_giving_up=lambda _: None)
