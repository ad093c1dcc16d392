"""publish: how fast confirmed messages go out. A latency is that of one confirmed batch (or of one call, where a peer has no batches)."""

from __future__ import annotations

from bench import wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload


def prepare(ground: Ground, job: Job) -> None:
    """A queue that takes what is published to the topic."""
    with wire.Wire(ground.broker_url) as connection:
        connection.declare(job.queue)
        connection.bind(job.queue, "ob.events", f"{job.topic}.*")


def verify(ground: Ground, job: Job, report: Report) -> Count:
    lost, doubled = wire.drain(ground.broker_url, job.queue, job.count)
    with wire.Wire(ground.broker_url) as connection:
        connection.delete(job.queue)
    return Count(lost, doubled)


WORKLOAD = Workload(
    name="publish",
    what="messages published to a durable quorum queue, persistent, mandatory, each confirmed",
    peers=("orderbus", "raw", "aiormq", "aio-pika", "faststream"),
    variants=(Variant("250 B", 60_000), Variant("4 KiB", 40_000, 4096)),
    shares={"aiormq": 0.4, "aio-pika": 0.2, "faststream": 0.12},
    prepare=prepare,
    verify=verify,
)
