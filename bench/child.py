"""The measured process's side: it prepares, says that it is ready, waits for the word, works, and reports.

A peer's module ends with `main({"consume": consume, ...})`. Each function takes the job and a gate; an async one runs under
uvloop, the fastest loop that there is for every asyncio client.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import anyio
import msgspec

from bench.job import Job, Sample, samples


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
        gc.collect()
        gc.freeze()
        gc.set_threshold(
            20_000, 20, 20
        )  # for every peer what orderbus advises: the collector in the middle of batches costs a tenth
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


class OrderTally(Tally):
    """Counts also the messages that came after a later one of their key."""

    def __init__(self, count: int, all_seen: Callable[[], object]) -> None:
        super().__init__(count, all_seen)
        self._last: dict[object, int] = {}
        self._disordered = 0

    def saw_of(self, key: object, number: int) -> None:
        if number < self._last.get(key, -1):
            self._disordered += 1
        self._last[key] = number
        self.saw(number)

    def report(self, gate: Gate) -> Report:
        report = super().report(gate)
        report.more = {"disordered": self._disordered}
        return report


class PassingFailure(RuntimeError):
    """What the retry workload's handlers raise."""


class Fault:
    """Fails the first try of every tenth message."""

    def __init__(self, count: int) -> None:
        self._tried = bytearray(count)

    def strike(self, number: int) -> None:
        """Raises PassingFailure, once for each of those numbers."""
        if number % 10 == 9 and not self._tried[number]:
            self._tried[number] = 1
            raise PassingFailure(number)


class Metronome:
    """Sends one message at a time: the next when the one before it is handled and the job's `gap_ms` have passed.

    A latency is from before `send` is called until the handler begins, which calls `handled`. The first messages are not measured:
    they open channels and fill caches. The rate that is reported is one over the mean latency, whatever the gap.
    """

    WARM_UP = 20

    def __init__(self, job: Job) -> None:
        self._job = job
        self._gap_s = job.options.get("gap_ms", 0) / 1000
        self._seen = bytearray(job.count)
        self._handled = anyio.Event()
        self._at = 0.0

    def handled(self, number: int) -> None:
        self._at = time.perf_counter()
        self._seen[number] += 1
        self._handled.set()

    async def run(self, gate: Gate, send: Callable[[Sample], Awaitable[object]]) -> Report:
        latencies: list[float] = []
        for sample in samples(self._job):
            if sample.number == min(self.WARM_UP, self._job.count // 2):
                gate.go()
                latencies.clear()
            self._handled = anyio.Event()
            began = time.perf_counter()
            await send(sample)
            await self._handled.wait()
            latencies.append(self._at - began)
            if self._gap_s:
                await anyio.sleep(self._gap_s)
        p50, p99 = percentiles(latencies)
        return Report(sum(latencies), len(latencies), doubled=sum(self._seen) - len(self._seen), p50_ms=p50, p99_ms=p99)


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
        (run or run_with_uvloop)(outcome)


def run_with_uvloop(work: Awaitable[Any]) -> Any:
    """As every peer runs that is free to choose."""
    import uvloop

    async def whole() -> Any:
        return await work

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(whole())
