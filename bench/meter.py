"""CPU and memory of processes, seen from outside and so in the same way for everyone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

SERVERS = ("beam.smp", "postgres", "redis-server")
IDLE, LOOK_S, SETTLE_S = 0.05, 0.5, 90.0
"""The servers are idle when they use less than IDLE of a core for LOOK_S. After SETTLE_S they are not waited for any more."""


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def servers() -> list[psutil.Process]:
    """RabbitMQ, PostgreSQL and Redis on this machine: whatever they do in a round is counted to it."""
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] in SERVERS]


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """What they have used, and what their ended children had used."""
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.Error:
            continue  # it has ended, and its parent counts it
    return total


def settle(processes: Sequence[psutil.Process], limit_s: float = SETTLE_S) -> bool:
    """Wait until servers are idle; False where they still are not after `limit_s`.

    What fills a queue or a table leaves work behind that it does not wait for: RabbitMQ writes its log's entries to segment files,
    PostgreSQL cleans up. It is not a cost of what is measured next.
    """
    deadline = time.monotonic() + limit_s
    used = cpu_s(processes)
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        before, used = used, cpu_s(processes)
        if used - before < IDLE * LOOK_S:
            return True
    return False


def peak_rss_mib(processes: Iterable[psutil.Process]) -> float:
    """The sum of each one's peak."""
    total = 0
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return total / 1024
