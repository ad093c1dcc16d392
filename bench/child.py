"""The measured process's side: it prepares, says that it is ready, waits for the word, works, and reports.

A peer's module ends with `main({"consume": consume, ...})`. Each function takes the job and a gate; an async one runs under
uvloop, the fastest loop that there is for every asyncio client.
"""

from __future__ import annotations

import asyncio
import inspect
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from bench.job import Job

LATENCIES_KEPT = 100_000


class Report(msgspec.Struct):
    """What a measured process tells of itself. `lost` and `doubled` are those it can see; the workload counts the rest."""

    seconds: float
    count: int
    lost: int = 0
    doubled: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    more: dict[str, float] = {}


class Gate:
    """Between the preparation and the work stands `go()`; at the end stands `done()`."""

    def __init__(self) -> None:
        self.began = 0.0

    def go(self) -> float:
        """Say that all is prepared, and wait for the word; the time at which it came."""
        print('{"ready":true}', flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the bench went away")
        self.began = time.perf_counter()
        return self.began

    def done(self, report: Report) -> None:
        """Report, and stay until the parent has looked at the process."""
        print(msgspec.json.encode(report).decode(), flush=True)
        sys.stdin.readline()


class Tally:
    """Counts each message by its number; `all_seen` is called when the last missing one arrives."""

    def __init__(self, count: int, all_seen: Callable[[], object]) -> None:
        self.seen = bytearray(count)
        self.ended = 0.0
        self._left = count
        self._all_seen = all_seen

    def saw(self, number: int) -> None:
        self.seen[number] += 1
        if self.seen[number] == 1:
            self._left -= 1
            if not self._left:
                self.ended = time.perf_counter()
                self._all_seen()

    def report(self, gate: Gate) -> Report:
        return Report(
            seconds=self.ended - gate.began,
            count=len(self.seen),
            lost=self.seen.count(0),
            doubled=sum(self.seen) - (len(self.seen) - self.seen.count(0)),
        )


def percentiles(latencies_s: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in milliseconds."""
    if len(latencies_s) < 2:
        only = latencies_s[0] * 1000 if latencies_s else 0.0
        return only, only
    cuts = statistics.quantiles(latencies_s, n=100, method="inclusive")
    return round(cuts[49] * 1000, 3), round(cuts[98] * 1000, 3)


Work = Callable[[Job, Gate], Any] | Callable[[Job, Gate], Awaitable[Any]]


def main(workloads: Mapping[str, Work], run: Callable[[Awaitable[Any]], Any] | None = None) -> None:
    """Take the job from the command line and do it. `run` replaces uvloop's for an async function."""
    job = msgspec.json.decode(sys.argv[1], type=Job)
    gate = Gate()
    outcome = workloads[job.workload](job, gate)
    if inspect.isawaitable(outcome):
        (run or _uvloop)(outcome)


def _uvloop(work: Awaitable[Any]) -> Any:
    import uvloop

    async def whole() -> Any:
        return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())
