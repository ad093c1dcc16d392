"""The practical limit: one blocking socket, frames made and read by hand, nothing else. See bench/wire.py."""

from __future__ import annotations

import time

import msgspec

from bench.child import Gate, Metronome, OrderTally, Report, Tally, main, percentiles
from bench.job import ORDERED_QUEUE, Job, Sample, samples
from bench.wire import BATCH, Envelope, Wire, event_id, fill


def publish(job: Job, gate: Gate) -> None:
    """A write for each batch, and two batches on their way."""
    encode = msgspec.json.Encoder().encode
    events = list(samples(job))
    envelope = Envelope("ob.events", f"{job.topic}.00", job.topic)
    with Wire(job.broker_url) as wire:
        wire.confirms()
        began = gate.go()
        confirmed = 0
        latencies = []
        sent_at = {}
        for first in range(0, len(events), BATCH):
            batch = events[first : first + BATCH]
            sent_at[first + len(batch)] = time.perf_counter()
            wire.publish([envelope.frames(event_id(sample.number), str(sample.order_id), encode(sample)) for sample in batch])
            confirmed = wire.confirmed_up_to(first, confirmed)
            for last in [last for last in sent_at if last <= confirmed]:
                latencies.append(time.perf_counter() - sent_at.pop(last))
        wire.confirmed_up_to(len(events), confirmed)
        seconds = time.perf_counter() - began
    p50, p99 = percentiles(latencies)
    gate.done(Report(seconds, job.count, p50_ms=p50, p99_ms=p99))


def consume(job: Job, gate: Gate) -> None:
    """Decode each, call a function, one multiple acknowledgement for what one read brought."""
    decode = msgspec.json.Decoder(Sample).decode
    with Wire(job.broker_url) as wire:
        wire.declare(job.queue)
    fill(job)
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True

    tally = Tally(job.count, end)

    def handle(sample: Sample) -> None:
        tally.saw(sample.number)

    gate.go()
    with Wire(job.broker_url) as wire:
        wire.consume(job.queue, job.prefetch)
        while not ended:
            tag, bodies = wire.deliveries()
            for body in bodies:
                handle(decode(body))
            wire.ack(tag)
        wire.cancel()
    gate.done(tally.report(gate))


def ordered(job: Job, gate: Gate) -> None:
    """One consumer handles one message after the other, in the order of the queue."""
    decode = msgspec.json.Decoder(Sample).decode
    with Wire(job.broker_url) as wire:
        wire.declare(ORDERED_QUEUE, {"x-single-active-consumer": True})
    fill(job, queue=ORDERED_QUEUE)
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True

    tally = OrderTally(job.count, end)

    def handle(sample: Sample) -> None:
        tally.saw_of(sample.order_id, sample.number)

    gate.go()
    with Wire(job.broker_url) as wire:
        wire.consume(ORDERED_QUEUE, job.prefetch)
        while not ended:
            tag, bodies = wire.deliveries()
            for body in bodies:
                handle(decode(body))
            wire.ack(tag)
        wire.cancel()
    gate.done(tally.report(gate))


def latency(job: Job, gate: Gate) -> None:
    """Write, wait for the message, wait for the confirm: what the broker and two sockets take."""
    encode, decode = msgspec.json.Encoder().encode, msgspec.json.Decoder(Sample).decode
    envelope = Envelope("ob.events", f"{job.topic}.00", job.topic)
    latencies: list[float] = []
    with Wire(job.broker_url) as out, Wire(job.broker_url) as into:
        out.confirms()
        into.consume(job.queue, job.prefetch)
        confirmed = 0
        for sample in samples(job):
            if sample.number == min(Metronome.WARM_UP, job.count // 2):
                gate.go()
                latencies.clear()
            began = time.perf_counter()
            out.publish([envelope.frames(event_id(sample.number), str(sample.order_id), encode(sample))])
            tag, (body,) = into.deliveries()
            handled = decode(body)
            latencies.append(time.perf_counter() - began)
            assert handled.number == sample.number
            into.ack(tag)
            confirmed = out.confirmed_up_to(sample.number + 1, confirmed)
            time.sleep(job.options.get("gap_ms", 0) / 1000)
        into.cancel()
    p50, p99 = percentiles(latencies)
    gate.done(Report(sum(latencies), len(latencies), p50_ms=p50, p99_ms=p99))


if __name__ == "__main__":
    main({"publish": publish, "consume": consume, "latency": latency, "ordered": ordered})
