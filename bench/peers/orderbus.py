"""orderbus, through its public names only."""

import logging
import time
from typing import Any
from uuid import UUID

import anyio
import msgspec

from bench.child import Fault, Gate, Metronome, OrderTally, Report, Tally, main, percentiles
from bench.database import CONNECTIONS, waiting_in_orderbus
from bench.job import GROUP, ORDERED_QUEUE, Job, Sample, samples
from bench.wire import BATCH, fill
from orderbus import Batch, Bus, Event, Retry, Settings, Tx

INSERT = """\
insert into {table} (number, order_id, customer_id, total_cents, note)
select * from unnest(%s::integer[], %s::uuid[], %s::uuid[], %s::integer[], %s::text[])"""


def sample_event(topic: str) -> Any:
    """The bench's sample as an event of the job's own topic."""

    class Sample(Event, topic=topic, key="order_id"):
        number: int
        order_id: UUID
        customer_id: UUID
        total_cents: int
        note: str

    return Sample


async def publish(job: Job, gate: Gate) -> None:
    """Two batches on their way; a latency is that of a whole batch."""
    event = sample_event(job.topic)
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    events = [event(**msgspec.structs.asdict(sample)) for sample in samples(job)]
    batches = iter([events[first : first + BATCH] for first in range(0, len(events), BATCH)])
    latencies = []

    async def publish_each() -> None:
        for batch in batches:
            began = time.perf_counter()
            await bus.publish_many(batch)
            latencies.append(time.perf_counter() - began)

    async with bus:
        began = gate.go()
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(publish_each)
        seconds = time.perf_counter() - began
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def consume(job: Job, gate: Gate, fault: Fault | None = None) -> None:
    """A handler for one message, no store and so no guard: what the other frameworks do."""
    event = sample_event(job.topic)
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    all_seen = anyio.Event()
    tally = Tally(job.count, all_seen.set)

    @bus.on(event, guard="none", prefetch=job.prefetch, fuse=100, concurrency=1, retry=Retry.fixed(0.1, attempts=3))
    async def handle(sample: event) -> None:
        if fault:
            fault.strike(sample.number)
        tally.saw(sample.number)

    async with bus:
        pass
    fill(job)
    gate.go()
    async with bus:
        await all_seen.wait()
    gate.done(tally.report(gate))


async def consume_batches(job: Job, gate: Gate) -> None:
    """The same with a handler that takes what has come, up to a hundred at once."""
    event = sample_event(job.topic)
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    all_seen = anyio.Event()
    tally = Tally(job.count, all_seen.set)

    @bus.on_batch(event, most=100, guard="none", prefetch=job.prefetch)
    async def handle(batch: Batch[event]) -> None:
        for sample in batch.events:
            tally.saw(sample.number)

    async with bus:
        pass
    fill(job)
    gate.go()
    async with bus:
        await all_seen.wait()
    gate.done(tally.report(gate))


async def trio(job: Job, gate: Gate) -> None:
    """The variants of bench/workloads/trio.py. Which loop they run under, the peer says."""
    await {"consume": consume, "on_batch": consume_batches, "effect": effect}[job.options["what"]](job, gate)


async def ordered(job: Job, gate: Gate) -> None:
    """Each key in order, the keys beside each other: as many as a unit takes."""
    event, wait_s = sample_event(job.topic), job.options["wait_ms"] / 1000
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    all_seen = anyio.Event()
    tally = OrderTally(job.count, all_seen.set)

    @bus.on(event, ordered=True, guard="none", prefetch=job.prefetch, fuse=100, concurrency=1)
    async def handle(sample: event) -> None:
        if wait_s:
            await anyio.sleep(wait_s)
        tally.saw_of(sample.order_id, sample.number)

    async with bus:
        pass
    fill(job, queue=ORDERED_QUEUE)
    gate.go()
    async with bus:
        await all_seen.wait()
    gate.done(tally.report(gate))


async def retry(job: Job, gate: Gate) -> None:
    """Waits below a second pass in the process, in nobody's way; longer ones would go through the broker's ladder."""
    logging.disable()
    await consume(job, gate, Fault(job.count))


async def effect(job: Job, gate: Gate) -> None:
    """A handler for one message, which runs up to 100 to a transaction: inbox rows, effects and events commit together."""
    event, done = sample_event(job.topic), sample_event(f"{job.topic}.done")
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url, database_url=job.database_url))
    insert = INSERT.format(table=f"{job.topic}_effect")

    @bus.on(event, prefetch=job.prefetch, fuse=100, concurrency=2)
    async def handle(sample: event, tx: Tx) -> done:
        tx.defer_row(insert, (sample.number, sample.order_id, sample.customer_id, sample.total_cents, sample.note))
        return done(**msgspec.structs.asdict(sample))

    async with bus:
        pass
    fill(job)
    began = gate.go()
    async with bus:
        await relayed(bus, job.count)
        seconds = time.perf_counter() - began
    gate.done(Report(seconds, job.count))


