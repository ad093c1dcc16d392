"""consume: a backlog is decoded into its type, handed to a handler one message at a time, and acknowledged. No store."""

from __future__ import annotations

from bench import wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload


def verify(ground: Ground, job: Job, report: Report) -> Count:
    """Each handled once by the peer's own count, and nothing left in the queue."""
    with wire.Wire(ground.broker_url) as connection:
        left = connection.ready(job.queue)
        connection.delete(job.queue)
    return Count(report.lost, report.doubled, left)


WORKLOAD = Workload(
    name="consume",
    what="a waiting backlog in a durable quorum queue: typed decode, handler call, acknowledgement; no store",
    peers=("orderbus", "raw", "aiormq", "aio-pika", "faststream", "celery", "taskiq", "dramatiq"),
    variants=(Variant("250 B", 100_000), Variant("4 KiB", 60_000, 4096)),
    shares={"aiormq": 0.36, "aio-pika": 0.16, "faststream": 0.1, "celery": 0.06, "taskiq": 0.08, "dramatiq": 0.12},
    verify=verify,
)
