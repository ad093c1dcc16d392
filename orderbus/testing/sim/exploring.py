"""Run after run: until a promise is broken, and then the shortest schedule that breaks it."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgspec

from orderbus.testing.sim.decisions import Chooser, Decision, Drawn, Given, parse, text
from orderbus.testing.sim.determinism import determined
from orderbus.testing.sim.world import World

__all__ = ["Explored", "Run", "Scenario", "ViolationError", "explore", "replay"]

Scenario = Callable[[World], object]
MOST_SHRINKING_RUNS = 400
COLLECT_EVERY = 10


class Run(msgspec.Struct, frozen=True):
    """What became of one schedule."""

    seed: int
    broken: Sequence[str]
    """The promises and invariants that it broke, in words; none of a good one."""
    decisions: Sequence[Decision]
    """What happened to the processes, in its order."""
    trace: Sequence[tuple[float, str, str, int, str]]
    """Every call to a server: time (s), process, operation, its number, what happened to it. Equal for equal schedules."""

    @property
    def schedule(self) -> str:
        """The text from which `replay` runs it again."""
        return text(self.seed, self.decisions)


class Explored(msgspec.Struct, frozen=True):
    """What was explored without finding anything."""

    schedules: int
    decisions: int
    """How many things happened to the processes in all of them."""
    calls: int
    """How many calls the processes made to their servers."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.schedules} schedules with {self.decisions} faults among {self.calls} calls in {self.seconds:.1f} s "
            f"({self.schedules / self.seconds:.0f} a second): no promise broken"
        )


class ViolationError(AssertionError):
    """A schedule broke a promise or an invariant. Its text is the shortest such schedule that was found, and how to replay it."""

    def __init__(self, scenario: Scenario, found: Run, shortest: Run) -> None:
        self.found = found
        self.shortest = shortest
        super().__init__(_report(scenario, found, shortest))


def explore(scenario: Scenario, schedules: int = 1_000, *, first_seed: int = 0) -> Explored:
    """Run a scenario under so many schedules, one for each seed from `first_seed` on.

    Raises ViolationError for the first that breaks a promise, after it has looked for a shorter one. `scenario(world)` is called
    anew for each, and must keep nothing from one to the next. Not to be called where an event loop runs.
    """
    began = time.perf_counter()
    decisions = calls = 0
    with _quietly(), _tidily():
        for seed in range(first_seed, first_seed + schedules):
            run = _run(scenario, seed, Drawn(seed))
            if run.broken:
                raise ViolationError(scenario, run, _shortest(scenario, run))
            decisions += len(run.decisions)
            calls += len(run.trace)
            if seed % COLLECT_EVERY == 0:
                gc.collect()
    return Explored(schedules, decisions, calls, time.perf_counter() - began)


def replay(scenario: Scenario, schedule: str) -> Run:
    """Run one schedule again, from the text in which it was reported, or from a seed alone. Raises UsageError for another text.

    The logs of the library and of the program are written as they are otherwise, so that one sees what it did.
    """
    seed, decisions = parse(schedule)
    with _tidily():
        return _run(scenario, seed, Drawn(seed) if decisions is None else Given(decisions))


def _run(scenario: Scenario, seed: int, chooser: Chooser) -> Run:
    world = World(chooser)
    with determined(seed, world.loop.time):
        broken = world.run(scenario)
    return Run(seed, broken, chooser.taken, world.trace)


def _shortest(scenario: Scenario, found: Run) -> Run:
    """Leave out decisions as long as what is left breaks a promise of the same kind: halves first, then ever smaller parts."""
    kinds = _kinds(found)
    best = found
    left = MOST_SHRINKING_RUNS
    size = max(len(best.decisions) // 2, 1)
    while left:
        at, shrunk = 0, False
        while at < len(best.decisions) and left:
            left -= 1
            kept = [*best.decisions[:at], *best.decisions[at + size :]]
            run = _run(scenario, found.seed, Given(kept))
            if run.broken and _kinds(run) & kinds:
                best, shrunk = run, True
            else:
                at += size
        if size == 1 and not shrunk:
            break
        size = max(size // 2, 1)
    return best


def _kinds(run: Run) -> set[str]:
    return {broken.partition(":")[0] for broken in run.broken}


def _report(scenario: Scenario, found: Run, shortest: Run) -> str:
    name = getattr(scenario, "__name__", "scenario")
    count = len(shortest.decisions)
    if count == len(found.decisions):
        how = f"seed {found.seed} shows it, with {count} faults"
    else:
        how = f"seed {found.seed} found it with {len(found.decisions)} faults; {count} of them are enough"
    happened = [line for line in shortest.trace if line[4]]
    return "\n".join(
        [
            "a promise is broken:",
            *(f"  {broken}" for broken in shortest.broken),
            how + (":" if count else ""),
            *(f"  {at:9.3f} s  {process:<16} {operation} {n}: {what}" for at, process, operation, n, what in happened),
            "run it again:",
            f"  replay({name}, {shortest.schedule!r})",
        ]
    )


@contextmanager
def _tidily() -> Iterator[None]:
    """The dead leave coroutines behind that never ran, and cycles; they go before Python's collector gets to see them."""
    collects = gc.isenabled()
    gc.disable()
    gc.freeze()  # so that collecting costs no more than what a run has left behind
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        finally:
            gc.collect()
            gc.unfreeze()
            if collects:
                gc.enable()


@contextmanager
def _quietly() -> Iterator[None]:
    """Faults by the thousand are what is wanted here: nobody reads what the library has to say about each."""
    logger = logging.getLogger("orderbus")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