async def outbox(job: Job, gate: Gate) -> None:
    """A transaction each, or, where the peer is called so, one shared with the writers that wait at the same time."""
    settings = Settings(broker_url=job.broker_url, database_url=job.database_url, relay=False, pool_size=CONNECTIONS)
    bus, placed, writers = Bus(GROUP, settings=settings), sample_event(job.topic), job.options["writers"]
    insert = INSERT.format(table=f"{job.topic}_orders")
    orders = list(samples(job))
    latencies = []

    def write(tx: Tx, order: Sample) -> None:
        tx.defer_row(insert, (order.number, order.order_id, order.customer_id, order.total_cents, order.note))
        tx.emit(placed(**msgspec.structs.asdict(order)))

    async def alone(order: Sample) -> None:
        async with bus.transaction() as tx:
            write(tx, order)

    async def together(order: Sample) -> None:
        await bus.group_commit(lambda tx: write(tx, order))

    save = together if job.peer == "orderbus-group-commit" else alone

    async def writer(first: int) -> None:
        for order in orders[first::writers]:
            began = time.perf_counter()
            await save(order)
            latencies.append(time.perf_counter() - began)

    async with bus:
        began = gate.go()
        async with anyio.create_task_group() as tasks:
            for first in range(writers):
                tasks.start_soon(writer, first)
        seconds = time.perf_counter() - began
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def relay(job: Job, gate: Gate) -> None:
    """A bus without handlers; the rows wait already. One without a relay is opened before the word: it imports the drivers."""
    async with Bus(GROUP, settings=Settings(broker_url=job.broker_url, database_url=job.database_url, relay=False)):
        pass
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url, database_url=job.database_url))
    began = gate.go()
    async with bus:
        await relayed(bus, job.count)
        seconds = time.perf_counter() - began
    gate.done(Report(seconds, job.count))


async def backlog(job: Job, gate: Gate) -> None:
    """The first messages of many; see bench/workloads/backlog.py."""
    await (relay_backlog if job.options["what"] == "relay" else consume_backlog)(job, gate)


async def relay_backlog(job: Job, gate: Gate) -> None:
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url, database_url=job.database_url))
    total = job.count + job.options["behind"]
    async with bus:
        async with bus.transaction() as tx:
            for first in range(0, total, 50_000):  # a statement has 30 s
                await tx.execute(waiting_in_orderbus(job, range(first, min(first + 50_000, total))))
            began = gate.go()
        await relayed(bus, job.count)
        gate.done(Report(time.perf_counter() - began, job.count))  # before the stop, which would cost and relay some more


async def consume_backlog(job: Job, gate: Gate) -> None:
    event, total = sample_event(job.topic), job.count + job.options["behind"]
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    held, go, enough = anyio.Event(), anyio.Event(), anyio.Event()
    seen, calls = bytearray(total), 0

    @bus.on(event, guard="none", prefetch=job.prefetch, fuse=100, concurrency=1)
    async def handle(sample: event) -> None:
        nonlocal calls
        if not calls:
            held.set()
            await go.wait()
        calls += 1
        seen[sample.number] += 1
        if calls == job.count:
            enough.set()

    async with bus:
        pass
    fill(msgspec.structs.replace(job, count=total))
    async with bus:
        await held.wait()
        began = gate.go()
        go.set()
        await enough.wait()
        seconds = time.perf_counter() - began
    gate.done(Report(seconds, job.count, doubled=calls - (total - seen.count(0)), more={"handled": calls}))


async def latency(job: Job, gate: Gate) -> None:
    """Either published at once to a handler without a guard, or by a transaction and the relay to one with an inbox."""
    event, outbox = sample_event(job.topic), job.options["way"] == "outbox"
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url, database_url=job.database_url if outbox else None))
    metronome = Metronome(job)

    @bus.on(event, guard="inbox" if outbox else "none", prefetch=job.prefetch)
    async def handle(sample: event) -> None:
        metronome.handled(sample.number)

    async def emit(sample: Sample) -> None:
        async with bus.transaction() as tx:
            tx.emit(event(**msgspec.structs.asdict(sample)))

    async def publish(sample: Sample) -> None:
        await bus.publish(event(**msgspec.structs.asdict(sample)))

    async with bus:
        report = await metronome.run(gate, emit if outbox else publish)
    gate.done(report)


async def relayed(bus: Bus, count: int) -> None:
    """Wait until so many events are confirmed. A bus counts them, and tells nobody when: so it is asked, 200 times a second."""
    while bus.stats.relayed < count:  # noqa: ASYNC110 - there is no event to wait for
        await anyio.sleep(0.005)


if __name__ == "__main__":
    main(
        {
            "publish": publish,
            "consume": consume,
            "ordered": ordered,
            "trio": trio,
            "telemetry": effect,
            "retry": retry,
            "latency": latency,
            "effect": effect,
            "outbox": outbox,
            "relay": relay,
            "backlog": backlog,
        }
    )
