"""telemetry: what traces and metrics cost. orderbus without an SDK, and with one that samples none, 1 % and 100 % of the messages.

The program of effect. Without an SDK it runs twice: with bare messages, and with a trace context in each, as comes from others who trace.
With one each message carries a context; of those that are sampled, there are spans for process, settle and send. They are
exported by OTLP to a sink beside it, in pieces of 512 (the last of a round after its end), with the metrics; these every 5 s, not every
minute as by default, so that each round has some of it. The rounds are short and many: the difference is smaller than what a shared
machine's speed changes by from one minute to the next.
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
    peers=("orderbus", "orderbus-context", "orderbus-traced-0", "orderbus-traced-1", "orderbus-traced-100"),
    variants=(Variant("250 B", 40_000),),
    rounds=11,
    shares={"orderbus-traced-100": 0.25},
    prepare=prepare,
    verify=verify,
)
