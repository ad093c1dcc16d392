"""Faults by name: what happens to the next call that a bus under test makes to one of its servers."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, get_args

from orderbus import InvariantError, UsageError
from orderbus.testing.sim.decisions import Decision, Fault
from orderbus.testing.sim.faulty import FaultySubscription, FaultyTransaction

__all__ = ["FaultName", "Faults"]

FaultName = Literal[
    "connection lost after the commit, before the ack",
    "answer to the commit lost",
    "database away at the commit",
    "deadlock at the commit",
    "confirm of a publish lost",
    "publish refused by the broker",
    "message published twice",
    "claims keeper away",
]
"""docs/testing.md says of each what happens, and what must be so afterwards."""

_WHAT: Mapping[str, tuple[str, Fault]] = {
    "connection lost after the commit, before the ack": ("settle", Fault.DISCONNECTED),
    "answer to the commit lost": ("commit", Fault.ANSWER_LOST),
    "database away at the commit": ("commit", Fault.UNAVAILABLE),
    "deadlock at the commit": ("commit", Fault.TRANSIENT),
    "confirm of a publish lost": ("publish", Fault.ANSWER_LOST),
    "publish refused by the broker": ("publish", Fault.REFUSED),
    "message published twice": ("publish", Fault.DUPLICATED),
    "claims keeper away": ("claim", Fault.UNAVAILABLE),
}
"""The operation of the servers, and the simulator's word for what happens to it."""
_OF_THE_DATABASE = frozenset({"commit"})


class Faults:
    """What is to happen. The simulator's faulty servers ask it at each call, as they ask a process of theirs."""

    def __init__(self, *, has_database: bool) -> None:
        self._has_database = has_database
        self._left: dict[FaultName, int] = {}
        self.subscriptions: dict[FaultySubscription, None] = {}
        self.transactions: dict[FaultyTransaction, None] = {}

    def arm(self, name: FaultName, times: int) -> None:
        """Raises UsageError for a name that there is not, and for a fault of a database that is a real one."""
        if name not in _WHAT:
            near = difflib.get_close_matches(str(name), get_args(FaultName), n=1, cutoff=0.4)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(repr, get_args(FaultName)))}"
            raise UsageError(f"there is no fault {name!r}; {advice}", code="OB909")
        if not isinstance(times, int) or times < 1:
            raise UsageError(f"times={times!r}: a fault happens at least once", code="OB909")
        if self._has_database and _WHAT[name][0] in _OF_THE_DATABASE:
            text = f"{name!r} happens to the store in memory, not to a real database; leave database_url= out"
            raise UsageError(text, code="OB909")
        self._left[name] = self._left.get(name, 0) + times

    def unmet(self) -> list[str]:
        """Those that were asked for and did not happen."""
        return [name for name, left in self._left.items() if left]

    # What the faulty servers ask

    def at(self, operation: str) -> Decision | None:
        for name, left in self._left.items():
            if left and _WHAT[name][0] == operation:
                self._left[name] = left - 1
                return Decision("testbus", operation, 1, _WHAT[name][1])
        return None

    def die(self, restart_in_s: float) -> None:
        raise InvariantError("no fault of a TestBus kills a process; the simulator's do")

    def later(self, delay_s: float, call: Callable[[], Awaitable[object]]) -> None:
        raise InvariantError("no fault of a TestBus comes later; the simulator's do")
