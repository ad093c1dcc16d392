"""A broker on a vhost of this session, and queues that no other test uses."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio
import anyio.to_thread
import pytest
from hypothesis import settings

from orderbus._core.topology import Binding, Exchange, Queue, Topology
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker
from tests.servers import Missing, Rabbit, start_rabbit

# A test that is slow because its neighbours are busy has not failed.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


class Place:
    """An exchange with one queue on it, both new; `key` routes there, and `nowhere` does not."""

    key = "in.1"
    nowhere = "out.1"

    def __init__(self) -> None:
        self.exchange = f"x-{secrets.token_hex(4)}"
        self.queue = f"q-{secrets.token_hex(4)}"

    def topology(self, **arguments: Any) -> Topology:
        return Topology(
            (Exchange(self.exchange, "topic"),),
            (Queue(self.queue, **{"delivery_limit": 50, **arguments}),),
            (Binding(self.exchange, self.queue, "in.*"),),
        )


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": request.param == "uvloop"}


@pytest.fixture
async def broker(vhost_url: str) -> AsyncIterator[RabbitBroker]:
    async with open_broker(vhost_url, name="test") as broker:
        yield broker


@pytest.fixture
async def place(broker: RabbitBroker) -> AsyncIterator[Place]:
    place = Place()
    await broker.apply(place.topology())
    yield place
    # A quorum queue holds three files open, and a node that has no more to open accepts no connection.
    await delete_queue(broker, place.queue)


async def delete_queue(broker: RabbitBroker, queue: str) -> None:
    channel = await (await broker._consuming_connection()).open_plain_channel()
    await channel.queue_delete(queue)
    await channel.close()


@pytest.fixture(scope="session")
def private_rabbit() -> Iterator[Rabbit]:
    """A node that a test may block or kill."""
    with ExitStack() as stack:
        try:
            node = start_rabbit(stack)
        except Missing as error:
            if os.environ.get("CI"):
                pytest.fail(f"a server is missing, and CI may not skip: {error}", pytrace=False)
            pytest.skip(f"SERVER MISSING: {error}")
        yield node


async def have_closed(rabbit: Rabbit, vhost_url: str, name: str) -> None:
    """Close the connections of that name; the broker lists them a moment after they were opened."""
    with anyio.fail_after(30):
        while not await anyio.to_thread.run_sync(_close_connections, rabbit, vhost_url, name):
            pass


def _close_connections(rabbit: Rabbit, vhost_url: str, name: str) -> int:
    """Close the connections of the vhost whose name contains `name`, as an operator would; how many there were."""
    vhost = unquote(urlsplit(vhost_url).path[1:])
    closed = 0
    for line in rabbit.ctl("list_connections", "pid", "vhost", "client_properties").splitlines()[1:]:
        pid, of_vhost, properties = line.split("\t")
        if of_vhost == vhost and name in properties:
            rabbit.ctl("close_connection", pid, "closed by a test")
            closed += 1
    return closed
