"""One run: the servers, the processes that use them, and the promises that are to hold."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from typing import Any

from orderbus import Bus, OrderbusError, UsageError
from orderbus._core.parked import Parked, is_dead_letter_queue, read_parked
from orderbus.adapters.memory import MemoryClaims
from orderbus.testing.sim.decisions import Chooser, Decision
from orderbus.testing.sim.determinism import EPOCH_S
from orderbus.testing.sim.ledger import Ledger, Params, Statement
from orderbus.testing.sim.loop import LIFE, Loop
from orderbus.testing.sim.process import Process, Script
from orderbus.testing.sim.servers import Answer, LedgerBroker, LedgerStore

__all__ = ["World"]

MOST_STEPS = 200_000


class World:
    """What a scenario is given: it says which buses run, as which processes, and what must hold in the end."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.loop = Loop(self._is_over)  # type: ignore[abstract]
        self.ledger = Ledger()
        self.trace: list[tuple[float, str, str, int, str]] = []
        """What was called, in its order: when (s), by which process, which operation, for the how manieth time, what happened."""
        self.limit_s = 600.0
        """When (s) work that is still left counts as stuck. To be set by a scenario whose retries take longer."""
        self._processes: list[Process] = []
        self._invariants: list[Callable[[], object]] = []
        self._expects: Callable[[Parked], bool] = _nothing
        self._answer: Answer = _no_rows
        self._pending = 0
        self._failures: list[str] = []
        self._broken: list[str] = []

    # What a scenario says

    def process(self, bus: Bus, script: Script | None = None, *, name: str | None = None) -> None:
        """Run a bus as a process of its own, under its group's name unless another is given.

        `script(bus)` is what it does beside its handlers, with the bus open. When the process dies it is started again, and so is
        its script, until it has come to its end once. Give the same bus several times for a group of several processes.
        """
        names = {process.name for process in self._processes}
        chosen = name or bus.group
        number = 2
        while chosen in names:
            chosen = f"{name or bus.group}-{number}"
            number += 1
        self.ledger.knows(bus.handlers)
        self._processes.append(Process(self, chosen, bus, script))

    def invariant(self, check: Callable[[], object]) -> None:
        """What must hold once everything has come to rest: `check` raises AssertionError where it does not."""
        self._invariants.append(check)

    def expect_parked(self, expects: Callable[[Parked], bool]) -> None:
        """Which messages may be parked; any other that is counts as innocent. None may, unless this says so."""
        self._expects = expects

    def answer(self, answer: Answer) -> None:
        """What queries of handlers are answered: the rows for an SQL text and its parameters. None, unless this says so."""
        self._answer = answer

    # What it may look at

    @property
    def committed(self) -> Sequence[Statement]:
        """The statements of all transactions that were committed, in the order of the commits."""
        return self.ledger.statements

    def rows(self, sql: str) -> list[Params]:
        """The parameters of all committed statements whose text begins with `sql`."""
        return [statement.params for statement in self.ledger.statements if statement.sql.startswith(sql)]

    def parked(self) -> list[Parked]:
        """The dead letters of all queues."""
        letters = []
        for name in self.broker.queue_names():
            if is_dead_letter_queue(name):
                letters += [read_parked(incoming) for incoming in self.broker.messages(name)]
        return letters

    def now(self) -> float:
        """The time of day, as all processes see it: a Unix time that begins at the same moment in every run."""
        return EPOCH_S + self.loop.time()

    # What processes and the loop ask of it

    def after(self, delay_s: float, act: Callable[[], object]) -> None:
        """Do something that no process does; the run is not over before."""
        self._pending += 1
        life, self.loop.life = self.loop.life, None
        self.loop.call_later(delay_s, self._act, act)
        self.loop.life = life

    def serve(self, delay_s: float, call: Callable[[], Awaitable[object]]) -> None:
        """Have a server do what a process had sent to it."""

        async def done() -> None:
            try:
                await call()
            except OrderbusError as error:
                self.trace.append((self.loop.time(), "servers", "late request", 1, str(error)))
            finally:
                self._pending -= 1

        def begin() -> None:
            self._pending += 1
            context = copy_context()
            context.run(LIFE.set, None)
            self.loop.create_task(done(), name="server", context=context)

        self.after(delay_s, begin)

    def decide(self, process: Process, operation: str) -> Decision | None:
        n = process.calls.next(operation)
        decision = self.chooser.at(process.name, operation, n)
        what = "" if decision is None else str(decision).rpartition(":")[2]
        self.trace.append((self.loop.time(), process.name, operation, n, what))
        return decision

    def happens(self, decision: Decision, where: str) -> None:
        """Something happens to a process at one of its steps."""
        what = f"{str(decision).rpartition(':')[2]} {where}"
        self.trace.append((self.loop.time(), decision.process, decision.operation, decision.n, what))

    def fail(self, process: Process, error: BaseException) -> None:
        """A program ended with an error that no server is to blame for."""
        lines = "".join(traceback.format_exception(error))
        self._failures.append(f"failed: process {process.name} ended with {type(error).__name__}\n{lines}")

    def unclean(self, process: Process, what: str) -> None:
        """A drain left something undone."""
        self._failures.append(f"unclean: the drain of process {process.name} {what}")

    def run(self, scenario: Callable[[World], object]) -> list[str]:
        """Run a scenario until everything has come to rest; which promises it broke."""

        def begin() -> None:
            self.broker = LedgerBroker(self.ledger)
            self.store = LedgerStore(self.ledger)
            self.claims = MemoryClaims()
            scenario(self)
            if not self._processes:
                raise UsageError("the scenario runs no process; call world.process(bus) in it", code="OB903")
            self.store.answer = self._answer
            for process in self._processes:
                process.start()

        self.loop.run(begin, self._end, MOST_STEPS)
        return self._broken

    def _act(self, act: Callable[[], object]) -> None:
        self._pending -= 1
        act()

    def _is_over(self) -> bool:
        if self._failures or self.ledger.broken or self.loop.time() > self.limit_s:
            return True
        return (
            not self._pending
            and all(process.is_at_rest for process in self._processes)
            and self.store.outbox.is_empty
            and self.broker.is_empty(_is_worked_off)
        )

    def _end(self, is_over: bool) -> None:
        """Judge while all is as it was when it came to rest; then there is nobody left whom anything could happen to."""
        self._judge(is_over)
        for process in self._processes:
            if process.life is not None:
                process.life.is_dead = True

    def _judge(self, is_over: bool) -> None:
        self._broken = self._failures + self.ledger.broken
        self._broken += [f"failed: {context.get('message')}: {context.get('exception')!r}" for context in self.loop.errors]
        if self._broken:
            return
        if not is_over or self.loop.time() > self.limit_s:
            left = ", ".join(self.broker.left(_is_worked_off)) or "none in the queues"
            when = f"{self.loop.time():g} s and {self.loop.steps} steps"
            work = f"there is work left: {left}; {len(self.store.outbox.rows())} in the outbox"
            still = [process.name for process in self._processes if process.life is not None and process.life.is_stopped]
            ending = f"; told to end, and still here: {', '.join(still)}" if still else ""
            self._broken = [f"stuck: after {when} {work}{ending}"]
            return
        self._broken = self.ledger.broken_promises(self.parked(), self._expects)
        for check in self._invariants:
            try:
                check()
            except AssertionError as error:
                self._broken.append(f"invariant: {error or getattr(check, '__name__', check)}")


def _is_worked_off(queue: str) -> bool:
    return not is_dead_letter_queue(queue)


def _nothing(letter: Parked) -> bool:
    return False


def _no_rows(sql: str, params: Params) -> Sequence[tuple[Any, ...]]:
    return ()
