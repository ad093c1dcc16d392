"""effect: a waiting backlog is consumed; each message writes one row, once, and emits one event.

Measured until the last output event is confirmed by the broker. Every message of this run is delivered once, but nobody may rely
on that: an inbox row in the transaction of the effect makes it idempotent.
"""

from __future__ import annotations

from bench import database, wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload


def prepare(ground: Ground, job: Job) -> None:
    """The table of effects, and a queue that takes the output: orderbus publishes by topic, the others to the queue itself."""
    database.orderbus_tables(ground)
    database.rows_table(ground, f"{job.topic}_effect")
    if job.peer != "orderbus":
        database.inbox_table(ground, f"{job.topic}_inbox")
    with wire.Wire(ground.broker_url) as connection:
        connection.declare(f"{job.queue}.done")
        connection.bind(f"{job.queue}.done", "ob.events", f"{job.topic}.done.*")


def verify(ground: Ground, job: Job, report: Report) -> Count:
    """Each number once among the rows and once among the output events, and no message left unacknowledged."""
    lost, doubled = database.missing_and_again(ground, f"select number from {job.topic}_effect", job.count)
    unsent, again = wire.drain(ground.broker_url, f"{job.queue}.done", job.count)
    with wire.Wire(ground.broker_url) as connection:
        left = connection.ready(job.queue)
        connection.delete(job.queue)
        connection.delete(f"{job.queue}.done")
    database.drop(ground, f"{job.topic}_effect", f"{job.topic}_inbox", f"{job.topic}_outbox")
    return Count(lost + unsent, doubled + again, left)


WORKLOAD = Workload(
    name="effect",
    what="a waiting backlog in a durable quorum queue: one row written once and one event emitted and confirmed for each message",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=("orderbus", "by-hand", "faststream-outbox"),
    variants=(Variant("250 B", 20_000),),
    shares={"by-hand": 0.2, "faststream-outbox": 0.1},
    prepare=prepare,
    verify=verify,
)
