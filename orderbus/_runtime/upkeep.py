"""What a bus does at its own times beside its messages: its periodic functions, and the upkeep and measuring of its tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio

from orderbus._core.handler import Periodic, Plan
from orderbus._core.work import check_tx_result
from orderbus._runtime.calling import no_stray_cancellation
from orderbus._runtime.relay import Relay
from orderbus._runtime.stats import Stats
from orderbus._runtime.tracing import Tracing
from orderbus._runtime.tx import Tx
from orderbus.abc import Backlog, Store
from orderbus.errors import UnavailableError, UsageError

log = logging.getLogger("orderbus")

MAINTENANCE_EVERY_S = 3600.0
MEASURE_EVERY_S = 5.0


class Repetition:
    """One function that `@bus.every` has registered."""

    def __init__(
        self,
        periodic: Periodic,
        plan: Plan,
        *,
        transaction: Callable[[], AbstractAsyncContextManager[Tx]],
        resources: Mapping[type, Any],
        tracing: Tracing,
        stats: Stats,
    ) -> None:
        self._periodic = periodic
        self._plan = plan
        self._transaction = transaction
        self._resources = resources
        self._tracing = tracing
        self._stats = stats
        self._stopping = anyio.Event()
        self._working = anyio.CancelScope()
        self.running = 0
        """Rounds under way: one or none."""

    async def run(self) -> None:
        """One round after another, until it is stopped between two of them, or cancelled."""
        with self._working:
            while True:
                with anyio.move_on_after(self._periodic.every_s):
                    await self._stopping.wait()
                if self._stopping.is_set():
                    return
                self.running = 1
                try:
                    await self._round()
                finally:
                    self.running = 0

    def stop(self) -> None:
        """Begin no new round; one that is under way goes on."""
        self._stopping.set()

    def cancel(self) -> None:
        """Cancel the round that is under way; it is rolled back."""
        self._working.cancel()

    async def _round(self) -> None:
        periodic = self._periodic
        try:
            with (
                self._tracing.periodic(periodic.place),
                anyio.fail_after(periodic.timeout_s),
                no_stray_cancellation(periodic.place),
            ):
                await self._once()
        except Exception:  # the next round comes all the same; this one is rolled back
            self._stats.failed += 1
            about = {"orderbus.periodic": getattr(periodic.function, "__qualname__", type(periodic.function).__name__)}
            log.exception("%s failed; again in %g s", periodic.place, periodic.every_s, extra=about)

    async def _once(self) -> None:
        periodic, plan, resources = self._periodic, self._plan, self._resources
        if not plan.needs_tx:
            result = await periodic.function(*(resources[kind] for kind in plan.arguments if isinstance(kind, type)))
            if events := check_tx_result(result, periodic.place):
                async with self._transaction() as tx:
                    for event in events:
                        tx.emit(event)
            return
        async with self._transaction() as tx:
            arguments = [tx if source == "tx" else resources[source] for source in plan.arguments]  # type: ignore[index]
            for event in check_tx_result(await periodic.function(*arguments), periodic.place):
                tx.emit(event)


async def maintain(store: Store, window_s: float) -> None:
    """Partitions of the inbox are made ahead and dropped behind, every hour. Whatever fails in it ends no bus."""
    is_left = False
    while True:
        try:
            await store.maintain(window_s)
        except UnavailableError as error:
            log.warning("the upkeep of inbox and outbox waits for the next hour: %s", error)
        except UsageError as error:  # said once; called all the same, since the store tells who does it what is needed here
            if not is_left:
                log.info("this process leaves the upkeep of inbox and outbox to another: %s", error)
            is_left = True
        except Exception as error:
            log.warning("the upkeep of inbox and outbox waits for the next hour: %s", error, exc_info=True)
        await anyio.sleep(MAINTENANCE_EVERY_S)


async def look_at_the_outbox(relay: Relay, stats: Stats) -> None:
    """For the metrics: what waits in the relay's buckets, every few seconds."""
    while True:
        try:
            stats.outbox = await relay.measure()
        except UnavailableError as error:
            log.debug("the outbox can't be measured: %s", error)
            if (last := stats.outbox) is not None and last.waiting:  # and so they go on waiting
                stats.outbox = Backlog(last.waiting, last.oldest_s + MEASURE_EVERY_S, last.stuck)
        await anyio.sleep(MEASURE_EVERY_S)
