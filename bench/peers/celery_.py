"""Celery: a quorum queue as its documentation sets it up, late acknowledgement, and the solo pool.

For tasks as small as these solo is the fastest pool: one process reads, runs and acknowledges, and nothing is passed between
processes or threads.
"""

import logging
import os
import signal

import msgspec
from celery import Celery, signals
from celery.worker import WorkController
from kombu.serialization import dumps
from pamqp import commands

from bench.child import Fault, Gate, PassingFailure, Tally, main
from bench.job import Job, Sample
from bench.wire import Wire, event_id, fill, message

IDLE_S = 2.0


def app_for(job: Job) -> Celery:
    """The result of a task, events and remote control, which nothing here needs, are off."""
    app = Celery("bench", broker=job.broker_url)
    app.conf.update(
        task_default_queue=job.queue,
        task_default_queue_type="quorum",
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=job.prefetch,
        worker_enable_remote_control=False,
        worker_redirect_stdouts=False,
        worker_hijack_root_logger=False,
        broker_transport_options={"confirm_publish": True},
        broker_connection_retry_on_startup=True,
    )
    return app


def fill_with_tasks(job: Job, app: Celery, name: str) -> None:
    """Messages as `apply_async` would send them, each made with Celery's own code."""

    def frames(sample: Sample) -> bytes:
        arguments = (msgspec.to_builtins(sample),)
        task = app.amqp.as_task_v2(event_id(sample.number), name, args=arguments, kwargs={}, argsrepr="", kwargsrepr="")
        content_type, encoding, body = dumps(task.body, serializer="json")
        properties = commands.Basic.Properties(
            content_type=content_type,
            content_encoding=encoding,
            headers=task.headers,
            delivery_mode=2,
            priority=0,
            correlation_id=task.properties["correlation_id"],
        )
        return message(job.queue, body.encode(), properties)

    with Wire(job.broker_url) as wire:
        wire.declare(job.queue)
    fill(job, frames)


def worker_of(app: Celery, gate: Gate) -> WorkController:
    """It says that it is ready when it has declared its thirty queues for delays, and consumes."""
    signals.worker_ready.connect(lambda **_: gate.go(), weak=False)
    return app.Worker(
        pool="solo",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
        loglevel="ERROR",
    )


def stop(worker: WorkController) -> None:
    """What an operator does, when the worker has been idle for a while.

    At once would be unfair: the last acknowledgements wait until its loop turns, a second later, and if they go out just before the
    connection is closed, RabbitMQ 3.10 loses some of them on their way to a quorum queue.
    """
    worker.timer.call_after(IDLE_S, os.kill, (os.getpid(), signal.SIGTERM))


def retry(job: Job, gate: Gate) -> None:
    """`autoretry_for` without a delay: the task is published again, confirmed, and then acknowledged."""
    logging.disable()
    consume(job, gate, Fault(job.count))


def consume(job: Job, gate: Gate, fault: Fault | None = None) -> None:
    app = app_for(job)
    tally = Tally(job.count, lambda: stop(worker))

    @app.task(name="handle", autoretry_for=(PassingFailure,), default_retry_delay=0)
    def handle(sample: dict[str, object]) -> None:
        number = msgspec.convert(sample, Sample).number
        if fault:
            fault.strike(number)
        tally.saw(number)

    fill_with_tasks(job, app, "handle")
    worker = worker_of(app, gate)
    worker.start()
    gate.done(tally.report(gate))


if __name__ == "__main__":
    main({"consume": consume, "retry": retry})
