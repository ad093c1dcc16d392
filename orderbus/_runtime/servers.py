"""The servers of an open bus: its broker, its store, its claims, each opened by its URL; under trio, behind a portal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import TYPE_CHECKING, TypeVar

import sniffio

from orderbus._core.handler import DEFAULT_TIMEOUT_S
from orderbus._core.settings import Settings
from orderbus._runtime.opening import asyncio_only, open_broker, open_claims, open_store
from orderbus._runtime.starting import starting
from orderbus.abc import Broker, Claims, Store
from orderbus.errors import UsageError

if TYPE_CHECKING:
    from orderbus._runtime.portal import Portal

T = TypeVar("T")

IDLE_MARGIN_S = 10.0
"""A handler's own time limit comes first: after that its policy decides, while a lost session would look like a server that is away."""


class Servers:
    """What the settings name. On the memory broker, what they don't name is in memory, too.

    `longest_s`: how long whatever uses the store may take. The database gives up a transaction that has been idle for longer.
    """

    def __init__(self, group: str, settings: Settings, clock: Callable[[], float], longest_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._group = group
        self._clock = clock
        self._settings = settings
        self._idle_ms = int((longest_s + IDLE_MARGIN_S) * 1000)
        self._portal: Portal | None = None
        self._broker: Broker | None = None
        self._store: Store | None = None
        self._claims: Claims | None = None

    async def open(self, stack: AsyncExitStack) -> None:
        """They are closed when the stack is left. Raises UnavailableError where one is away, and UsageError for an address that is wrong."""
        settings = self._settings
        assert settings.broker_url is not None
        with starting(self._group, "to connect to the broker", self._clock):
            broker = await self._enter(stack, settings.broker_url, open_broker(settings.broker_url, name=self._group))
        self._broker = self._portal.broker(broker) if self._portal and _crosses(settings.broker_url) else broker
        database_url, redis_url = settings.database_url, settings.redis_url
        if settings.broker_url.startswith("memory:"):
            database_url = database_url or settings.broker_url
            redis_url = redis_url or settings.broker_url
        if database_url is not None:
            opening = open_store(
                database_url,
                name=self._group,
                pool_size=settings.pool_size,
                idle_in_transaction_ms=self._idle_ms,
                dedupe_window_s=settings.dedupe_window_s,
            )
            with starting(self._group, "to connect to the database and to look at its schema", self._clock):
                store = await self._enter(stack, database_url, opening)
                self._store = self._portal.store(store) if self._portal and _crosses(database_url) else store
                await self._store.check()
        if redis_url is not None:
            claims = await self._enter(stack, redis_url, open_claims(redis_url, prefix=settings.redis_prefix))
            self._claims = self._portal.claims(claims) if self._portal and _crosses(redis_url) else claims

    async def _enter(self, stack: AsyncExitStack, url: str, manager: AbstractAsyncContextManager[T]) -> T:
        if not _crosses(url):
            return await stack.enter_async_context(manager)
        if self._portal is None:
            # Here, since with asyncio and anyio's threads it would be a third of the time that `import orderbus` takes.
            from orderbus._runtime.portal import open_portal

            self._portal = await stack.enter_async_context(open_portal())
        return await stack.enter_async_context(self._portal.entered(manager))

    @property
    def broker(self) -> Broker:
        assert self._broker is not None
        return self._broker

    @property
    def store(self) -> Store:
        if self._store is None:
            raise UsageError(f"the bus {self._group!r} has no database; set ORDERBUS_DATABASE_URL", code="OB403")
        return self._store

    @property
    def claims(self) -> Claims:
        if self._claims is None:
            raise UsageError(f"the bus {self._group!r} has no claims keeper; set ORDERBUS_REDIS_URL", code="OB404")
        return self._claims

    @property
    def has_store(self) -> bool:
        return self._store is not None

    @property
    def has_claims(self) -> bool:
        return self._claims is not None


def _crosses(url: str) -> bool:
    return asyncio_only(url) and sniffio.current_async_library() == "trio"
