"""One queue's consumer: a session after another, coming back with back-off whenever the broker goes away, until it is drained."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anyio

from orderbus._core.policy import backoff_s
from orderbus._core.topology import QueueNeed, topology_for
from orderbus._core.work import Route
from orderbus._runtime.accounts import Accounts
from orderbus._runtime.environment import Environment
from orderbus._runtime.guard import Guard
from orderbus._runtime.session import Session
from orderbus._runtime.stats import HandlerStats, QueueStats
from orderbus.errors import UnavailableError

log = logging.getLogger("orderbus.consumer")


class Consumer:
    """Consumes one queue until it is drained."""

    def __init__(self, need: QueueNeed, routes: Mapping[str, Route], guards: Mapping[str, Guard], env: Environment) -> None:
        handlers = [route.handler for route in routes.values()]
        self.queue = need.name
        self.ordered = need.ordered
        self.routes = dict(routes)
        self.guards = guards
        self.env = env
        self._topology = topology_for([need])
        """What it declares anew when it comes back: were it that of the whole group, a queue in trouble would keep all others away."""
        self.prefetch = max(handler.prefetch for handler in handlers)
        self.concurrency = max(handler.options.concurrency for handler in handlers)
        self.fuse = min(handler.options.fuse for handler in handlers)
        self.stats = env.stats.queues.setdefault(need.name, QueueStats())
        for handler in handlers:
            env.stats.handlers.setdefault(handler.consumer, HandlerStats())
        self._session: Session | None = None
        self._stopping = anyio.Event()
        self.consuming = anyio.Event()
        """Set once the queue is consumed for the first time, `refused`, or need not be consumed any more."""
        self.refused: UnavailableError | None = None
        """Why it could not be consumed the first time: the start is for the engine to end."""
        self.is_consuming = False
        """Whether it is consumed now, as far as this side can tell."""
        self.accounts = Accounts(need.name, env, self.stats)
        self.finished = 0
        """Deliveries that it is done with: handled, or confirmed to be elsewhere."""
        self.owes = False
        """Whether some settlement may not have reached the broker yet."""

    async def run(self) -> None:
        """Consume until drained, coming back after every loss but that of the start. Raises only what no waiting can mend."""
        failures = 0
        while not self._stopping.is_set():
            session: Session | None = None
            try:
                if failures:
                    await self.env.broker.apply(self._topology)
                async with self.env.broker.subscribe(self.queue, prefetch=self.prefetch) as subscription:
                    session = self._session = Session(self, subscription)
                    if self._stopping.is_set():
                        return
                    self.is_consuming = True
                    self.consuming.set()
                    await session.run()
            except UnavailableError as error:
                if not self.consuming.is_set():
                    self.refused = error
                    self.consuming.set()
                    return
                log.warning("queue %s: %s; coming back", self.queue, error)
            finally:
                self.is_consuming = False
            if session is not None and session.received:
                failures = 0
            if self._stopping.is_set():
                return
            failures += 1
            self.env.stats.reconnects += 1
            self.stats.reconnects += 1
            with anyio.move_on_after(backoff_s(failures, jitter=self.env.rng.random())):
                await self._stopping.wait()

    def stop(self) -> None:
        """Begin the drain: take no new work, give back what has not begun."""
        self._stopping.set()
        self.consuming.set()
        if self._session is not None:
            self._session.stop()

    def cancel(self) -> None:
        """End the grace time: cancel what still runs."""
        if self._session is not None:
            self._session.cancel()

    @property
    def in_hand(self) -> int:
        """Deliveries that are unsettled."""
        return 0 if self._session is None else self._session.in_hand

    @property
    def running(self) -> int:
        return 0 if self._session is None else self._session.running
