"""Finds the adapter for a URL's scheme. The one place that knows the adapters' names; it imports one only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from orderbus.errors import UsageError

ADAPTERS = {
    "amqp": ("orderbus.adapters.rabbitmq", "rabbitmq"),
    "amqps": ("orderbus.adapters.rabbitmq", "rabbitmq"),
    "postgresql": ("orderbus.adapters.postgres", "postgres"),
    "postgres": ("orderbus.adapters.postgres", "postgres"),
    "embedded": ("orderbus.adapters.postgres", "postgres,embedded"),
    "redis": ("orderbus.adapters.redis", "redis"),
    "rediss": ("orderbus.adapters.redis", "redis"),
    "unix": ("orderbus.adapters.redis", "redis"),
    "memory": ("orderbus.adapters.memory", ""),
}


def scheme_of(url: str) -> str:
    return "embedded" if url == "embedded" else urlsplit(url).scheme


def asyncio_only(url: str) -> bool:
    """Whether the URL's driver runs on asyncio only, so that under trio it lives on a thread of its own."""
    return scheme_of(url) != "memory"


def adapter(url: str) -> Any:
    """The adapter's module. Raises UsageError naming the extra to install where its driver is missing."""
    name, extra = ADAPTERS[scheme_of(url)]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("orderbus"):
            raise
        raise UsageError(
            f"{scheme_of(url)}:// needs the package {error.name}; pip install 'orderbus[{extra}]'", code="OB108"
        ) from error


def open_broker(url: str, *, name: str) -> AbstractAsyncContextManager[Any]:
    return adapter(url).open_broker(url, name=name)  # type: ignore[no-any-return]


def open_store(url: str, *, name: str, pool_size: int, **limits: float) -> AbstractAsyncContextManager[Any]:
    """`limits`: as the adapter takes them; a store in memory needs none."""
    if scheme_of(url) == "memory":
        return adapter(url).open_store(url)  # type: ignore[no-any-return]
    opening = adapter(url).open_store(url, name=name, pool_size=pool_size, **limits)
    return _with_schema(opening) if scheme_of(url) == "embedded" else opening


def open_claims(url: str, *, prefix: str) -> AbstractAsyncContextManager[Any]:
    return adapter(url).open_claims(url, prefix=prefix)  # type: ignore[no-any-return]


@asynccontextmanager
async def _with_schema(manager: AbstractAsyncContextManager[Any]) -> AsyncIterator[Any]:
    """An embedded database is this program's own: its schema needs no command of a person."""
    async with manager as store:
        await store.apply_schema()
        yield store
