"""latency: one message at a time through a system that does nothing else, from the call that emits it until its handler begins.

The next message is sent when the one before it was handled, at once or 20 ms after: what waits adaptively has gone to sleep by then.
The rate is one over the mean latency. "outbox" is orderbus's whole way: a transaction that emits, its commit, the relay in the same
process, the broker, and the handler's own transaction with its inbox row, which has begun when the handler is called.
"""

from __future__ import annotations

from bench import database, wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload

PUBLISHERS = ("orderbus", "raw", "aiormq", "aio-pika", "faststream")


def prepare(ground: Ground, job: Job) -> None:
    """A queue that takes what is published to the topic; orderbus makes its own."""
    if job.options["way"] == "outbox":
        database.orderbus_tables(ground)
    if job.peer != "orderbus":
        with wire.Wire(ground.broker_url) as connection:
            connection.declare(job.queue)
            connection.bind(job.queue, "ob.events", f"{job.topic}.*")


def verify(ground: Ground, job: Job, report: Report) -> Count:
    """Each was waited for, so none is lost; none may be left."""
    with wire.Wire(ground.broker_url) as connection:
        left = connection.ready(job.queue)
        connection.delete(job.queue)
    return Count(report.lost, report.doubled, left)


WORKLOAD = Workload(
    name="latency",
    what="one message at a time on an idle system, from emit to the handler's beginning",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=PUBLISHERS,
    variants=(
        Variant("publish", 520, options={"way": "publish"}),
        Variant("publish, 20 ms apart", 220, options={"way": "publish", "gap_ms": 20}),
        Variant("outbox", 520, options={"way": "outbox"}, peers=("orderbus",)),
        Variant("outbox, 20 ms apart", 220, options={"way": "outbox", "gap_ms": 20}, peers=("orderbus",)),
    ),
    prepare=prepare,
    verify=verify,
)
