"""Each test of this folder runs against every implementation of its protocol."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import aiormq
import anyio
import pytest

from orderbus.abc import Broker
from orderbus.adapters import memory
from tests.servers import Rabbit


@dataclass
class Server:
    """What the tests do to a broker beside speaking the protocol."""

    connect: Callable[[], AbstractAsyncContextManager[Broker]]
    """Another connection to the same broker."""
    delete_queue: Callable[[str], Awaitable[None]]
    drop_connections: Callable[[], Awaitable[None]]
    without_consumers: Callable[[str], Awaitable[None]]
    """Wait until a queue has none any more: RabbitMQ's may hand a message to one whose leaving it has not heard of yet."""


@pytest.fixture(
    params=[
        pytest.param(("memory", "asyncio"), id="memory-asyncio"),
        pytest.param(("memory", ("asyncio", {"use_uvloop": True})), id="memory-uvloop"),
        pytest.param(("memory", "trio"), id="memory-trio"),
        pytest.param(("rabbitmq", "asyncio"), id="rabbitmq", marks=pytest.mark.servers),
    ]
)
def broker_flavour(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The event loop of the implementation that the test runs against."""
    for flavour in ("broker_flavour", "claims_flavour", "store_flavour"):
        if flavour in request.fixturenames:
            return request.getfixturevalue(flavour)[1]
    return "asyncio"


@pytest.fixture
def name() -> str:
    """A prefix for queues and exchanges that no other test uses."""
    return f"contract-{secrets.token_hex(6)}"


@pytest.fixture
async def server(broker_flavour: tuple[str, Any], request: pytest.FixtureRequest, name: str) -> AsyncIterator[Server]:
    if broker_flavour[0] == "memory":
        url = f"memory://{name}"
        async with memory.open_broker(url, name=name) as broker:
            yield Server(
                connect=lambda: memory.open_broker(url, name=name),
                delete_queue=later(broker.delete_queue),
                drop_connections=later(broker.drop_connections),
                without_consumers=later(lambda queue: None),
            )
    else:
        yield _rabbitmq(request.getfixturevalue("rabbit"), request.getfixturevalue("vhost_url"), name)


@pytest.fixture
async def broker(server: Server) -> AsyncIterator[Broker]:
    async with server.connect() as broker:
        yield broker


def later(act: Callable[..., None]) -> Callable[..., Awaitable[None]]:
    async def later(*arguments: str) -> None:
        act(*arguments)

    return later


def _rabbitmq(rabbit: Rabbit, url: str, name: str) -> Server:
    from orderbus.adapters import rabbitmq

    async def delete_queue(queue: str) -> None:
        connection = await aiormq.connect(url)
        try:
            await (await connection.channel()).queue_delete(queue)
        finally:
            await connection.close()

    async def without_consumers(queue: str) -> None:
        connection = await aiormq.connect(url)
        try:
            channel = await connection.channel()
            while (await channel.queue_declare(queue, passive=True)).consumer_count:
                await anyio.lowlevel.checkpoint()
        finally:
            await connection.close()

    async def drop_connections() -> None:
        vhost = unquote(urlsplit(url).path[1:])
        await anyio.to_thread.run_sync(rabbit.ctl, "close_all_connections", "--vhost", vhost, "a test wants it")

    return Server(
        connect=lambda: rabbitmq.open_broker(url, name=name),
        delete_queue=delete_queue,
        drop_connections=drop_connections,
        without_consumers=without_consumers,
    )
