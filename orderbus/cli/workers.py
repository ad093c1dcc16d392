"""Several processes of `orderbus run`, or one that begins again when a file changes: started, watched and stopped together."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress

import anyio
import anyio.abc

from orderbus.cli.exits import ExitCode
from orderbus.errors import UsageError

log = logging.getLogger("orderbus")

PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between the end of a worker and the next one in its place; twice as long after each life that was short."""
SHORT_S = 10.0
START_S = 180.0
"""A first life that ends with UNAVAILABLE before that never began: each host of a server that does not answer is given 10 s."""


class Workers:
    """`count` processes of one command, each told its number. Their stdin is a pipe to this process: it ends when we do."""

    def __init__(self, command: Sequence[str], count: int, *, reload: bool) -> None:
        if reload and importlib.util.find_spec("watchfiles") is None:
            raise UsageError("--reload needs the package watchfiles: pip install 'orderbus[cli]'", code="OB108")
        self._command = command
        self._count = count
        self._reload = reload
        self._processes: dict[int, anyio.abc.Process] = {}
        self._replaced: set[int] = set()
        self._changed = anyio.Event()
        self._stopping = anyio.Event()
        self._codes: list[int] = []
        self._failed: int | None = None

    async def run(self) -> ExitCode:
        """Until a signal, or until a worker can't go on. FINE where all ended cleanly."""
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._listen)
            if self._reload:
                tasks.start_soon(self._watch)
            async with anyio.create_task_group() as workers:
                for number in range(self._count):
                    workers.start_soon(self._keep, number)
            tasks.cancel_scope.cancel()
        if self._failed is not None:
            return ExitCode(self._failed) if self._failed in (ExitCode.USAGE, ExitCode.UNAVAILABLE) else ExitCode.UNCLEAN
        not_begun = (-signal.SIGTERM, -signal.SIGINT)
        return ExitCode.FINE if all(code == 0 or code in not_begun for code in self._codes) else ExitCode.UNCLEAN

    async def _keep(self, number: int) -> None:
        """One worker after the other, in one place. Where the first fails to start, so would the others: that ends all."""
        is_first, short = True, 0
        while not self._stopping.is_set():
            began = anyio.current_time()
            changed = self._changed
            code = await self._one(number)
            lived_s = anyio.current_time() - began
            is_short = lived_s < SHORT_S
            if self._stopping.is_set():
                self._codes.append(code)
            elif number in self._replaced:
                self._replaced.discard(number)
            elif self._reload:
                log.error("worker %d ended with %s; it begins again when a file changes", number, _said(code))
                await self._wait_for(changed)
            elif is_first and code > 0 and (is_short or (code == ExitCode.UNAVAILABLE and lived_s < START_S)):
                log.error("worker %d could not start (%s): stopping all", number, _said(code))
                self._failed = code
                self._stop()
            else:
                short = short + 1 if is_short else 0
                pause_s = min(PAUSE_S * 2 ** min(short, 10), LONGEST_PAUSE_S)
                log.error("worker %d ended with %s; another begins in its place in %g s", number, _said(code), pause_s)
                with anyio.move_on_after(pause_s):
                    await self._stopping.wait()
            is_first = False

    async def _one(self, number: int) -> int:
        command = [*self._command, "--worker", str(number)]
        try:
            process = await anyio.open_process(command, stdin=subprocess.PIPE, stdout=None, stderr=None)
        except OSError as error:  # no memory, or no more processes: let out, it would have the others killed
            log.error("worker %d: no process can be started: %s", number, error)
            return ExitCode.UNCLEAN
        self._processes[number] = process
        if self._stopping.is_set():  # while it was being started
            self._terminate()
        async with process:
            code = await process.wait()
        del self._processes[number]
        return code

    async def _watch(self) -> None:
        from watchfiles import PythonFilter, awatch

        try:
            async for changes in awatch(os.getcwd(), watch_filter=PythonFilter(), stop_event=self._stopping):
                log.info("%s changed: beginning again", _names(path for _, path in changes))
                self._replaced |= self._processes.keys()
                self._terminate()
                self._changed.set()
                self._changed = anyio.Event()
        except (OSError, RuntimeError) as error:  # the user's inotify watches are used up, or the folder is gone
            log.error("this folder can't be watched for changes: %s; stopping all", error)
            self._failed = ExitCode.UNCLEAN
            self._stop()

    async def _wait_for(self, changed: anyio.Event) -> None:
        async with anyio.create_task_group() as tasks:

            async def stopped() -> None:
                await self._stopping.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(stopped)
            await changed.wait()
            tasks.cancel_scope.cancel()

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("received %s: stopping %d workers", signal.Signals(number).name, len(self._processes))
                self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        self._terminate()

    def _terminate(self) -> None:
        for process in self._processes.values():
            with suppress(ProcessLookupError):  # it has ended just now
                process.terminate()


def _names(paths: Iterable[str]) -> str:
    return ", ".join(sorted(os.path.relpath(path) for path in paths))


def _said(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
