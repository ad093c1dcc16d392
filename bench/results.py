"""What a run found: an object for each workload, variant and peer, kept as JSON lines; tables and plots are made from these only."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

OURS = "orderbus"
"""The peer that the others are compared with."""
SUMMED = frozenset({"disordered"})
"""Of what a peer tells besides: counts of what must not happen. They are summed over the rounds; of all else, the median is kept."""


class Round(msgspec.Struct, frozen=True):
    """One process, measured."""

    seconds: float
    count: int
    messages_per_s: float
    client_cpu_us: float
    server_cpu_us: float
    peak_rss_mib: float
    p50_ms: float | None
    p99_ms: float | None
    lost: int
    doubled: int
    left: int
    more: dict[str, float] = {}
    settled: bool = True
    """False where the servers were still busy with something else when it began."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The medians over the rounds of one peer in one workload and variant. CPU is in microseconds a message; `lost`, `doubled` and
    `left` (not acknowledged) are sums; `per_round` are the rates in the order of the rounds, for ratios between peers."""

    workload: str
    variant: str
    peer: str
    unit: str
    rounds: int
    count: int
    messages_per_s: float
    messages_per_s_min: float
    messages_per_s_max: float
    client_cpu_us: float
    server_cpu_us: float
    p50_ms: float | None
    p99_ms: float | None
    peak_rss_mib: float
    lost: int
    doubled: int
    left: int
    per_round: list[float]
    more: dict[str, float] = {}
    versions: dict[str, str] = {}
    machine: str = ""

    @property
    def wrong(self) -> str:
        """What should not have happened, in words; empty where nothing did."""
        counts = {
            "lost": self.lost,
            "doubled": self.doubled,
            "left": self.left,
            **{name: self.more.get(name, 0) for name in SUMMED},
        }
        return ", ".join(f"{name} {count:g}" for name, count in counts.items() if count)


def summarize(workload: str, variant: str, peer: str, unit: str, rounds: Sequence[Round], versions: dict[str, str]) -> Result:
    rates = [one.messages_per_s for one in rounds]
    more = {
        name: round((sum if name in SUMMED else statistics.median)(one.more[name] for one in rounds), 3)
        for name in rounds[0].more
    }
    if busy := sum(not one.settled for one in rounds):
        more["rounds_on_busy_servers"] = busy
    return Result(
        workload=workload,
        variant=variant,
        peer=peer,
        unit=unit,
        rounds=len(rounds),
        count=rounds[0].count,
        messages_per_s=round(statistics.median(rates), 1),
        messages_per_s_min=round(min(rates), 1),
        messages_per_s_max=round(max(rates), 1),
        client_cpu_us=round(statistics.median(one.client_cpu_us for one in rounds), 2),
        server_cpu_us=round(statistics.median(one.server_cpu_us for one in rounds), 2),
        p50_ms=_median([one.p50_ms for one in rounds]),
        p99_ms=_median([one.p99_ms for one in rounds]),
        peak_rss_mib=round(statistics.median(one.peak_rss_mib for one in rounds), 1),
        lost=sum(one.lost for one in rounds),
        doubled=sum(one.doubled for one in rounds),
        left=sum(one.left for one in rounds),
        per_round=[round(rate, 1) for rate in rates],
        more=more,
        versions=versions,
        machine=machine(),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 2) if known else None


def tables_of(results: Iterable[Result]) -> dict[tuple[str, str], list[Result]]:
    """What belongs together, however it came into the file: the results of each workload and variant."""
    found: dict[tuple[str, str], list[Result]] = {}
    for one in results:
        found.setdefault((one.workload, one.variant), []).append(one)
    return found


def ratio(ours: Result, other: Result) -> float:
    """How many times the other's rate ours is: the median over the rounds, each compared with its neighbour in time."""
    return statistics.median(mine / theirs for mine, theirs in zip(ours.per_round, other.per_round, strict=False))


def machine() -> str:
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}, CPython {platform.python_version()}"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions; raises PackageNotFoundError for what is missing."""
    return {name: metadata.version(name) for name in packages}


def write(path: Path, results: Iterable[Result]) -> None:
    """Add to the file: a workload, variant and peer that was there is replaced."""
    kept = {(one.workload, one.variant, one.peer): one for one in (read(path) if path.exists() else ())}
    for one in results:
        kept[one.workload, one.variant, one.peer] = one
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in kept.values()))


def read(path: Path) -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines() if line.strip()]
