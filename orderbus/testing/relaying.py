"""The one relay of a TestBus: it sleeps until there is something to do, so that hours without events cost nothing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio

from orderbus import Settings, Stats
from orderbus._runtime.relay import Relay
from orderbus.testing.servers import Servers, WatchedStore

__all__ = ["relaying"]

LEAST_S = 0.05


@asynccontextmanager
async def relaying(servers: Servers, settings: Settings, now_s: Callable[[], float]) -> AsyncIterator[None]:
    """Relay the outbox while the body runs. What the body raises goes on as it is, and not in a group."""
    relay = _TestRelay(servers, settings, now_s)
    servers.record.on_commit = relay.wake
    failure: BaseException | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(relay.run, name="relay of the TestBus")
        try:
            yield
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            failure = error
        finally:
            relay.stop()
    if failure is not None:
        raise failure


class _TestRelay(Relay):
    def __init__(self, servers: Servers, settings: Settings, now_s: Callable[[], float]) -> None:
        super().__init__(servers.store.outbox, servers.broker, settings, Stats(), "testbus", random.Random())
        self._servers = servers
        self._now_s = now_s

    async def _delete(self, rows: object) -> None:
        await super()._delete(rows)  # type: ignore[arg-type]
        self._servers.record.wake()

    async def _sleep(self, seconds: float) -> None:
        rows = self._servers.rows
        if not isinstance(rows, WatchedStore):
            await super()._sleep(seconds)
            return
        # Its lease may run out meanwhile: nobody else wants it, and it renews it before it publishes again.
        with anyio.move_on_after(max(self._due_in_s(rows), LEAST_S)):
            await self._wake.wait()

    def _due_in_s(self, rows: WatchedStore) -> float:
        times = [(row.due_at_ms or 0) / 1000 - self._now_s() for row in rows.outbox.scheduled()]
        times += [one.retry_in_s for one in rows.outbox.stuck() if one.retry_in_s is not None]
        return min(times, default=float("inf"))
