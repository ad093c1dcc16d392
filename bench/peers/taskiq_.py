"""taskiq with its aio-pika broker: quorum queues are its default, orjson the faster of its JSON serializers.

The worker is the `Receiver` that `taskiq worker` runs in each of its processes, with that command's defaults.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor

import msgspec
from pamqp import commands
from taskiq import SimpleRetryMiddleware, TaskiqMessage
from taskiq.receiver import Receiver
from taskiq.serializers import ORJSONSerializer
from taskiq_aio_pika import AioPikaBroker, Exchange, Queue, QueueType

from bench.child import Fault, Gate, Tally, main
from bench.job import Job, Sample
from bench.wire import event_id, fill, message

ASYNC_TASKS = 100


def broker_for(job: Job) -> AioPikaBroker:
    queue = Queue(name=job.queue, type=QueueType.QUORUM, durable=True)
    broker = AioPikaBroker(job.broker_url, qos=job.prefetch, exchange=Exchange(name=job.topic), task_queues=[queue])
    return broker.with_serializer(ORJSONSerializer())


async def fill_with_tasks(job: Job, name: str, labels: dict[str, object] | None = None) -> None:
    """Messages as `kiq` would send them, each made with taskiq's own code, in queues that taskiq has declared."""
    broker = broker_for(job)
    await broker.startup()
    await broker.shutdown()

    def frames(sample: Sample) -> bytes:
        task = TaskiqMessage(
            task_id=event_id(sample.number),
            task_name=name,
            labels=labels or {},
            args=[],
            kwargs={"sample": msgspec.to_builtins(sample)},
        )
        made = broker.formatter.dumps(task)
        headers = {"task_id": made.task_id, "task_name": made.task_name, **made.labels}
        return message(job.queue, made.message, commands.Basic.Properties(headers=headers, delivery_mode=2))

    fill(job, frames)


async def work(broker: AioPikaBroker, all_seen: asyncio.Event) -> None:
    """Run a worker until all messages are seen, and let it end what it has begun."""
    broker.is_worker_process = True
    finish = asyncio.Event()
    with ThreadPoolExecutor(1) as executor:
        receiver = Receiver(broker, executor, validate_params=False, max_async_tasks=ASYNC_TASKS, run_startup=True)
        listening = asyncio.create_task(receiver.listen(finish))
        await all_seen.wait()
        finish.set()
        await listening
    await broker.shutdown()


async def retry(job: Job, gate: Gate) -> None:
    """The retry middleware publishes the task again, confirmed; then it is acknowledged."""
    logging.disable()
    broker = broker_for(job).with_middlewares(SimpleRetryMiddleware(default_retry_label=True))
    await run(job, gate, broker, Fault(job.count))


async def consume(job: Job, gate: Gate) -> None:
    await run(job, gate, broker_for(job))


async def run(job: Job, gate: Gate, broker: AioPikaBroker, fault: Fault | None = None) -> None:
    all_seen = asyncio.Event()
    tally = Tally(job.count, all_seen.set)

    @broker.task("handle")
    async def handle(sample: dict[str, object]) -> None:
        number = msgspec.convert(sample, Sample).number
        if fault:
            fault.strike(number)
        tally.saw(number)

    await fill_with_tasks(job, "handle")
    gate.go()
    await work(broker, all_seen)
    gate.done(tally.report(gate))


if __name__ == "__main__":
    main({"consume": consume, "retry": retry})
