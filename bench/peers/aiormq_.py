"""aiormq, used well: one channel, many confirms in flight, one multiple acknowledgement for many deliveries."""

import asyncio
import time
from collections.abc import Iterator

import aiormq
import msgspec
from aiormq.abc import AbstractChannel, DeliveredMessage

from bench.child import Gate, Metronome, Report, Tally, main, percentiles
from bench.job import Job, Sample, samples
from bench.wire import event_id, fill

IN_FLIGHT = 1000
ACK_EVERY = 50
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Sample).decode


async def send(channel: AbstractChannel, job: Job, sample: Sample) -> None:
    """Publish, and wait for the confirm."""
    properties = aiormq.spec.Basic.Properties(
        content_type="application/json",
        headers={"ob-key": str(sample.order_id)},
        delivery_mode=2,
        message_id=event_id(sample.number),
        message_type=job.topic,
    )
    await channel.basic_publish(
        encode(sample), exchange="ob.events", routing_key=f"{job.topic}.00", properties=properties, mandatory=True, wait=False
    )


async def publish(job: Job, gate: Gate) -> None:
    """A thousand coroutines take the events in turn, each waits for its confirm: no task per message, no waiting for a batch."""
    waiting = iter(list(samples(job)))
    latencies: list[float] = []
    connection = await aiormq.connect(job.broker_url)
    channel = await connection.channel(publisher_confirms=True)

    async def publish_each(waiting: Iterator[Sample]) -> None:
        for sample in waiting:
            began = time.perf_counter()
            await send(channel, job, sample)
            latencies.append(time.perf_counter() - began)

    began = gate.go()
    await asyncio.gather(*(publish_each(waiting) for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - began
    await connection.close()
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def consume(job: Job, gate: Gate) -> None:
    """aiormq starts its callback as a task for each delivery; a hundred of them are acknowledged at once, or after 5 ms."""
    connection = await aiormq.connect(job.broker_url)
    channel = await connection.channel()
    await channel.basic_qos(prefetch_count=job.prefetch)
    await channel.queue_declare(job.queue, durable=True, arguments={"x-queue-type": "quorum"})
    fill(job)
    all_seen = asyncio.Event()
    tally = Tally(job.count, all_seen.set)
    loop = asyncio.get_running_loop()
    unacknowledged = 0
    last_tag = 0
    timer: asyncio.TimerHandle | None = None

    async def handle(sample: Sample) -> None:
        tally.saw(sample.number)

    async def acknowledge() -> None:
        nonlocal unacknowledged, timer
        if timer is not None:
            timer.cancel()
            timer = None
        if unacknowledged:
            unacknowledged = 0
            await channel.basic_ack(last_tag, multiple=True, wait=False)

    async def on_message(message: DeliveredMessage) -> None:
        nonlocal unacknowledged, last_tag, timer
        await handle(decode(message.body))
        unacknowledged += 1
        last_tag = message.delivery_tag
        if unacknowledged >= ACK_EVERY:
            await acknowledge()
        elif timer is None:
            timer = loop.call_later(0.005, lambda: loop.create_task(acknowledge()))

    gate.go()
    await channel.basic_consume(job.queue, on_message)
    await all_seen.wait()
    await acknowledge()
    await channel.close()
    await connection.close()
    gate.done(tally.report(gate))


async def latency(job: Job, gate: Gate) -> None:
    """A connection to publish and one to consume; each message is acknowledged by itself."""
    publishing, consuming = await aiormq.connect(job.broker_url), await aiormq.connect(job.broker_url)
    out, into = await publishing.channel(), await consuming.channel()
    metronome = Metronome(job)

    async def handle(sample: Sample) -> None:
        metronome.handled(sample.number)

    async def on_message(message: DeliveredMessage) -> None:
        await handle(decode(message.body))
        await into.basic_ack(message.delivery_tag, wait=False)

    await into.basic_qos(prefetch_count=job.prefetch)
    await into.basic_consume(job.queue, on_message)
    report = await metronome.run(gate, lambda sample: send(out, job, sample))
    await into.close()
    await consuming.close()
    await publishing.close()
    gate.done(report)


if __name__ == "__main__":
    main({"publish": publish, "consume": consume, "latency": latency})
