"""URLs, and what is said when no connection can be had."""

from __future__ import annotations

import asyncio
from random import Random
from urllib.parse import urlsplit, urlunsplit

import anyio
import pytest

from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import Queue, Topology
from orderbus.adapters.rabbitmq import open_broker
from orderbus.adapters.rabbitmq.address import parse_address, parse_addresses
from orderbus.errors import UnavailableError, UsageError
from tests.faults.proxy import Proxy
from tests.servers import free_port

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://u:secret@host/", "scheme 'http'"),
        ("amqp://host/", "lacks user or password"),
        ("amqp://user@host/", "lacks user or password"),
        ("amqp://u:secret@/", "names no host"),
        ("amqps://u:secret@host/?no_verify_ssl=1", "no_verify_ssl"),
        ("amqp://u:secret@host/?cafile=x", "use amqps://"),
        ("amqp://u:secret@host/?hartbeat=3", "unknown option 'hartbeat'"),
        ("amqp://u:secret@host/?heartbeat=0", "5 to 600"),
        ("amqp://u:secret@host:port/", "can't be read"),
        ("amqp://u:secret@one,two:port/", "can't be read"),
        ("amqp://u:secret@one,,two/", "names no host"),
        ("amqp://one,two/", "lacks user or password"),
        ("amqp://u:secret@one,two?hartbeat=3", "unknown option 'hartbeat'"),
    ],
)
def test_a_wrong_url_is_named_without_its_password(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_addresses(url)
    assert "secret" not in str(caught.value)


def test_an_address_is_shown_without_its_password() -> None:
    address = parse_address(f"amqps://user:secret@host/vhost?cafile={__file__}")
    assert (address.shown, address.host, address.port) == ("amqps://host:5671/vhost", "host", 5671)
    assert "secret" not in repr(address)


def test_each_of_several_hosts_has_all_else_of_the_url() -> None:
    first, second, third = parse_addresses("amqp://user:se,cret@one,two:5673,[::1]/v,host?heartbeat=30")
    assert [(each.host, each.port) for each in (first, second, third)] == [("one", 5672), ("two", 5673), ("::1", 5672)]
    assert all("user:se,cret@" in each.url and each.url.endswith("/v,host?heartbeat=30") for each in (first, second, third))
    assert first.shown == "amqp://one:5672/v,host"


async def refused(url: str, **limits: float) -> str:
    with pytest.raises(UnavailableError) as caught:
        async with open_broker(url, name="test", **limits):
            pytest.fail("it connected")
    assert "guest:guest" not in str(caught.value)
    return str(caught.value)


async def test_a_closed_port_is_named() -> None:
    port = free_port()
    assert f"amqp://127.0.0.1:{port}" in (text := await refused(f"amqp://guest:guest@127.0.0.1:{port}/"))
    assert "refused" in text.lower() or "Connect call failed" in text


async def test_a_host_that_does_not_exist_is_named() -> None:
    assert "amqp://no-such-host.invalid:5672" in await refused("amqp://guest:guest@no-such-host.invalid/")


async def test_of_several_hosts_each_that_is_away_is_named() -> None:
    ports = [free_port(), free_port()]
    text = await refused(f"amqp://guest:guest@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/")
    assert all(f"amqp://127.0.0.1:{port}" in text for port in ports)


@pytest.mark.servers
async def test_when_a_host_is_lost_another_of_the_url_is_taken(vhost_url: str) -> None:
    """Two ways to one broker, as a cluster's nodes are: whichever is used is cut, for good."""
    target = urlsplit(vhost_url)
    if target.hostname not in ("127.0.0.1", "localhost"):
        pytest.skip("the proxy passes on to this machine only, and the broker is elsewhere")
    ways = {proxy.port: proxy for proxy in (Proxy(target.port or 5672, Random(1)), Proxy(target.port or 5672, Random(2)))}
    hosts = ",".join(f"127.0.0.1:{port}" for port in ways)
    try:
        async with open_broker(
            urlunsplit(target._replace(netloc=f"{target.username}:{target.password}@{hosts}")), name="test"
        ) as broker:
            await broker.apply(Topology(queues=(Queue("moves", delivery_limit=1),)))
            assert await broker.publish([Outgoing("", "moves", b"", "m", "t")]) == [Receipt.CONFIRMED]
            used = broker._addresses[0].port
            async with broker.subscribe("moves", prefetch=5) as subscription:
                await subscription.receive()
                ways[used].refuse()
                with pytest.raises(UnavailableError):
                    await subscription.receive()
            async with broker.subscribe("moves", prefetch=5) as subscription:
                assert [delivery.routing_key for delivery in await subscription.receive()] == ["moves"]
            assert await broker.publish([Outgoing("", "moves", b"", "m", "t")]) == [Receipt.CONFIRMED]
            assert broker._addresses[0].port != used
    finally:
        for proxy in ways.values():
            proxy.close()


@pytest.mark.servers
async def test_a_wrong_password_is_told(vhost_url: str) -> None:
    parts = urlsplit(vhost_url)
    wrong = urlunsplit(parts._replace(netloc=f"guest:wr0ng@{parts.hostname}:{parts.port}"))
    text = await refused(wrong)
    assert "ACCESS_REFUSED" in text
    assert "wr0ng" not in text


@pytest.mark.servers
async def test_a_missing_vhost_is_told(vhost_url: str) -> None:
    assert "no-such-vhost" in await refused(urlunsplit(urlsplit(vhost_url)._replace(path="/no-such-vhost")))


async def serve(answer: bytes) -> asyncio.Server:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await reader.read()  # until the client hangs up
        writer.close()
        await writer.wait_closed()

    return await asyncio.start_server(talk, "127.0.0.1", 0)


async def test_a_server_that_is_silent_is_given_up() -> None:
    async with await serve(b"") as server:
        port = server.sockets[0].getsockname()[1]
        assert "no answer within 0.05 s" in await refused(f"amqp://guest:guest@127.0.0.1:{port}/", connect_s=0.05)


async def test_a_server_that_hangs_up_is_away_at_whatever_moment_it_does() -> None:
    proxy = Proxy(free_port(), Random(1))  # in a thread of its own, so the moment differs
    try:
        proxy.refuse()
        for _ in range(100):
            text = await refused(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
            assert f"can't connect to RabbitMQ at amqp://127.0.0.1:{proxy.port}: " in text
    finally:
        proxy.close()


async def test_a_server_that_speaks_http_is_recognised() -> None:
    async with await serve(b"HTTP/1.1 400 Bad Request\r\n\r\n") as server:
        port = server.sockets[0].getsockname()[1]
        assert "not AMQP 0-9-1" in await refused(f"amqp://guest:guest@127.0.0.1:{port}/")


@pytest.mark.servers
async def test_nothing_runs_on_after_the_end(vhost_url: str) -> None:
    before = asyncio.all_tasks()
    async with open_broker(vhost_url, name="test") as broker:
        assert await broker.publish([Outgoing("", "nowhere", b"", "m", "t")]) == [Receipt.UNROUTABLE]
        await broker.apply(Topology(queues=(Queue("ends", delivery_limit=1),)))
        async with broker.subscribe("ends", prefetch=5):
            pass
        assert broker._publishing is not None
        broker._publishing.abort("cut by the test")
        assert await broker.publish([Outgoing("", "nowhere", b"", "m", "t")]) == [Receipt.UNROUTABLE]
    await anyio.wait_all_tasks_blocked()
    assert asyncio.all_tasks() == before


@pytest.mark.servers
@pytest.mark.parametrize("step", range(0, 60, 3))
async def test_a_connect_cancelled_at_any_step_leaves_nothing_behind(vhost_url: str, step: int) -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(hold_open(vhost_url))
    for _ in range(step):
        await anyio.lowlevel.checkpoint()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await anyio.wait_all_tasks_blocked()
    assert asyncio.all_tasks() == before


async def hold_open(url: str) -> None:
    async with open_broker(url, name="test"):
        await anyio.sleep_forever()


async def test_a_cancelled_connect_leaves_nothing_behind() -> None:
    async with await serve(b"") as server:
        port = server.sockets[0].getsockname()[1]
        with anyio.move_on_after(0.05) as scope:
            async with open_broker(f"amqp://guest:guest@127.0.0.1:{port}/", name="test"):
                pytest.fail("it connected")
        assert scope.cancelled_caught
