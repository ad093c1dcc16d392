"""ordered: consume, each key in its order. What came after a later message of its key is counted as disordered.

orderbus keeps the order of each key and handles different keys beside each other. Where a framework knows no keys, the usual advice is
a single active consumer that takes one message at a time. FastStream starts a handler for each message that it is given, so it is
given one; a loop of one's own, as with aio-pika and raw, may read ahead. With 2 ms of waiting in each handler, as for a small call to
another system, the difference between order per key and order of everything shows.
"""

from __future__ import annotations

from bench import wire
from bench.child import Report
from bench.ground import Ground
from bench.job import ORDERED_QUEUE, Job
from bench.workloads import Count, Variant, Workload


def verify(ground: Ground, job: Job, report: Report) -> Count:
    with wire.Wire(ground.broker_url) as connection:
        left = connection.ready(ORDERED_QUEUE)
        connection.delete(ORDERED_QUEUE)
    return Count(report.lost, report.doubled, left)


WORKLOAD = Workload(
    name="ordered",
    what="consume with 1000 keys, each in order, from a queue with a single active consumer",
    peers=("orderbus", "raw", "aio-pika", "faststream"),
    variants=(
        Variant("1000 keys", 100_000, options={"keys": 1000, "wait_ms": 0}),
        Variant(
            "1000 keys, 2 ms each", 20_000, options={"keys": 1000, "wait_ms": 2}, peers=("orderbus", "aio-pika", "faststream")
        ),
    ),
    shares={"aio-pika": 0.07, "faststream": 0.03},
    verify=verify,
)
