"""Virtual time for tests: a timer that is due in an hour fires at once when nothing else is left to do.

    @pytest.fixture(params=virtual_backends())
    def anyio_backend(request):
        return request.param

Everything that asks `anyio.current_time()`, sleeps, or has a deadline then lives in that time; `time.time()` does not. A time
limit around real I/O, a process or a thread runs out at once, for to the clock it is waiting: test those in real time.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import sniffio

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet
    from _typeshed import FileDescriptorLike

__all__ = ["DeadlockError", "VirtualTimeLoop", "is_virtual", "virtual_backend", "virtual_backends"]

PATIENCE_S = 10.0
"""How long, in real time, a test without timers may wait for a socket or a thread before it is taken for a deadlock."""


def virtual_backends() -> list[ParameterSet]:
    """The parameters of an `anyio_backend` fixture: asyncio and trio, both in virtual time.

    On asyncio each test begins at 0; on trio the tests that share one call of this share a clock, which goes on from one to
    the next. A test that can't go on fails with DeadlockError on both.
    """
    import pytest

    return [pytest.param(virtual_backend(name), id=f"{name}-virtual") for name in ("asyncio", "trio")]


def virtual_backend(name: Literal["asyncio", "trio"]) -> tuple[str, dict[str, Any]]:
    """What `anyio_backend` is to be for virtual time; of `anyio.run` it is `backend` and `backend_options`."""
    if name == "asyncio":
        return name, {"loop_factory": VirtualTimeLoop}
    from trio.testing import MockClock

    from orderbus.testing.trio_deadlock import DeadlockWatch

    return name, {"clock": MockClock(autojump_threshold=0), "instruments": [DeadlockWatch()]}


def is_virtual() -> bool:
    """Whether the event loop that runs now has virtual time: a VirtualTimeLoop, or trio with a MockClock."""
    if sniffio.current_async_library() == "trio":
        import trio
        from trio.testing import MockClock

        return isinstance(trio.lowlevel.current_clock(), MockClock)
    return isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


class DeadlockError(RuntimeError):
    """Every task waits for something that nothing can bring about any more."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop whose time stands still while there is work, and jumps to the next timer when there is none.

    Time starts at 0.0. Sockets and threads work as ever: what is ready is handled before the clock jumps. Where there is no
    timer to jump to, the loop waits for sockets and threads up to PATIENCE_S real seconds, and not at all where there are
    none; then it raises DeadlockError out of the loop's run, naming every task and the line at which it waits.
    """

    def __init__(self) -> None:
        self._virtual_time = 0.0
        super().__init__(_JumpingSelector(self))
        # The loop fires what is due before now + resolution. asyncio's own 1 ns vanishes in a float after some months, and
        # a timer that is due exactly now would then never fire.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual_time

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Wait for the threads without the limit of Python 3.12: in virtual time it would be over at once."""
        await super().shutdown_default_executor()

    def _jump(self) -> bool:
        """To the next timer, if there is one."""
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        if not timers:
            return False
        # To its exact time instead of by a difference, so that sleep(0.1) three times ends at the same float everywhere.
        self._virtual_time = max(self._virtual_time, timers[0].when())
        return True

    def _deadlock(self) -> DeadlockError:
        return DeadlockError(
            deadlock_text(sorted(f"{task.get_name()} in {waiting_place(task)}" for task in asyncio.all_tasks(self)))
        )


class _JumpingSelector(selectors.BaseSelector):
    """The loop's own selector. That it is asked to wait tells that nothing is ready; then it lets the clock jump instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        self._loop = loop
        self._real = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if ready or (timeout is not None and timeout <= 0) or self._loop._jump():
            return ready
        # One file descriptor is the loop's own, by which threads and signals wake it.
        if len(self._real.get_map()) > 1 or threading.active_count() > 1:
            ready = self._real.select(PATIENCE_S)
        if not ready:
            raise self._loop._deadlock()
        return ready

    def register(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: FileDescriptorLike, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def deadlock_text(waiting: Sequence[str]) -> str:
    places = "".join(f"\n  - {place}" for place in waiting)
    return f"deadlock: no task can run, no timer is set, and no socket or thread has anything to say; waiting are{places}"


def innermost_own(places: Sequence[str]) -> str:
    """Of the places where a task waits, outermost first, the last that is not inside a library."""
    own = [place for place in places if "site-packages" not in place and "/lib/python" not in place]
    return (own or list(places) or ["an unknown place"])[-1]


def waiting_place(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the innermost of its functions that is not inside a library, with file and line."""
    places = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)) is not None:
        places.append(f"{frame.f_code.co_qualname}, {frame.f_code.co_filename}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return innermost_own(places)
