"""The engine of a bus under test: on the test's servers, and every try of a handler written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from orderbus import Settings
from orderbus._runtime.engine import Engine
from orderbus._runtime.servers import Servers as BusServers
from orderbus._runtime.tracing import Tracing
from orderbus.testing.record import HANDLING, Record, Try

if TYPE_CHECKING:
    from orderbus._core.work import Work
    from orderbus.testing.servers import Servers

__all__ = ["WatchedEngine"]


class WatchedEngine(Engine):
    def __init__(self, servers: Servers, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.servers = _Lent(self.group, self._settings, self._clock, servers)
        self.tracing = _Watching(self.group, servers.record)


class _Lent(BusServers):
    """Those of the test, which closes them."""

    def __init__(self, group: str, settings: Settings, clock: Callable[[], float], servers: Servers) -> None:
        super().__init__(group, settings, clock)
        self._broker = servers.broker
        self._store = servers.store
        self._claims = servers.claims.prefixed(settings.redis_prefix)

    async def open(self, stack: AsyncExitStack) -> None:
        await self.store.check()


class _Watching(Tracing):
    """Tracing is told of each try when it begins and when it has been decided what follows: so it makes its spans, and we our record."""

    def __init__(self, group: str, record: Record) -> None:
        super().__init__(group, system="memory", database="memory")
        self._record = record
        self._attempts: dict[int, int] = {}
        """Of the works that are being tried."""

    def begin(self, works: Sequence[Work]) -> None:
        super().begin(works)
        HANDLING.set(works[0].route.handler.consumer)
        for work in works:
            self._attempts[id(work)] = work.attempt
            self._record.applied.discard((work.route.handler.consumer, work.id))

    def end(self, works: Sequence[Work], error: BaseException | None = None) -> None:
        super().end(works, error)
        HANDLING.set(None)
        for work in works:
            attempt = self._attempts.pop(id(work), None)
            # A unit that failed together has no outcome: each of its members is tried again at once, alone.
            if attempt is None or not work.outcome:
                continue
            failure = work.error if work.outcome in ("retried", "parked", "waits") else None
            outcome: Any = work.outcome
            self._record.attempted(
                Try(work.route.handler.consumer, work.event, work.id, attempt, outcome, failure, self._record.elapsed_s)
            )
