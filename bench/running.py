"""Rounds: every peer of a workload in turn, each in a process of its own, again and again."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from bench import meter
from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.peers import PEERS
from bench.results import Result, Round, summarize, versions_of
from bench.workloads import Variant, Workload

PREPARE_S = 300.0
WORK_S = 300.0
ROOT = Path(__file__).resolve().parent.parent


class Failed(RuntimeError):
    """A peer's process ended early or hung; the text has its last words."""


def run(
    workload: Workload, peers: Sequence[str], ground: Ground, *, rounds: int, scale: float, tell: Callable[[str], None]
) -> Iterator[Result]:
    """All variants of a workload, interleaved over the peers. A peer that fails is told of and left out; the others go on."""
    for variant in workload.variants:
        measured: dict[str, list[Round]] = {peer: [] for peer in peers if variant.peers is None or peer in variant.peers}
        for number in range(1, rounds + 1):
            for peer in peers:
                if peer not in measured:
                    continue
                tell(f"{workload.name}, {variant.name}: round {number} of {rounds}, {peer}")
                try:
                    if workload.measure is not None:
                        measured[peer].append(workload.measure(variant, peer, scale, tell))
                    else:
                        measured[peer].append(one_round(workload, variant, peer, ground, scale))
                except (Failed, OSError) as error:  # the other: a server went away while the bench itself spoke to it
                    del measured[peer]
                    tell(f"! {workload.name}, {variant.name}: {peer} is left out: {error}")
        for peer, done in measured.items():
            yield summarize(workload.name, variant.name, peer, workload.unit, done, versions_of(PEERS[peer].packages))


def one_round(workload: Workload, variant: Variant, peer: str, ground: Ground, scale: float) -> Round:
    """Prepare, run one process, look at it and at the servers, and count. Raises Failed."""
    job = Job(
        workload=workload.name,
        variant=variant.name,
        peer=peer,
        topic=ground.topic(),
        count=max(int(variant.count * workload.shares.get(peer, 1.0) * scale), 1),
        body_bytes=variant.body_bytes,
        broker_url=ground.broker_url,
        database_url=ground.database_url,
        redis_url=ground.redis_url,
        options=variant.options,
    )
    workload.prepare(ground, job)
    with tempfile.TemporaryFile() as words, _Child(job, words) as child:
        child.read(PREPARE_S)
        servers, own = meter.servers(), meter.tree(child.pid)
        settled = meter.settle(servers)
        before = meter.cpu_s(servers), meter.cpu_s(own)
        child.go()
        report = msgspec.json.decode(child.read(WORK_S), type=Report)
        own = meter.tree(child.pid)
        after = meter.cpu_s(meter.servers()), meter.cpu_s(own)  # also those that began meanwhile
        peak = meter.peak_rss_mib(own)
        child.go()
    counted = workload.verify(ground, job, report)
    return Round(
        seconds=report.seconds,
        count=report.count,
        messages_per_s=report.count / report.seconds,
        client_cpu_us=(after[1] - before[1]) / report.count * 1e6,
        server_cpu_us=(after[0] - before[0]) / report.count * 1e6,
        peak_rss_mib=peak,
        p50_ms=report.p50_ms,
        p99_ms=report.p99_ms,
        lost=counted.lost,
        doubled=counted.doubled,
        left=counted.left,
        more=report.more,
        settled=settled,
    )


class _Child:
    """A measured process; what it says to stderr is kept for the case that it fails."""

    def __init__(self, job: Job, words: IO[bytes]) -> None:
        self._words = words
        arguments = [sys.executable, "-m", f"bench.peers.{PEERS[job.peer].module}", msgspec.json.encode(job).decode()]
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.pid = self._process.pid

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        if kind is not None:
            process.kill()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()

    def go(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._last_words()) from None

    def read(self, limit_s: float) -> bytes:
        """The next line of JSON; what a library prints besides is passed over."""
        output: Any = self._process.stdout
        deadline = time.monotonic() + limit_s
        while True:
            if not select.select([output], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise Failed(f"nothing came within {limit_s:g} s; {self._last_words()}")
            line: bytes = output.readline()
            if not line:
                self._process.wait(30)
                raise Failed(f"it ended with code {self._process.returncode}; {self._last_words()}")
            if line.startswith(b"{"):
                return line

    def _last_words(self) -> str:
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        return " | ".join(lines[-4:]) if lines else "it said nothing"
