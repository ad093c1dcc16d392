"""The same guarantees by hand, as a good engineer writes them: FastStream takes and sends the messages, psycopg 3 does the rest.

FastStream runs as in bench/peers/faststream_.py: a msgspec codec, no dependency injection, no logging.
Nothing here is batched: one message, one transaction, one publish. What could be saved without that is saved.
"""

from __future__ import annotations

import asyncio
import time
from uuid import UUID, uuid4

import msgspec
from faststream import AckPolicy
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitMessage, RabbitQueue
from psycopg_pool import AsyncConnectionPool

from bench.child import Gate, Report, Tally, main, percentiles
from bench.database import CONNECTIONS
from bench.job import Job, Sample, samples
from bench.wire import fill


class Delivered(msgspec.Struct):
    """A message and its id, by which the inbox knows it."""

    event_id: UUID
    sample: Sample


class Codec:
    """JSON by msgspec, both ways."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Sample).decode
        self._encode = msgspec.json.Encoder().encode

    async def decode(self, message: RabbitMessage) -> Delivered:
        return Delivered(UUID(message.message_id), self._decode(message.body))

    async def encode(self, sample: Sample, serializer: object = None) -> tuple[bytes, str]:
        return self._encode(sample), "application/json"


async def effect(job: Job, gate: Gate) -> None:
    """Inbox row and effect are one statement, and so one transaction in one round trip; then the event, confirmed; then the ack.

    The event is published for a duplicate, too: the process may have died between its commit and its publish.
    """
    channel = Channel(prefetch_count=job.prefetch, on_return_raises=True)
    broker = RabbitBroker(job.broker_url, default_channel=channel, codec=Codec(), apply_types=False, logger=None)
    pool = AsyncConnectionPool(
        job.database_url, min_size=CONNECTIONS, max_size=CONNECTIONS, open=False, kwargs={"autocommit": True}
    )
    done = broker.publisher(RabbitQueue(f"{job.queue}.done", queue_type=QueueType.QUORUM), persist=True)
    all_seen = asyncio.Event()
    tally = Tally(job.count, all_seen.set)
    once = f"""\
with first_time as (insert into {job.topic}_inbox (event_id) values (%s) on conflict do nothing returning event_id)
insert into {job.topic}_effect (number, order_id, customer_id, total_cents, note)
select %s, %s, %s, %s, %s from first_time"""

    @broker.subscriber(RabbitQueue(job.queue, queue_type=QueueType.QUORUM), ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(delivered: Delivered) -> None:
        sample = delivered.sample
        row = (delivered.event_id, sample.number, sample.order_id, sample.customer_id, sample.total_cents, sample.note)
        async with pool.connection() as connection:
            await connection.execute(once, row)
        await done.publish(sample)
        tally.saw(sample.number)

    await broker.connect()
    await broker.declare_queue(RabbitQueue(job.queue, queue_type=QueueType.QUORUM))
    fill(job)
    async with pool:
        await pool.wait()
        gate.go()
        await broker.start()
        await all_seen.wait()
        await broker.stop()
        gate.done(tally.report(gate))


async def outbox(job: Job, gate: Gate) -> None:
    """Both inserts go out together (psycopg's pipeline mode): a transaction takes two round trips."""
    orders, writers, latencies = list(samples(job)), job.options["writers"], []
    insert_order = (
        f"insert into {job.topic}_orders (number, order_id, customer_id, total_cents, note) values (%s, %s, %s, %s, %s)"
    )
    insert_event = f"insert into {job.topic}_outbox (event_id, topic, key, body) values (%s, %s, %s, %s)"
    size = min(writers, CONNECTIONS)
    pool = AsyncConnectionPool(job.database_url, min_size=size, max_size=size, open=False)

    async def save(order: Sample) -> None:
        async with pool.connection() as connection:
            async with connection.pipeline():
                await connection.execute(
                    insert_order, (order.number, order.order_id, order.customer_id, order.total_cents, order.note)
                )
                await connection.execute(insert_event, (uuid4(), job.topic, str(order.order_id), msgspec.json.encode(order)))

    async def writer(first: int) -> None:
        for order in orders[first::writers]:
            began = time.perf_counter()
            await save(order)
            latencies.append(time.perf_counter() - began)

    async with pool:
        await pool.wait()
        began = gate.go()
        async with asyncio.TaskGroup() as tasks:
            for first in range(writers):
                tasks.create_task(writer(first))
        seconds = time.perf_counter() - began
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


if __name__ == "__main__":
    main({"effect": effect, "outbox": outbox})
