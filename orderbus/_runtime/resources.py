"""Resources: async generators that yield one value each, opened at start and closed after the drain."""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, get_args, get_origin

import anyio
import msgspec

from orderbus._core.naming import place_of
from orderbus.errors import UsageError

log = logging.getLogger("orderbus")

CLOSE_S = 10.0


class Resource(msgspec.Struct, frozen=True):
    function: Callable[[], AsyncIterator[Any]]
    provides: type

    @property
    def place(self) -> str:
        return f"resource {place_of(self.function)}"


def resource_of(function: Callable[[], AsyncIterator[Any]]) -> Resource:
    """Reads what it provides from `-> AsyncIterator[T]`. Raises UsageError where that is missing."""
    place, name = f"resource {place_of(function)}", getattr(function, "__name__", "provide")
    if not inspect.isasyncgenfunction(function):
        raise UsageError(
            f"{place}: must be an async generator: `async def {name}() -> AsyncIterator[T]: … yield value`", code="OB316"
        )
    try:
        hint = typing.get_type_hints(function).get("return")
    except (NameError, TypeError) as error:
        raise UsageError(f"{place}: its annotations name something that can't be found: {error}", code="OB305") from error
    arguments = get_args(hint)
    if get_origin(hint) not in (AsyncIterator, AsyncGenerator) or not arguments or not isinstance(arguments[0], type):
        raise UsageError(f"{place}: needs the type it provides; write `-> AsyncIterator[T]` with a class T", code="OB316")
    if inspect.signature(function).parameters:
        raise UsageError(f"{place}: takes no parameters; close over what it needs", code="OB316")
    return Resource(function, arguments[0])


class Resources:
    """Opens resources in the order of their registration, closes them in reverse.

    A resource always goes on after its `yield`, also where the bus ends by an error or is cancelled: that is none of its
    business, and what stands there must run.
    """

    def __init__(self, declared: Mapping[type, Resource]) -> None:
        self._declared = declared
        self._stack = AsyncExitStack()
        self.values: dict[type, Any] = {}

    async def __aenter__(self) -> Resources:
        try:
            for kind, resource in self._declared.items():
                self.values[kind] = await self._stack.enter_async_context(asynccontextmanager(resource.function)())
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()

    async def _close(self) -> None:
        with anyio.move_on_after(CLOSE_S, shield=True) as time:
            await self._stack.aclose()
        if time.cancelled_caught:
            log.error("a resource did not close within %g s; left to itself", CLOSE_S)
