"""An asyncio event loop without sockets and threads, whose time is virtual and whose tasks belong to processes that can die.

It is a fifth of what asyncio's own does, and a run of the simulator is little else than its steps.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import sys
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Mapping
from contextvars import Context, ContextVar, copy_context
from typing import Any, Protocol
from weakref import WeakSet

import sniffio
from anyio._backends._asyncio import _task_states

from orderbus.testing.clock import waiting_place

__all__ = ["LIFE", "Life", "Loop"]

CLOSES = 10
"""How often a coroutine may await something in its cleanup before it is given up."""


class Life(Protocol):
    """The life of a process, from its start to its death, as far as the loop looks at it."""

    is_dead: bool
    steps_left: int
    """How many steps it may take before something happens to it."""
    frozen: list[Handle] | None
    """What it would do now, while it stands still."""

    def interrupt(self, handle: Handle) -> bool:
        """Its steps are used up: whether `handle` may run now."""


LIFE: ContextVar[Life | None] = ContextVar("life", default=None)
"""Whose code is running. Tasks inherit it from the task that started them."""


class Handle:
    """A callback that is to run soon, or at a time."""

    __slots__ = ("args", "at", "callback", "context", "is_cancelled", "life")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], context: Context, life: Life | None) -> None:
        self.callback = callback
        self.args = args
        self.context = context
        self.life = life
        self.is_cancelled = False
        self.at = 0.0

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.at

    @property
    def place(self) -> str:
        """Where the task that it continues waits; nothing for another callback."""
        task = getattr(self.callback, "__self__", None)
        return f"in {waiting_place(task)}" if isinstance(task, asyncio.Task) else ""


class _Task(asyncio.Task[Any]):
    """Its hash is its number: sets of tasks are gone through in the same order in every run."""

    number = 0

    def __hash__(self) -> int:
        return self.number


class Loop(asyncio.AbstractEventLoop):  # the rest is sockets, threads and signals, of which it has none
    """Runs until `idle`, asked whenever nothing can run at this moment, says that it is over.

    `steps` counts callbacks. Time begins at 0.0 and jumps to the next timer.
    """

    def __init__(self, idle: Callable[[], bool]) -> None:
        self._idle = idle
        self._now = 0.0
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._number = 0
        self._tasks: list[asyncio.Task[Any]] = []
        self._generators: WeakSet[Any] = WeakSet()
        self.life: Life | None = None
        self.steps = 0
        self.errors: list[Mapping[str, Any]] = []
        """What no task could be told."""

    def run(self, begin: Callable[[], None], judge: Callable[[bool], None], most_steps: int) -> None:
        """Run what `begin` starts, have it judged (whether it is over, or stuck), and close what is left of it.

        It is stuck when it has used up its steps, and when nothing can bring about any more what its tasks wait for.
        """
        hooks = sys.get_asyncgen_hooks()
        unraisable = sys.unraisablehook
        asyncio._set_running_loop(self)
        library = sniffio.current_async_library_cvar.set("asyncio")
        sys.set_asyncgen_hooks(firstiter=self._generators.add, finalizer=_close)
        try:
            begin()
            judge(self._run(most_steps))
        finally:
            # What a dead process had still to clean up no longer matters to anybody, nor what goes wrong with it.
            sys.unraisablehook = lambda _: None
            self._bury()
            sys.unraisablehook = unraisable
            sys.set_asyncgen_hooks(*hooks)
            sniffio.current_async_library_cvar.reset(library)
            asyncio._set_running_loop(None)

    def overtake(self, handle: Handle, others: int) -> None:
        """Let so many others of those that are ready run before it."""
        self._ready.insert(min(others, len(self._ready)), handle)

    def resume(self, handles: list[Handle]) -> None:
        """Have these run next, in their order."""
        self._ready.extendleft(reversed(handles))

    def _run(self, most_steps: int) -> bool:
        ready = self._ready
        for step in range(most_steps):
            while not ready:
                if self._idle():
                    return True
                if not self._timers:
                    return False
                self._jump()
            handle = ready.popleft()
            life = handle.life
            if handle.is_cancelled:
                continue
            if life is not None:
                if life.is_dead:
                    continue
                if life.frozen is not None:
                    life.frozen.append(handle)
                    continue
                life.steps_left -= 1
                if life.steps_left < 0:
                    self.life = life
                    if not life.interrupt(handle):
                        continue
            self.life = life
            self.steps = step
            handle.context.run(handle.callback, *handle.args)
        return False

    def _jump(self) -> None:
        self._now, _, handle = heapq.heappop(self._timers)
        self._ready.append(handle)
        while self._timers and self._timers[0][0] <= self._now:
            self._ready.append(heapq.heappop(self._timers)[2])

    def _bury(self) -> None:
        self.life = None
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                _close(task.get_coro())
                # It never ends, so anyio would keep it for ever: what it remembers of a task leads back to that task.
                _task_states.pop(task, None)
        for generator in list(self._generators):
            _close(generator)
        self._ready.clear()
        self._timers.clear()
        self._tasks.clear()

    # What asyncio and anyio ask of a loop

    def time(self) -> float:
        return self._now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        life = self.life if context is None else context.get(LIFE)
        handle = Handle(callback, args, copy_context() if context is None else context, life)
        self._ready.append(handle)
        return handle

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        handle = Handle(callback, args, copy_context() if context is None else context, self.life)
        handle.at = when
        if when < math.inf:
            self._number += 1
            heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> Handle:  # type: ignore[override]
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any] | Generator[Any, None, Any], *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = _Task(coro, loop=self, name=str(name), context=context)
        self._number += 1
        task.number = self._number
        self._tasks.append(task)
        return task

    def get_task_factory(self) -> None:
        return None

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: Mapping[str, Any]) -> None:
        self.errors.append(context)


def _close(waiting: Any) -> None:
    """End a suspended coroutine or generator, whatever it does about it."""
    for _ in range(CLOSES):
        try:
            if hasattr(waiting, "aclose"):
                waiting.aclose().send(None)
            else:
                waiting.close()
        except StopIteration:
            return
        except BaseException:  # its errors are those of a process that is dead
            if getattr(waiting, "cr_frame", None) is None and getattr(waiting, "ag_frame", None) is None:
                return
            continue
        if not hasattr(waiting, "aclose"):
            return
