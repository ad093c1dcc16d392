"""What the services have in common: a broker, a database, a subscription, and a pause before a failed message returns."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import uvloop
from faststream import AckPolicy, BaseMiddleware, FastStream
from faststream.exceptions import HandlerException
from faststream.message import StreamMessage
from faststream.rabbit import Channel, RabbitBroker

from bench.by_hand_shop.database import new_pool
from bench.by_hand_shop.events import Event
from bench.by_hand_shop.topology import EVENTS, queue

PAUSE_S = 0.5
CONNECTIONS = 10
PREFETCH = 100
"""So many of a queue are handled at once."""


class PauseBeforeReturn(BaseMiddleware[Any, Any]):
    """A message that failed is redelivered at once: without a pause, a second without the database would use up its deliveries."""

    async def consume_scope(self, call_next: Callable[[Any], Any], msg: Any) -> Any:
        try:
            return await call_next(msg)
        except HandlerException:
            raise
        except Exception:
            await asyncio.sleep(PAUSE_S)
            raise


class Service:
    """A consumer of events with a database: `@service.on(Kind)` subscribes, and aio-pika runs each delivery as a task of its own.

    FastStream runs without FastDepends, which would look at the types of every call again, and without a line in the log for each.
    """

    def __init__(self, name: str, connections: int = CONNECTIONS) -> None:
        self.name = name
        self.pool = new_pool(connections)
        self.broker = RabbitBroker(
            os.environ["SHOP_BROKER_URL"],
            apply_types=False,
            log_level=logging.DEBUG,
            logger=logging.getLogger("shop"),
            ack_policy=AckPolicy.NACK_ON_ERROR,
            middlewares=[PauseBeforeReturn],
            default_channel=Channel(on_return_raises=True),  # a confirmed message that no queue took is not sent
        )

    def on(self, kind: type[Event]) -> Any:
        """Subscribe to a topic, with a channel and so a prefetch of its own."""
        decode_body = msgspec.json.Decoder(kind).decode

        async def decode(message: StreamMessage[Any]) -> Event:  # not async, it would be run in a thread
            return decode_body(message.body)

        channel = Channel(prefetch_count=PREFETCH)
        return self.broker.subscriber(queue(self.name, kind.topic), EVENTS, channel=channel, decoder=decode, no_reply=True)

    async def execute(self, statement: str, event: Event, *values: object) -> None:
        """Handle an event with one statement, which begins with FRESH."""
        async with self.pool.connection() as connection:
            await connection.execute(statement, (self.name, event.event_id, *values))

    def run(self, *beside: Callable[[], Any], before: Callable[[RabbitBroker], Any] | None = None) -> None:
        """Until SIGTERM, under uvloop; FastStream then waits for the messages in its hands. `beside` runs for as long."""

        @asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            async with self.pool:
                if before is not None:
                    await self.broker.connect()
                    await before(self.broker)
                tasks = [asyncio.create_task(one()) for one in beside]
                yield
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        logging.basicConfig(level=logging.INFO)
        uvloop.run(FastStream(self.broker, lifespan=lifespan).run())
