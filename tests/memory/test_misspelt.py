"""A name that is nearly one that is known is answered with that one."""

from __future__ import annotations

import pytest

from orderbus import Bus, Event, Settings, UnavailableError, UsageError
from orderbus._core.topology import QueueNeed, topology_for
from orderbus.adapters.memory import open_broker

pytestmark = pytest.mark.anyio


class Placed(Event, topic="orders.placed"):
    pass


class Plcaed(Event, topic="orders.plcaed"):
    pass


class Else(Event, topic="shipments.left"):
    pass


async def test_a_queue(anyio_backend: object) -> None:
    async with open_broker("memory://", name="test") as broker:
        await broker.apply(topology_for([QueueNeed("shop.orders.placed", ("orders.placed",))]))

        with pytest.raises(UsageError, match=r"no queue 'shop\.order\.placed': did you mean 'shop\.orders\.placed'\?"):
            await broker.depth("shop.order.placed")


async def test_a_topic_that_is_sent_at_once(anyio_backend: object) -> None:
    bus = Bus("shop", settings=Settings(broker_url="memory://"))

    @bus.on(Placed)
    async def handle(event: Placed) -> None: ...

    async with bus:
        with pytest.raises(UnavailableError, match=r"no queue is bound to 'orders\.plcaed'.*; or did you mean 'orders\.placed'"):
            await bus.publish(Plcaed())
        with pytest.raises(UnavailableError, match=r"no queue is bound to 'shipments\.left': .*unrouted=\"drop\"$"):
            await bus.publish(Else())
