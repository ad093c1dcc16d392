"""backlog: does a message cost more because many others wait behind it?

Every variant measures the same number of messages, 20,000, and differs in how many more wait behind them: 1 thousand, 10 thousand,
100 thousand, 1 million. So at each moment of the window at least that many wait, and at most 20,000 more; "1k" begins at 21,000. The
cost of one at a million over the cost of one at a thousand is the ratio of two rows of one column (rate, client CPU, server CPU).
Emptying a million would take longer, and tell less: its last half would be measured beside a small backlog.

The start is outside the window, since it costs the same at any size and would hide a difference. relay: the rows are inserted by a
transaction that commits when the word comes, with the relay running; from then until 20,000 are confirmed. consume: the handler
holds back what the broker has pushed until the word comes; from then until it has been called 20,000 times. No store. Its peak memory
is that of a consumer with that many messages waiting. Then everything stops, and is counted: what was done, and what still waits,
must together be each message once.

The relay of faststream-outbox is measured in the same way, with a fifth of the messages, up to 100 thousand.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import database, wire
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload
from bench.workloads.relay import TABLES

MEASURED = 20_000
BEHIND = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1M": 1_000_000}


def prepare(ground: Ground, job: Job) -> None:
    """For the relay, a queue that takes what is published. The consumer's queue is declared and filled by its program."""
    database.orderbus_tables(ground)
    if job.options["what"] == "relay":
        with wire.Wire(ground.broker_url) as connection:
            connection.declare(job.queue)
            connection.bind(job.queue, "ob.events", f"{job.topic}.*")


def verify(ground: Ground, job: Job, report: Report) -> Count:
    total = job.count + job.options["behind"]
    with wire.Wire(ground.broker_url) as connection:
        if job.options["what"] == "consume":
            lost = total - int(report.more["handled"]) - connection.ready(job.queue)
            connection.delete(job.queue)
            return Count(max(lost, 0), report.doubled + max(-lost, 0))
    unpublished, again = wire.drain(ground.broker_url, job.queue, total)
    with wire.Wire(ground.broker_url) as connection:
        connection.delete(job.queue)
    waiting = ground.number(f"select count(*) from {TABLES[job.peer].format(topic=job.topic)}")
    database.drop(ground, f"{job.topic}_outbox")
    return Count(lost=max(unpublished - waiting, 0), doubled=again + max(waiting - unpublished, 0))


def _variants() -> Iterator[Variant]:
    for what in ("relay", "consume"):
        for name, behind in BEHIND.items():
            both = what == "relay" and behind <= 100_000
            options = {"what": what, "behind": behind}
            yield Variant(f"{what}, {name} behind", MEASURED, options=options, peers=None if both else ("orderbus",))


WORKLOAD = Workload(
    name="backlog",
    what=f"{MEASURED:,} messages while so many more wait behind them: outbox rows relayed, or messages of a quorum queue consumed",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=tuple(TABLES),
    variants=tuple(_variants()),
    shares={"faststream-outbox": 0.2},
    prepare=prepare,
    verify=verify,
)
