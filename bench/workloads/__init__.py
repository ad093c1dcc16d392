"""What is measured. A workload names its peers and variants, prepares the ground for each job, and counts at the end what was lost."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import msgspec

from bench.child import Report
from bench.ground import Ground
from bench.job import Job
from bench.results import Round


class Variant(msgspec.Struct, frozen=True):
    """One way in which a workload is run; `count` messages a round, of `body_bytes` each."""

    name: str
    count: int
    body_bytes: int = 250
    options: dict[str, Any] = {}
    peers: tuple[str, ...] | None = None
    """Those of the workload's peers that can be run this way; None is all."""


class Count(msgspec.Struct, frozen=True):
    """What the servers say at the end: `left` are messages that were not acknowledged."""

    lost: int = 0
    doubled: int = 0
    left: int = 0


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`shares` lets a slow peer do that part of the messages, so that its rounds take seconds too.

    `measure` runs a round of one peer where that is more than one process which prepares, waits for the word, and works: it gets the
    variant, the peer, the scale of the run and somebody to tell of its progress, and needs no `prepare`, `verify` and `servers`.
    """

    name: str
    what: str
    peers: tuple[str, ...]
    variants: tuple[Variant, ...]
    servers: frozenset[str] = frozenset({"RabbitMQ"})
    unit: str = "message"
    shares: dict[str, float] = {}
    rounds: int = 5
    prepare: Callable[[Ground, Job], None] = lambda ground, job: None
    verify: Callable[[Ground, Job, Report], Count] = lambda ground, job, report: Count(report.lost, report.doubled)
    measure: Callable[[Variant, str, float, Callable[[str], None]], Round] | None = None


NAMES = (
    "publish",
    "consume",
    "effect",
    "outbox",
    "relay",
    "latency",
    "retry",
    "ordered",
    "trio",
    "telemetry",
    "backlog",
    "pipeline",
)
"""In the order of the tables; each is a module of this package."""


def workloads() -> dict[str, Workload]:
    """All of them, by name."""
    return {name: importlib.import_module(f"bench.workloads.{name}").WORKLOAD for name in NAMES}
