"""What needs a RabbitMQ of one's own, or a wire of one's own: alarms, a killed broker, TLS."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import anyio
import anyio.to_thread
import pytest

from orderbus._core.message import Outgoing, Receipt, Settlement
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from orderbus.errors import UnavailableError
from tests.rabbitmq.conftest import Place
from tests.rabbitmq.test_liveness import Heartbeats, connections, impatient_broker
from tests.servers import Missing, Rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def message(place: Place, body: bytes = b"") -> Outgoing:
    return Outgoing(place.exchange, Place.key, body, "m", "test")


async def test_publishing_waits_while_the_broker_is_blocked_and_consuming_does_not(private_rabbit: Rabbit) -> None:
    place = Place()
    async with open_broker(private_rabbit.url, name="test") as broker:
        await broker.apply(place.topology())
        assert await broker.publish([message(place, b"before")]) == [Receipt.CONFIRMED]
        await ctl(private_rabbit, "set_vm_memory_high_watermark", "0.000001")
        connection = broker._publishing
        assert connection is not None
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                receipts: list[Receipt] = []

                async def publish() -> None:
                    # The broker says "blocked" only to a connection that publishes; so the first of these is under way.
                    receipts.extend(await broker.publish([message(place, b"during")]))
                    receipts.extend(await broker.publish([message(place, b"after")] * 3000))

                tasks.start_soon(publish)
                while connection.blocked is None:
                    await anyio.lowlevel.checkpoint()
                async with broker.subscribe(place.queue, prefetch=1) as subscription:
                    (delivery,) = await subscription.receive()
                    subscription.settle(delivery, Settlement.ACK)
                    await subscription.flush()
                assert delivery.body == b"before"
                assert len(receipts) <= 1
                assert connection._transport.writer is not None
                assert connection._transport.writer.transport.get_write_buffer_size() == 0  # what waits is not in the buffer
                await ctl(private_rabbit, "set_vm_memory_high_watermark", "0.4")
        assert receipts == [Receipt.CONFIRMED] * 3001


async def test_a_connection_that_is_blocked_for_long_stays(private_rabbit: Rabbit) -> None:
    place = Place()
    async with impatient_broker(private_rabbit.url) as broker:
        await broker.apply(place.topology())
        assert await broker.publish([message(place)]) == [Receipt.CONFIRMED]
        publishing, _ = before = connections(broker)
        await ctl(private_rabbit, "set_vm_memory_high_watermark", "0.000001")
        with anyio.fail_after(120):
            async with anyio.create_task_group() as tasks:
                receipts: list[Receipt] = []

                async def publish() -> None:
                    # The broker says "blocked" only to a connection that publishes; so the first of these is under way.
                    receipts.extend(await broker.publish([message(place)]))
                    receipts.extend(await broker.publish([message(place)] * 10))

                tasks.start_soon(publish)
                while publishing.blocked is None:
                    await publishing._changed.wait()
                await Heartbeats(publishing).for_long()
                assert len(receipts) <= 1
                await ctl(private_rabbit, "set_vm_memory_high_watermark", "0.4")
        assert receipts == [Receipt.CONFIRMED] * 11
        assert connections(broker) == before


@pytest.mark.crash
async def test_a_broker_that_dies_leaves_unknown_receipts_and_clear_errors(private_rabbit: Rabbit) -> None:
    place = Place()
    async with open_broker(private_rabbit.url, name="test") as broker:
        await broker.apply(place.topology())
        async with broker.subscribe(place.queue, prefetch=10) as subscription, anyio.create_task_group() as tasks:
            last: list[Receipt] = []

            async def publish_on_and_on() -> None:
                while True:
                    last[:] = await broker.publish([message(place)] * 500)

            async def consume_on_and_on() -> None:
                while True:
                    for delivery in await subscription.receive():
                        subscription.settle(delivery, Settlement.ACK)

            async def publish_until_it_dies() -> None:
                with pytest.raises(UnavailableError, match=re.escape(private_rabbit.url.split("@")[1].rstrip("/"))):
                    await publish_on_and_on()

            tasks.start_soon(publish_until_it_dies)
            while not last:
                await anyio.lowlevel.checkpoint()
            await ctl(private_rabbit, "eval", "erlang:halt(137, [{flush, false}]).")
            with pytest.raises(UnavailableError):
                await consume_on_and_on()
        assert set(last) <= {Receipt.CONFIRMED, Receipt.UNKNOWN}
        with pytest.raises(UnavailableError, match="can't connect to RabbitMQ"):
            await broker.depth(place.queue)


async def ctl(rabbit: Rabbit, *arguments: str) -> None:
    def run() -> None:
        try:
            rabbit.ctl(*arguments)
        except Missing:
            if arguments[0] != "eval":  # a node that halts can't answer
                raise

    await anyio.to_thread.run_sync(run)


async def test_tls_with_the_issuer_named(vhost_url: str, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    await anyio.run_process([*make, *names], stderr=subprocess.DEVNULL)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    parts = urlsplit(vhost_url)
    async with tls_in_front_of(parts.hostname or "", parts.port or 5672, context) as port:
        secure = urlunsplit(parts._replace(scheme="amqps", netloc=f"{parts.username}:{parts.password}@localhost:{port}"))
        with pytest.raises(UnavailableError, match=r"(?i)certificate"):
            async with open_broker(secure, name="test"):
                pytest.fail("an unknown issuer was accepted")
        async with open_broker(f"{secure}?cafile={certificate}", name="test") as broker:
            await round_trip(broker)


async def round_trip(broker: RabbitBroker) -> None:
    place = Place()
    await broker.apply(place.topology())
    bodies = [b"x" * size for size in range(0, 400_000, 40_000)]
    assert await broker.publish([message(place, body) for body in bodies]) == [Receipt.CONFIRMED] * len(bodies)
    received: list[bytes] = []
    async with broker.subscribe(place.queue, prefetch=20) as subscription:
        while len(received) < len(bodies):
            for delivery in await subscription.receive():
                received.append(delivery.body)
                subscription.settle(delivery, Settlement.ACK)
    assert received == bodies


@asynccontextmanager
async def tls_in_front_of(host: str, port: int, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Ends TLS and passes the bytes on to a real server."""

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        except OSError:
            pass  # either side may hang up
        finally:
            target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_connection(host, port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(reader, behind_writer))
            tasks.create_task(copy(behind_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]
