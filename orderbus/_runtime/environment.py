"""What the consumers of a bus have in common."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from orderbus._core.delivery import Delivery
from orderbus._core.topology import Topology
from orderbus._runtime.stats import Stats
from orderbus._runtime.tracing import Tracing
from orderbus.abc import Broker

if TYPE_CHECKING:
    from orderbus._runtime.metrics import Metrics

__all__ = ["Environment", "Middleware"]


class Middleware(Protocol):
    """Around a unit of deliveries: one, or as many as share a transaction. Call `call_next` once; what it raises is the unit's failure."""

    async def __call__(self, deliveries: Sequence[Delivery], call_next: Callable[[], Awaitable[None]]) -> None: ...


class Environment(msgspec.Struct, frozen=True):
    """What a consumer needs from its bus."""

    broker: Broker
    topology: Topology
    clock: Callable[[], float]
    rng: random.Random
    stats: Stats
    window_s: float
    middleware: Sequence[Middleware]
    wake_relay: Callable[[], None]
    tracing: Tracing
    metrics: Metrics
