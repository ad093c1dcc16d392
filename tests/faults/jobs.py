"""Scenarios beside each other: each job is a process with servers of its own, and takes the next scenario when it has done one."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from multiprocessing.queues import Queue
from queue import Empty

from tests.faults.scenario import BUILD, Result, all_scenarios, run
from tests.faults.servers import Servers

Task = tuple[str, int]
"""A scenario's name, and the seed."""

LOOK_S = 1.0


def results_of(tasks: Sequence[Task], jobs: int, rate: float) -> Iterator[Result]:
    """As they come. The jobs end with the iterator; it ends the program where they all end too early."""
    context = multiprocessing.get_context("spawn")
    left: Queue[Task | None] = context.Queue()
    done: Queue[Result] = context.Queue()
    for task in [*tasks, *[None] * jobs]:
        left.put(task)
    processes = [context.Process(target=_job, args=(left, done, rate)) for _ in range(jobs)]
    for process in processes:
        process.start()
    try:
        for _ in tasks:
            while (result := _next(done)) is None:
                if not any(process.is_alive() for process in processes):
                    sys.exit("no job is left; what ended them is said above")
            yield result
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def spread(names: Sequence[str], jobs: int) -> list[str]:
    """An order in which those that run beside each other are far apart: neighbours are alike, and two clusters at once too much."""
    parts = [names[len(names) * n // jobs : len(names) * (n + 1) // jobs] for n in range(jobs)]
    return [name for row in zip_longest(*parts) for name in row if name is not None]


def _next(done: Queue[Result]) -> Result | None:
    try:
        return done.get(timeout=LOOK_S)
    except Empty:
        return None


def _job(left: Queue[Task | None], done: Queue[Result], rate: float) -> None:
    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would break the cleanup off: a server stayed, stopped
        done.cancel_join_thread()  # nobody reads any longer
        sys.exit(143)  # so that the servers and processes end with it

    signal.signal(signal.SIGTERM, end)
    with ExitStack() as stack:
        servers, scenarios = Servers(stack), all_scenarios()
        while (task := left.get()) is not None:
            name, seed = task
            done.put(run(scenarios[name], servers, seed, rate=rate, folder=BUILD / str(seed)))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it comes when the last result was read, and the cleanup has begun
