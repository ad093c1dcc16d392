"""aio-pika, as its documentation writes it: a robust connection, `process()` around each message, many publishes at a time."""

import asyncio
import time
from collections.abc import Iterator

import aio_pika
import msgspec

from bench.child import Gate, Metronome, OrderTally, Report, Tally, main, percentiles
from bench.job import ORDERED_QUEUE, Job, Sample, samples
from bench.wire import event_id, fill

IN_FLIGHT = 1000
encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Sample).decode


def message_of(job: Job, sample: Sample) -> aio_pika.Message:
    return aio_pika.Message(
        encode(sample),
        content_type="application/json",
        headers={"ob-key": str(sample.order_id)},
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=event_id(sample.number),
        type=job.topic,
    )


async def publish(job: Job, gate: Gate) -> None:
    """A thousand coroutines take the events in turn; each waits for its confirm, which a channel has unless told otherwise."""
    waiting = iter(list(samples(job)))
    latencies: list[float] = []
    connection = await aio_pika.connect_robust(job.broker_url)
    channel = await connection.channel(on_return_raises=True)
    exchange = await channel.get_exchange("ob.events")

    async def publish_each(waiting: Iterator[Sample]) -> None:
        for sample in waiting:
            began = time.perf_counter()
            await exchange.publish(message_of(job, sample), f"{job.topic}.00", mandatory=True)
            latencies.append(time.perf_counter() - began)

    began = gate.go()
    await asyncio.gather(*(publish_each(waiting) for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - began
    await connection.close()
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def consume(job: Job, gate: Gate) -> None:
    """A callback, started as a task for each delivery, as many at a time as the prefetch lets through."""
    all_seen = asyncio.Event()
    tally = Tally(job.count, all_seen.set)

    async def handle(sample: Sample) -> None:
        tally.saw(sample.number)

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process(requeue=True):
            await handle(decode(message.body))

    async with await aio_pika.connect_robust(job.broker_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=job.prefetch)
        queue = await channel.declare_queue(job.queue, durable=True, arguments={"x-queue-type": "quorum"})
        fill(job)
        gate.go()
        tag = await queue.consume(on_message)
        await all_seen.wait()
        await queue.cancel(tag)
        await channel.close()
    gate.done(tally.report(gate))


async def ordered(job: Job, gate: Gate) -> None:
    """A single active consumer and a loop: one message after the other, while the next are on their way.

    Order holds as long as a failure is tried again inside the loop. Nothing fails here, so there is nothing of that.
    """
    wait_s = job.options["wait_ms"] / 1000
    tally = OrderTally(job.count, lambda: None)

    async def handle(sample: Sample) -> None:
        if wait_s:
            await asyncio.sleep(wait_s)
        tally.saw_of(sample.order_id, sample.number)

    async with await aio_pika.connect_robust(job.broker_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=job.prefetch)
        queue = await channel.declare_queue(
            ORDERED_QUEUE, durable=True, arguments={"x-queue-type": "quorum", "x-single-active-consumer": True}
        )
        fill(job, queue=ORDERED_QUEUE)
        gate.go()
        async with queue.iterator() as messages:
            async for message in messages:
                async with message.process(requeue=True):
                    await handle(decode(message.body))
                if tally.ended:
                    break
        await channel.close()
    gate.done(tally.report(gate))


async def latency(job: Job, gate: Gate) -> None:
    """A connection to publish and one to consume."""
    publishing = await aio_pika.connect_robust(job.broker_url)
    consuming = await aio_pika.connect_robust(job.broker_url)
    metronome = Metronome(job)

    async def handle(sample: Sample) -> None:
        metronome.handled(sample.number)

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process(requeue=True):
            await handle(decode(message.body))

    async with publishing, consuming:
        exchange = await (await publishing.channel(on_return_raises=True)).get_exchange("ob.events")
        channel = await consuming.channel()
        await channel.set_qos(prefetch_count=job.prefetch)
        queue = await channel.get_queue(job.queue)
        tag = await queue.consume(on_message)
        report = await metronome.run(
            gate, lambda sample: exchange.publish(message_of(job, sample), f"{job.topic}.00", mandatory=True)
        )
        await queue.cancel(tag)
        await channel.close()
    gate.done(report)


if __name__ == "__main__":
    main({"publish": publish, "consume": consume, "latency": latency, "ordered": ordered})
