"""What happens to whom, and when: the decisions of a run, drawn by a seed or given as a list."""

from __future__ import annotations

import enum
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from orderbus.errors import UsageError

__all__ = ["NEVER", "Calls", "Chooser", "Decision", "Drawn", "Fault", "Given", "parse", "text"]


class Fault(enum.Enum):
    """What can happen to a call to a server, or to a process at one of its steps."""

    LATE = "late"
    """The request arrives so many seconds later."""
    ANSWER_LATE = "answer-late"
    """It is done at once, and its answer arrives so many seconds later."""
    UNAVAILABLE = "unavailable"
    """The request never arrives, and the caller is told that the server is away."""
    ANSWER_LOST = "answer-lost"
    """It is done, but the caller is told that the server went away."""
    TRANSIENT = "transient"
    """The database asks to run the transaction again."""
    CUT = "cut"
    """The connection ends after so many messages of a batch; no receipt arrives."""
    REFUSED = "refused"
    """The broker says no to message number so many of a batch."""
    DUPLICATED = "duplicated"
    """Everything is published twice."""
    DISCONNECTED = "disconnected"
    """The connection ends: subscriptions are over, what they held unsettled is given to others."""
    KILLED = "killed"
    """The process dies before the request is sent, or at this step; another is started so many seconds later."""
    KILLED_AFTER = "killed-after"
    """The process dies after the request was done, before its answer; another is started so many seconds later."""
    KILLED_IN_FLIGHT = "killed-in-flight"
    """The process dies, and the request is done so many seconds after; another process is started at once."""
    STOPPED = "stopped"
    """The process is told to end, drains (or dies, if it was not open yet), and another is started so many seconds later."""
    FROZEN = "frozen"
    """The process stands still for so many seconds, as under SIGSTOP."""
    OVERTAKEN = "overtaken"
    """So many other steps that are ready come first."""


class Decision(msgspec.Struct, frozen=True):
    """A fault of the nth call of an operation by a process (from 1), or of its nth step."""

    process: str
    operation: str
    n: int
    fault: Fault
    value: float = 0.0

    def __str__(self) -> str:
        value = f"={self.value:g}" if self.value else ""
        return f"{self.process}/{self.operation}/{self.n}:{self.fault.value}{value}"


STEP = "step"
_SERVER = (Fault.LATE, Fault.ANSWER_LATE, Fault.UNAVAILABLE, Fault.ANSWER_LOST, Fault.KILLED, Fault.KILLED_AFTER)
_WRITES = (*_SERVER, Fault.KILLED_IN_FLIGHT)
_BROKER = (*_SERVER, Fault.DISCONNECTED)
FAULTS: dict[str, tuple[Fault, ...]] = {
    "publish": (*_WRITES, Fault.CUT, Fault.CUT, Fault.REFUSED, Fault.DUPLICATED, Fault.DISCONNECTED),
    "apply": _BROKER,
    "subscribe": _BROKER,
    "receive": (Fault.LATE, Fault.ANSWER_LATE, Fault.KILLED_AFTER, Fault.DISCONNECTED),
    "settle": (Fault.LATE, Fault.LATE, Fault.KILLED, Fault.DISCONNECTED),
    "flush": (Fault.LATE, Fault.ANSWER_LATE, Fault.KILLED, Fault.DISCONNECTED),
    "pause": (Fault.LATE, Fault.ANSWER_LATE, Fault.KILLED, Fault.DISCONNECTED),
    "depth": _BROKER,
    "begin": (*_SERVER, Fault.TRANSIENT),
    "execute": (Fault.LATE, Fault.ANSWER_LATE, Fault.UNAVAILABLE, Fault.TRANSIENT, Fault.KILLED),
    "commit": (*_WRITES, Fault.TRANSIENT),
    "rollback": (Fault.LATE, Fault.ANSWER_LATE, Fault.KILLED),
    "lease": _SERVER,
    "read": _SERVER,
    "delete": _WRITES,
    "set-aside": _WRITES,
    "due": _SERVER,
    "backlog": _SERVER,
    "maintain": _SERVER,
    "claim": _WRITES,
    "complete": _WRITES,
    "release": _WRITES,
    STEP: (Fault.KILLED, Fault.STOPPED, Fault.FROZEN, Fault.OVERTAKEN, Fault.OVERTAKEN),
}
"""What can happen to which operation."""
_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 8.0)
_COUNTS = {Fault.CUT: (0, 1, 2), Fault.REFUSED: (0, 1), Fault.OVERTAKEN: (1, 2, 3, 5, 8)}
_UNVALUED = frozenset(
    {Fault.UNAVAILABLE, Fault.ANSWER_LOST, Fault.TRANSIENT, Fault.DUPLICATED, Fault.DISCONNECTED},
)
MOST_FAULTS = 12
NEVER = 1 << 60
"""More steps than any run has."""


