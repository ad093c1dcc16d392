"""Processes: each opens a bus, lives, dies in the middle of whatever it does, and is started again."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import anyio

from orderbus import Bus, Settings
from orderbus.adapters.memory.broker import brokers
from orderbus.adapters.memory.claims import tables
from orderbus.adapters.memory.store import stores
from orderbus.errors import UnavailableError
from orderbus.testing.sim.decisions import NEVER, Calls, Decision, Fault
from orderbus.testing.sim.faulty import DIRECT, FaultyBroker, FaultyClaims, FaultyStore, FaultySubscription, FaultyTransaction
from orderbus.testing.sim.loop import LIFE, Handle
from orderbus.testing.sim.servers import LedgerClaims

if TYPE_CHECKING:
    from types import TracebackType
    from uuid import UUID

    from orderbus._runtime.stats import DrainReceipt
    from orderbus.testing.sim.world import World

__all__ = ["Process", "Script"]

Script = Callable[[Bus], Awaitable[object]]
RESTART_S = 0.1
_LASTING = frozenset({Fault.LATE, Fault.ANSWER_LATE, Fault.FROZEN})


class Process:
    """What is started anew each time it has died."""

    def __init__(self, world: World, name: str, bus: Bus, script: Script | None) -> None:
        self.world = world
        self.name = name
        self.bus = bus
        self.script = script
        self.plans = bus.plans()
        self.calls = Calls()
        self.steps = 0
        """How many it has taken in all of its lives."""
        self.lives = 0
        self.life: Life | None = None

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is left for it to do of itself: one that is told to end has to end first."""
        life = self.life
        return life is not None and life.frozen is None and not (life.is_dead or life.is_stopped) and self.script is None

    def start(self) -> None:
        self.lives += 1
        self.life = Life(self)
        self.life.begin()

    def restart(self, in_s: float) -> None:
        self.life = None
        self.world.after(in_s, self.start)


