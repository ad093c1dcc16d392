"""faststream-outbox on asyncpg, with FastStream's RabbitMQ broker as the far end of its relay.

The relay stacks a publisher of the other broker on a subscriber of the outbox, as its documentation has it, and pulls what its page
on performance calls the levers: deletes in batches, a large fetch, several workers, autovacuum settings, short fetch intervals.
It looks into no body: the decoder hands the bytes on, so that none is parsed and written anew, and no types are applied to them,
which costs less than the documentation's own `body: dict`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec
from fast_depends.msgspec import MsgSpecSerializer
from faststream import AckPolicy
from faststream.rabbit import Channel, QueueType, RabbitBroker, RabbitMessage, RabbitQueue
from faststream_outbox import OutboxBroker, make_outbox_table, outbox_autovacuum_ddl
from faststream_outbox.annotations import OutboxMessage
from sqlalchemy import Column, Integer, MetaData, Table, Text, Uuid, insert, text
from sqlalchemy.dialects.postgresql import insert as insert_or_not
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from bench.child import Gate, Report, main, percentiles
from bench.database import CONNECTIONS, waiting_in_faststream_outbox
from bench.job import Job, Sample, samples
from bench.wire import fill

WORKERS = 16


async def outbox(job: Job, gate: Gate) -> None:
    """SQLAlchemy's Core on a connection: publishing takes one as well as a session, and the ORM would only add to it."""
    engine, metadata = _engine(job, CONNECTIONS), MetaData()
    broker = OutboxBroker(
        engine, outbox_table=await _outbox_table(job, engine, metadata), serializer=MsgSpecSerializer(), logger=None
    )
    table = _rows(f"{job.topic}_orders", metadata)
    orders, writers, latencies = list(samples(job)), job.options["writers"], []

    async def save(order: Sample) -> None:
        async with engine.begin() as connection:
            await connection.execute(insert(table), msgspec.structs.asdict(order))
            await broker.publish(order, queue=job.topic, session=connection)

    async def writer(first: int) -> None:
        for order in orders[first::writers]:
            began = time.perf_counter()
            await save(order)
            latencies.append(time.perf_counter() - began)

    await _open_all(engine, min(writers, CONNECTIONS))
    began = gate.go()
    async with asyncio.TaskGroup() as tasks:
        for first in range(writers):
            tasks.create_task(writer(first))
    seconds = time.perf_counter() - began
    await engine.dispose()
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def relay(job: Job, gate: Gate) -> None:
    engine = _engine(job, WORKERS + 1)
    table = await _outbox_table(job, engine, MetaData())
    async with engine.begin() as connection:
        await connection.execute(text(waiting_in_faststream_outbox(job, range(job.count))))
    rabbit = RabbitBroker(job.broker_url, default_channel=Channel(on_return_raises=True), apply_types=False, logger=None)
    gone = Gone(job.count)
    outbox = _relay(job, engine, table, rabbit, job.queue, gone)
    await rabbit.start()
    await _open_all(engine, WORKERS + 1)
    began = gate.go()
    await outbox.start()
    await gone.all.wait()
    seconds = time.perf_counter() - began
    await outbox.stop()
    await rabbit.stop()
    gate.done(Report(seconds, job.count))


