"""FastStream on RabbitMQ. Typed by a msgspec codec and without its dependency injection, which nothing here needs: its fastest way.

(`RabbitBroker(serializer=MsgSpecSerializer())` with an annotated handler, its documentation's first way, took a quarter more CPU.)
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from faststream import AckPolicy
from faststream.rabbit import Channel, ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitMessage, RabbitQueue

from bench.child import Fault, Gate, Metronome, OrderTally, Report, Tally, main, percentiles
from bench.job import ORDERED_QUEUE, Job, Sample, samples
from bench.wire import event_id, fill

IN_FLIGHT = 1000
EVENTS = RabbitExchange("ob.events", ExchangeType.TOPIC, declare=False)


class SampleCodec:
    """JSON by msgspec, both ways."""

    def __init__(self) -> None:
        self._decode = msgspec.json.Decoder(Sample).decode
        self._encode = msgspec.json.Encoder().encode

    async def decode(self, message: RabbitMessage) -> Sample:
        return self._decode(message.body)

    async def encode(self, sample: Any, serializer: Any = None) -> tuple[bytes, str]:
        return self._encode(sample), "application/json"


def broker_for(job: Job, prefetch: int | None = None) -> RabbitBroker:
    """Logging each message is on by default and costs more than all the rest: off."""
    channel = Channel(prefetch_count=prefetch or job.prefetch, on_return_raises=True)
    return RabbitBroker(job.broker_url, default_channel=channel, codec=SampleCodec(), apply_types=False, logger=None)


async def send(broker: RabbitBroker, job: Job, sample: Sample) -> None:
    """Publish, and wait for the confirm."""
    await broker.publish(
        sample,
        exchange=EVENTS,
        routing_key=f"{job.topic}.00",
        persist=True,
        headers={"ob-key": str(sample.order_id)},
        message_id=event_id(sample.number),
        message_type=job.topic,
    )


async def publish(job: Job, gate: Gate) -> None:
    """A thousand coroutines take the events in turn; each waits for its confirm."""
    waiting = iter(list(samples(job)))
    latencies: list[float] = []
    broker = broker_for(job)
    await broker.start()

    async def publish_each(waiting: Iterator[Sample]) -> None:
        for sample in waiting:
            began = time.perf_counter()
            await send(broker, job, sample)
            latencies.append(time.perf_counter() - began)

    began = gate.go()
    await asyncio.gather(*(publish_each(waiting) for _ in range(IN_FLIGHT)))
    seconds = time.perf_counter() - began
    await broker.stop()
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


async def consume(job: Job, gate: Gate, fault: Fault | None = None) -> None:
    """A subscriber, run for as many messages at a time as the prefetch lets through."""
    broker = broker_for(job)
    queue = RabbitQueue(job.queue, queue_type=QueueType.QUORUM, durable=True)
    all_seen = asyncio.Event()
    tally = Tally(job.count, all_seen.set)

    @broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(sample: Sample) -> None:
        if fault:
            fault.strike(sample.number)
        tally.saw(sample.number)

    await broker.connect()
    await broker.declare_queue(queue)
    fill(job)
    gate.go()
    await broker.start()
    await all_seen.wait()
    await broker.stop()
    gate.done(tally.report(gate))


async def retry(job: Job, gate: Gate) -> None:
    """A failed message goes back to the queue, which delivers it again: `NACK_ON_ERROR`."""
    logging.disable()
    await consume(job, gate, Fault(job.count))


async def ordered(job: Job, gate: Gate) -> None:
    """A single active consumer and a prefetch of 1: nothing that comes later can be begun, whatever its key."""
    broker, wait_s = broker_for(job, prefetch=1), job.options["wait_ms"] / 1000
    queue = RabbitQueue(ORDERED_QUEUE, queue_type=QueueType.QUORUM, durable=True, arguments={"x-single-active-consumer": True})
    all_seen = asyncio.Event()
    tally = OrderTally(job.count, all_seen.set)

    @broker.subscriber(queue, ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(sample: Sample) -> None:
        if wait_s:
            await asyncio.sleep(wait_s)
        tally.saw_of(sample.order_id, sample.number)

    await broker.connect()
    await broker.declare_queue(queue)
    fill(job, queue=ORDERED_QUEUE)
    gate.go()
    await broker.start()
    await all_seen.wait()
    await broker.stop()
    gate.done(tally.report(gate))


async def latency(job: Job, gate: Gate) -> None:
    """One broker publishes and consumes, which is FastStream's way: one connection, one channel."""
    broker = broker_for(job)
    metronome = Metronome(job)

    @broker.subscriber(RabbitQueue(job.queue, queue_type=QueueType.QUORUM, durable=True), ack_policy=AckPolicy.NACK_ON_ERROR)
    async def handle(sample: Sample) -> None:
        metronome.handled(sample.number)

    await broker.start()
    report = await metronome.run(gate, lambda sample: send(broker, job, sample))
    await broker.stop()
    gate.done(report)


if __name__ == "__main__":
    main({"publish": publish, "consume": consume, "latency": latency, "retry": retry, "ordered": ordered})
