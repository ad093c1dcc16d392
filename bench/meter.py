"""CPU and memory of processes, seen from outside and so in the same way for everyone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil

SERVERS = ("beam.smp", "postgres", "redis-server")


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
