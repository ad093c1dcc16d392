"""orderbus, through its public names only."""

from typing import Any
from uuid import UUID

import anyio

from bench.child import Gate, Tally, main
from bench.job import GROUP, Job
from bench.wire import fill
from orderbus import Bus, Event, Settings


def sample_event(topic: str) -> Any:
    """The bench's sample as an event of the job's own topic."""

    class Sample(Event, topic=topic, key="order_id"):
        number: int
        order_id: UUID
        customer_id: UUID
        total_cents: int
        note: str

    return Sample


async def consume(job: Job, gate: Gate) -> None:
    """A handler for one message, no store and so no guard: what the other frameworks do."""
    event = sample_event(job.topic)
    bus = Bus(GROUP, settings=Settings(broker_url=job.broker_url))
    all_seen = anyio.Event()
    tally = Tally(job.count, all_seen.set)

    @bus.on(event, guard="none", prefetch=job.prefetch, fuse=100, concurrency=1)
    async def handle(sample: event) -> None:
        tally.saw(sample.number)

    async with bus:
        pass
    fill(job)
    gate.go()
    async with bus:
        await all_seen.wait()
    gate.done(tally.report(gate))


if __name__ == "__main__":
    main({"consume": consume})