class Chooser(Protocol):
    """Decides what happens."""

    taken: list[Decision]
    """The decisions so far that were not to let things go on as they should."""

    def at(self, process: str, operation: str, n: int) -> Decision | None:
        """What happens to the nth call of an operation by a process."""

    def steps(self, process: str, taken: int) -> int:
        """How many more steps a process takes, after those it has taken, before something happens to it."""

    def at_step(self, process: str, n: int) -> Decision | None:
        """What that is."""


class Drawn:
    """Decisions drawn by a seed: how often something happens differs from seed to seed, too."""

    def __init__(self, seed: int, most_faults: int = MOST_FAULTS) -> None:
        self._rng = random.Random(f"decisions {seed}")
        self._left = self._rng.randint(0, most_faults)
        self._per_call = self._rng.choice((0.3, 0.1, 0.05, 0.02))
        self._per_step = self._rng.choice((0.0, 0.02, 0.005, 0.002))
        self._calls_left = self._gap(self._per_call)
        self.taken: list[Decision] = []

    def at(self, process: str, operation: str, n: int) -> Decision | None:
        self._calls_left -= 1
        if self._calls_left >= 0 or not self._left:
            return None
        self._calls_left = self._gap(self._per_call)
        return self._take(process, operation, n)

    def steps(self, process: str, taken: int) -> int:
        return self._gap(self._per_step) if self._left else NEVER

    def at_step(self, process: str, n: int) -> Decision | None:
        return self._take(process, STEP, n) if self._left else None

    def _take(self, process: str, operation: str, n: int) -> Decision:
        self._left -= 1
        fault = self._rng.choice(FAULTS[operation])
        decision = Decision(process, operation, n, fault, self._value(fault))
        self.taken.append(decision)
        return decision

    def _value(self, fault: Fault) -> float:
        if fault in _UNVALUED:
            return 0.0
        if fault in _COUNTS:
            return float(self._rng.choice(_COUNTS[fault]))
        return float(f"{self._rng.choice(_SECONDS) * self._rng.uniform(0.5, 1.5):.3g}")  # as it can be written and read again

    def _gap(self, rate: float) -> int:
        """How many good ones come before a bad one, where one of `1 / rate` is bad."""
        return NEVER if not rate else math.floor(math.log(1.0 - self._rng.random()) / math.log(1.0 - rate))


class Given:
    """Decisions as they are given; whatever they don't name goes on as it should."""

    def __init__(self, decisions: Iterable[Decision]) -> None:
        self._decisions: dict[tuple[str, str, int], Decision] = {}
        self._steps: dict[str, list[int]] = {}
        for decision in decisions:
            self._decisions[decision.process, decision.operation, decision.n] = decision
            if decision.operation == STEP:
                self._steps.setdefault(decision.process, []).append(decision.n)
        self.taken: list[Decision] = []

    def at(self, process: str, operation: str, n: int) -> Decision | None:
        decision = self._decisions.get((process, operation, n))
        if decision is not None:
            self.taken.append(decision)
        return decision

    def steps(self, process: str, taken: int) -> int:
        return min((n - taken - 1 for n in self._steps.get(process, ()) if n > taken), default=NEVER)

    def at_step(self, process: str, n: int) -> Decision | None:
        return self.at(process, STEP, n)


class Calls:
    """Counts the calls of a process, over all of its lives."""

    def __init__(self) -> None:
        self._counted: Counter[str] = Counter()

    def next(self, operation: str) -> int:
        self._counted[operation] += 1
        return self._counted[operation]


_WORD = re.compile(r"(?P<process>[^/\s]+)/(?P<operation>[a-z-]+)/(?P<n>\d+):(?P<fault>[a-z-]+)(?:=(?P<value>[\d.e+-]+))?")


def text(seed: int, decisions: Sequence[Decision]) -> str:
    """A schedule as one line, which `parse` reads; `-` says that nothing happens."""
    return " ".join([str(seed), *(map(str, decisions) if decisions else "-")])


def parse(schedule: str) -> tuple[int, list[Decision] | None]:
    """The seed and the decisions of a schedule; None for a seed alone, which draws its own. Raises UsageError for another text."""
    seed, *words = schedule.split() or [""]
    if not seed.lstrip("-").isdigit():
        raise UsageError(f"a schedule begins with its seed, a whole number, not with {seed!r}", code="OB902")
    if not words:
        return int(seed), None
    decisions = []
    for word in words if words != ["-"] else ():
        match = _WORD.fullmatch(word)
        try:
            if match is None:
                raise ValueError(word)
            fault = Fault(match["fault"])
        except ValueError:
            raise UsageError(
                f"{word!r} is no decision of a schedule: process/operation/n:fault or process/operation/n:fault=value",
                code="OB902",
            ) from None
        decisions.append(Decision(match["process"], match["operation"], int(match["n"]), fault, float(match["value"] or 0)))
    return int(seed), decisions
