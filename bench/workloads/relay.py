"""relay: rows that wait in an outbox become confirmed messages in a durable quorum queue, and leave the outbox.

From the start of the relay (its connections included for orderbus; the others have theirs already) until the last row is confirmed.
"""

from __future__ import annotations

from bench import database, wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload

TABLES = {"orderbus": "orderbus.outbox", "faststream-outbox": "{topic}_outbox"}


def prepare(ground: Ground, job: Job) -> None:
    """A queue that takes what is published to the topic; orderbus's rows. faststream-outbox makes its table itself, and fills it."""
    database.orderbus_tables(ground)
    with wire.Wire(ground.broker_url) as connection:
        connection.declare(job.queue)
        connection.bind(job.queue, "ob.events", f"{job.topic}.*")
    if job.peer == "orderbus":
        ground.execute(database.waiting_in_orderbus(job, range(job.count)))


def verify(ground: Ground, job: Job, report: Report) -> Count:
    """Each number once in the queue, and no row left."""
    lost, doubled = wire.drain(ground.broker_url, job.queue, job.count)
    with wire.Wire(ground.broker_url) as connection:
        connection.delete(job.queue)
    left = ground.number(f"select count(*) from {TABLES[job.peer].format(topic=job.topic)}")
    database.drop(ground, f"{job.topic}_outbox")
    return Count(lost, doubled, left)


WORKLOAD = Workload(
    name="relay",
    what="rows waiting in an outbox to messages confirmed by a durable quorum queue, the rows then gone",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=tuple(TABLES),
    variants=(Variant("250 B", 50_000), Variant("4 KiB", 15_000, 4096)),
    shares={"faststream-outbox": 0.1},
    prepare=prepare,
    verify=verify,
)