class Life:
    """One life of a process. All that it has with the servers ends with it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self.is_dead = False
        self.frozen: list[Handle] | None = None
        self.subscriptions: dict[FaultySubscription, None] = {}
        self.transactions: dict[FaultyTransaction, None] = {}
        self.steps_left = NEVER
        self._stop = anyio.CancelScope()
        self._restart_s = RESTART_S
        self._steps_given = NEVER
        self._troubles = 0
        """How often something happened to a call of it, or made it stand still."""
        self._troubled_until = 0.0
        """When (s) the last of it that lasts is over."""

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stop.cancel_called

    def begin(self) -> None:
        process, world = self._process, self._world
        name = f"{process.name}-{process.lives}"
        self._lent = (
            brokers.lend(name, FaultyBroker(world.broker, self)),  # type: ignore[arg-type]
            stores.lend(name, FaultyStore(world.store, self)),  # type: ignore[arg-type]
            tables.lend(name, FaultyClaims(LedgerClaims(world.ledger, world.claims, holder=self), self)),  # type: ignore[arg-type]
        )
        self._expect()
        context = copy_context()
        context.run(LIFE.set, self)
        world.loop.create_task(self._live(f"memory://{name}"), name=name, context=context)

    async def _live(self, url: str) -> None:
        process = self._process
        try:
            with self._stop:
                async with _SimBus(self, process, url) as bus:
                    if process.script is not None:
                        await process.script(bus)
                        process.script = None
                    await anyio.sleep_forever()
        except BaseException as error:
            if self.is_dead:  # and only now buried
                return
            if not _is_away(error):
                self._world.fail(process, error)
                return
        self.die(self._restart_s)

    # What may happen to it

    def at(self, operation: str) -> Decision | None:
        if self.is_dead:
            raise UnavailableError("this process is dead")
        decision = self._world.decide(self._process, operation)
        if decision is not None:
            self._suffers(decision)
        return decision

    def interrupt(self, handle: Handle) -> bool:
        process, world = self._process, self._world
        self._count_steps()
        decision = world.chooser.at_step(process.name, process.steps)
        self._expect()
        if decision is None:
            return True
        world.happens(decision, handle.place)
        match decision.fault:
            case Fault.STOPPED:
                self._restart_s = decision.value
                self._stop.cancel()
            case Fault.KILLED:
                self.die(decision.value)
                return False
            case Fault.FROZEN:
                self._suffers(decision)
                self.frozen = [handle]
                world.after(decision.value, self._thaw)
                return False
            case _:
                world.loop.overtake(handle, int(decision.value))
                return False
        return True

    @contextmanager
    def draining(self, bus: Bus, grace_s: float) -> Iterator[None]:
        """A drain with nothing in its way has a clean receipt, unless a handler takes longer than the grace time."""
        began, troubles = self._world.loop.time(), self._troubles
        try:
            yield
        finally:  # a bus that is told to end goes on with being cancelled
            is_judged = not self.is_dead and self._troubles == troubles and self._troubled_until <= began
            if is_judged and bus.receipt is not None and not bus.receipt.cancelled:
                self._judge(bus.receipt, grace_s)

    def die(self, restart_in_s: float) -> None:
        if self.is_dead:
            return
        self.end()
        self._process.restart(restart_in_s)

    def end(self) -> None:
        """The connections end, and the servers see to what was open."""
        self.is_dead = True
        self._count_steps()
        for subscription in list(self.subscriptions):
            subscription.lose()
        for transaction in list(self.transactions):
            transaction.lose()

    def later(self, delay_s: float, call: Callable[[], Awaitable[object]]) -> None:
        self._world.serve(delay_s, call)

    def _thaw(self) -> None:
        handles, self.frozen = self.frozen, None
        if not self.is_dead and handles:
            self._world.loop.resume(handles)

    def _suffers(self, decision: Decision) -> None:
        lasts_s = 0.0
        if decision.fault in _LASTING:
            lasts_s = decision.value
        elif decision.fault is Fault.DISCONNECTED:  # what it had settled may be lost, and is owed until its next session ends
            lasts_s = math.inf
        self._troubles += 1
        self._troubled_until = max(self._troubled_until, self._world.loop.time() + lasts_s)

    def _judge(self, receipt: DrainReceipt, grace_s: float) -> None:
        if not receipt.clean:
            self._world.unclean(self._process, f"was not clean after {receipt.seconds:g} s, though nothing was in its way")
        elif receipt.seconds >= grace_s and not receipt.finished:
            self._world.unclean(self._process, f"took its grace time of {grace_s:g} s, though nothing ran")

    def _expect(self) -> None:
        self._steps_given = self.steps_left = self._world.chooser.steps(self._process.name, self._process.steps)

    def _count_steps(self) -> None:
        self._process.steps += self._steps_given - self.steps_left
        self._steps_given = self.steps_left


class _SimBus(Bus):
    """A bus with the handlers of another, on servers of the simulator."""

    def __init__(self, life: Life, process: Process, url: str) -> None:
        original = process.bus
        given: dict[str, Any] = (
            {}
            if original._given is None
            else {name: getattr(original._given, name) for name in original._given.__dict__["_given"]}
        )
        given |= {"broker_url": url, "database_url": url, "redis_url": None}
        super().__init__(original.group, settings=Settings(**given), format=original._format, clock=process.world.now)
        self._handlers = original._handlers
        self._periodics = original._periodics
        self._resources = original._resources
        self._middleware = original._middleware
        self._process = process
        self._life = life

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._engine is not None
        with self._life.draining(self, self._engine._settings.grace_s):
            await super().__aexit__(kind, error, trace)

    def plans(self) -> Any:
        return self._process.plans

    async def publish_many(self, events: Any) -> list[UUID]:
        token = DIRECT.set(True)
        try:
            return await super().publish_many(events)
        finally:
            DIRECT.reset(token)


def _is_away(error: BaseException) -> bool:
    """Whether a program ends with this for no other reason than that a server was away."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_away, error.exceptions))
    return isinstance(error, UnavailableError)
