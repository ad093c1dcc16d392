"""Ends a trio run in virtual time that can't go on: left alone, trio would spin for ever, looking for a timer to jump to."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import trio

from orderbus.testing import clock

__all__ = ["DeadlockWatch"]


class DeadlockWatch(trio.abc.Instrument):
    """Raises DeadlockError in a stuck task, at the line where it waits, once nothing can happen any more.

    To be given to the run beside `MockClock(autojump_threshold=0)`. While sockets or threads may still have something to say,
    it waits for them up to `clock.PATIENCE_S` real seconds.
    """

    def __init__(self) -> None:
        self._idle_since: float | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._idle_since = None

    def after_io_wait(self, timeout: float) -> None:
        if self._idle_since is None:
            self._idle_since = time.monotonic()
            return
        statistics = trio.lowlevel.current_statistics()
        if statistics.tasks_runnable or statistics.seconds_to_next_deadline < math.inf:
            return
        if time.monotonic() - self._idle_since < (clock.PATIENCE_S if _may_hear_from_outside() else 0):
            time.sleep(0.001)  # no task can run, and trio itself would keep the processor busy
            return
        self._idle_since = None
        _raise_in_one(list(_leaves()))


def _may_hear_from_outside() -> bool:
    io = trio.lowlevel.current_statistics().io_statistics
    sockets = getattr(io, "tasks_waiting_read", 0) + getattr(io, "tasks_waiting_write", 0)
    # trio itself reads from one socket, by which threads and signals wake it.
    return sockets > 1 or threading.active_count() > 1


def _leaves() -> Iterator[trio.lowlevel.Task]:
    """The user's tasks that wait for something else than their own children."""
    root = trio.lowlevel.current_root_task()
    assert root is not None
    # The innermost nursery of the init task is that of the main task; the outer ones hold trio's own.
    pending = [task for nursery in root.child_nurseries[-1:] for task in nursery.child_tasks]
    while pending:
        task = pending.pop()
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        pending += children
        if not children:
            yield task


def _raise_in_one(stuck: list[trio.lowlevel.Task]) -> None:
    error = clock.DeadlockError(clock.deadlock_text(sorted(_where(task) for task in stuck)))

    def raise_it() -> NoReturn:
        raise error

    # trio has no public way to raise in a blocked task; this is what it does itself to deliver a KeyboardInterrupt.
    for task in stuck:
        if task._abort_func is not None:
            task._attempt_abort(raise_it)
            return


def _where(task: trio.lowlevel.Task) -> str:
    places = [
        f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}:{line}" for frame, line in task.iter_await_frames() if line
    ]
    return f"{task.name} in {clock.innermost_own(places)}"
