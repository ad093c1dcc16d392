"""trio: orderbus under uvloop, under asyncio's own loop, and under trio.

The same programs as in consume and effect; "on_batch" is consume with a handler that takes a hundred at once. Under trio, the drivers run
on an asyncio thread, and each batch crosses to it and back.
"""

from __future__ import annotations

import msgspec

from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload, consume, effect


def prepare(ground: Ground, job: Job) -> None:
    if job.options["what"] == "effect":
        effect.prepare(ground, _as_orderbus(job))


def verify(ground: Ground, job: Job, report: Report) -> Count:
    if job.options["what"] == "effect":
        return effect.verify(ground, _as_orderbus(job), report)
    return consume.verify(ground, job, report)


def _as_orderbus(job: Job) -> Job:
    return msgspec.structs.replace(job, peer="orderbus")


WORKLOAD = Workload(
    name="trio",
    what="consume and effect under uvloop, asyncio's own loop, and trio",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=("orderbus", "orderbus-asyncio", "orderbus-trio"),
    variants=(
        Variant("consume", 60_000, options={"what": "consume"}),
        Variant("on_batch", 60_000, options={"what": "on_batch"}),
        Variant("effect", 20_000, options={"what": "effect"}),
    ),
    prepare=prepare,
    verify=verify,
)
