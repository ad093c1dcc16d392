"""dramatiq on RabbitMQ, with the middleware and the eight worker threads that it comes with (one thread was no faster)."""

import logging
import threading

import dramatiq
import msgspec
from dramatiq import Message, Worker
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from pamqp import commands

from bench.child import Fault, Gate, Tally, main
from bench.job import Job, Sample
from bench.wire import event_id, fill, message

THREADS = 8


class QuorumBroker(RabbitmqBroker):
    """dramatiq declares classic queues and has no option for it; this is where it makes their arguments."""

    def _build_queue_arguments(self, queue_name: str) -> dict[str, object]:
        return {**super()._build_queue_arguments(queue_name), "x-queue-type": "quorum"}


def broker_for(job: Job) -> QuorumBroker:
    return QuorumBroker(url=job.broker_url, confirm_delivery=True)


def fill_with_messages(job: Job, broker: QuorumBroker, actor: str) -> None:
    """Messages as `send` would send them, each made with dramatiq's own code, in queues that dramatiq has declared."""
    broker.declare_queue(job.queue, ensure=True)

    def frames(sample: Sample) -> bytes:
        made = Message(job.queue, actor, (msgspec.to_builtins(sample),), {}, {}, message_id=event_id(sample.number))
        return message(job.queue, made.encode(), commands.Basic.Properties(delivery_mode=2))

    fill(job, frames)


def work(job: Job, broker: QuorumBroker, all_seen: threading.Event) -> None:
    """Run a worker until all messages are seen, and let it end what it has begun."""
    worker = Worker(broker, worker_threads=THREADS, worker_timeout=100)
    worker.queue_prefetch = job.prefetch  # what the environment's dramatiq_queue_prefetch sets
    worker.start()
    all_seen.wait()
    worker.stop()
    broker.close()


def retry(job: Job, gate: Gate) -> None:
    """The retry middleware, which is there by default, with its shortest waits: 15 s would be the first."""
    logging.disable()
    consume(job, gate, Fault(job.count))


def consume(job: Job, gate: Gate, fault: Fault | None = None) -> None:
    broker = broker_for(job)
    all_seen = threading.Event()
    tally = Tally(job.count, all_seen.set)
    one_at_a_time = threading.Lock()

    @dramatiq.actor(actor_name="handle", queue_name=job.queue, broker=broker, min_backoff=100, max_backoff=100)
    def handle(sample: dict[str, object]) -> None:
        number = msgspec.convert(sample, Sample).number
        if fault:
            fault.strike(number)
        with one_at_a_time:
            tally.saw(number)

    fill_with_messages(job, broker, "handle")
    gate.go()
    work(job, broker, all_seen)
    gate.done(tally.report(gate))


if __name__ == "__main__":
    main({"consume": consume, "retry": retry})
