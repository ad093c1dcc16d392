"""outbox: what a transaction with one row of business and one event costs. No relay runs: the events are left in the outbox.

A latency is that of one whole transaction, from its begin to the return of its commit, as the writer sees it. orderbus has two
rows: a transaction of its own for each (`bus.transaction()`, as everybody has it), and `bus.group_commit`, which its documentation
names for writes that arrive by the thousand; there, a row and its event are in one transaction with those of other writers.
"""

from __future__ import annotations

from bench import database
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.workloads import Count, Variant, Workload

ORDERBUS = f"select {database.numbers_in('body')} from orderbus.outbox"
EVENTS = {
    "orderbus": ORDERBUS,
    "orderbus-group-commit": ORDERBUS,
    "faststream-outbox": f"select {database.numbers_in('payload')} from {{topic}}_outbox",
    "by-hand": f"select {database.numbers_in('body')} from {{topic}}_outbox",
}
"""Where each has its events."""


def prepare(ground: Ground, job: Job) -> None:
    database.orderbus_tables(ground)
    database.rows_table(ground, f"{job.topic}_orders")
    if job.peer == "by-hand":
        database.outbox_table(ground, f"{job.topic}_outbox")


def verify(ground: Ground, job: Job, report: Report) -> Count:
    """Each number once among the rows, and once among the events."""
    lost, doubled = database.missing_and_again(ground, f"select number from {job.topic}_orders", job.count)
    without, again = database.missing_and_again(ground, EVENTS[job.peer].format(topic=job.topic), job.count)
    database.drop(ground, f"{job.topic}_orders", f"{job.topic}_outbox")
    return Count(lost + without, doubled + again)


WORKLOAD = Workload(
    name="outbox",
    what="transactions that write one row and emit one event into an outbox; nothing is published",
    unit="transaction",
    servers=frozenset({"RabbitMQ", "PostgreSQL"}),
    peers=tuple(EVENTS),
    variants=(Variant("1 writer", 4_000, options={"writers": 1}), Variant("50 writers", 10_000, options={"writers": 50})),
    shares={"faststream-outbox": 0.5},
    prepare=prepare,
    verify=verify,
)
