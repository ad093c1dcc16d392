"""telemetry: what traces and metrics cost. orderbus without an SDK, and with one that samples 1 % and 100 % of the messages.

The program of effect. Each message carries a trace context; of those that are sampled, 1 % or all, six spans are made and exported by
OTLP to a sink beside it, with the metrics. These are exported every second, not every minute as by default, so that each round has some of
it. The messages are many, since the difference is small.
"""

from __future__ import annotations

import msgspec

from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload, effect


def prepare(ground: Ground, job: Job) -> None:
    effect.prepare(ground, msgspec.structs.replace(job, peer="orderbus"))


def verify(ground: Ground, job: Job, report: Report) -> Count:
    return effect.verify(ground, msgspec.structs.replace(job, peer="orderbus"), report)


WORKLOAD = Workload(
    name="telemetry",
    what="effect without an OpenTelemetry SDK, and with one that samples 1 % and 100 % and exports by OTLP",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=("orderbus", "orderbus-traced-1", "orderbus-traced-100"),
    variants=(Variant("250 B", 160_000),),
    shares={"orderbus-traced-100": 0.25},
    prepare=prepare,
    verify=verify,
)