async def effect(job: Job, gate: Gate) -> None:
    """Inbox row, effect and event in one transaction, and the relay in the same process."""
    engine, metadata = _engine(job, CONNECTIONS + WORKERS + 1), MetaData()
    table = await _outbox_table(job, engine, metadata)
    effects, inbox = _rows(f"{job.topic}_effect", metadata), Table(f"{job.topic}_inbox", metadata, Column("event_id", Uuid))
    first_time = insert_or_not(inbox).on_conflict_do_nothing().returning(inbox.c.event_id)
    channel = Channel(prefetch_count=job.prefetch, on_return_raises=True)
    rabbit = RabbitBroker(job.broker_url, default_channel=channel, codec=Codec(), apply_types=False, logger=None)
    gone = Gone(job.count)
    outbox = _relay(job, engine, table, rabbit, f"{job.queue}.done", gone)

    @rabbit.subscriber(RabbitQueue(job.queue, queue_type=QueueType.QUORUM), ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(delivered: Delivered) -> None:
        async with places, engine.begin() as connection:
            if (await connection.execute(first_time, {"event_id": delivered.event_id})).first() is not None:
                await connection.execute(insert(effects), msgspec.structs.asdict(delivered.sample))
                await outbox.publish(delivered.sample, queue=job.topic, session=connection)

    places = asyncio.Semaphore(CONNECTIONS)
    await rabbit.connect()
    await rabbit.declare_queue(RabbitQueue(job.queue, queue_type=QueueType.QUORUM))
    fill(job)
    await _open_all(engine, CONNECTIONS + WORKERS + 1)
    began = gate.go()
    await outbox.start()
    await rabbit.start()
    await gone.all.wait()
    seconds = time.perf_counter() - began
    await rabbit.stop()
    await outbox.stop()
    gate.done(Report(seconds, job.count))


async def backlog(job: Job, gate: Gate) -> None:
    """The first rows of many; see bench/workloads/backlog.py. The commit notifies, as the library's own publish does."""
    engine = _engine(job, WORKERS + 2)
    table = await _outbox_table(job, engine, MetaData())
    rabbit = RabbitBroker(job.broker_url, default_channel=Channel(on_return_raises=True), apply_types=False, logger=None)
    gone = Gone(job.count)
    outbox = _relay(job, engine, table, rabbit, job.queue, gone)
    await rabbit.start()
    await outbox.start()
    async with engine.begin() as connection:
        await connection.execute(text(waiting_in_faststream_outbox(job, range(job.count + job.options["behind"]))))
        await connection.execute(text(f"select pg_notify('outbox_{table.name}', '{job.topic}')"))
        began = gate.go()
    await gone.all.wait()
    gate.done(Report(time.perf_counter() - began, job.count))  # before the stop, which would cost and relay some more
    await outbox.stop()
    await rabbit.stop()
    await engine.dispose()


class Delivered(msgspec.Struct):
    """A message and its id, by which the inbox knows it."""

    event_id: UUID
    sample: Sample


class Codec:
    """JSON by msgspec for what is consumed; what the relay publishes is encoded already."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Sample).decode

    async def decode(self, message: RabbitMessage) -> Delivered:
        return Delivered(UUID(message.message_id), self._decode(message.body))

    async def encode(self, body: bytes, serializer: object = None) -> tuple[bytes, str]:
        return body, "application/json"


class Gone:
    """Counts the rows that are published, confirmed and deleted, as the outbox's metrics tell of them."""

    def __init__(self, count: int) -> None:
        self.all = asyncio.Event()
        self._left = count

    def __call__(self, event: str, tags: Mapping[str, Any]) -> None:
        if event == "acked":
            self._left -= 1
            if not self._left:
                self.all.set()


def _relay(job: Job, engine: AsyncEngine, table: Table, rabbit: RabbitBroker, queue: str, gone: Gone) -> OutboxBroker:
    outbox = OutboxBroker(
        engine, outbox_table=table, metrics_recorder=gone, apply_types=False, serializer=MsgSpecSerializer(), logger=None
    )

    @rabbit.publisher(RabbitQueue(queue, queue_type=QueueType.QUORUM), persist=True, content_type="application/json")
    @outbox.subscriber(
        job.topic,
        max_workers=WORKERS,
        fetch_batch_size=500,
        terminal_flush_batch_size=100,
        min_fetch_interval=0.01,
        max_fetch_interval=0.1,
        decoder=_bytes,
    )
    async def relay(body: bytes) -> bytes:
        return body

    return outbox


async def _bytes(message: OutboxMessage) -> bytes:
    return message.body


def _engine(job: Job, connections: int) -> AsyncEngine:
    url = job.database_url.replace("postgresql://", "postgresql+asyncpg://", 1)
    return create_async_engine(url, pool_size=connections, max_overflow=0)


async def _open_all(engine: AsyncEngine, count: int) -> None:
    """Fill the pool, so that no connection is opened while the clock runs."""
    for connection in [await engine.connect() for _ in range(count)]:
        await connection.close()


async def _outbox_table(job: Job, engine: AsyncEngine, metadata: MetaData) -> Table:
    table = make_outbox_table(metadata, table_name=f"{job.topic}_outbox")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
        await connection.execute(text(outbox_autovacuum_ddl(table.name, vacuum_cost_delay=0)))
    return table


def _rows(name: str, metadata: MetaData) -> Table:
    columns = {"number": Integer, "order_id": Uuid, "customer_id": Uuid, "total_cents": Integer, "note": Text}
    return Table(name, metadata, *(Column(column, kind) for column, kind in columns.items()))


if __name__ == "__main__":
    main({"effect": effect, "outbox": outbox, "relay": relay, "backlog": backlog})
