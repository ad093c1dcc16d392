"""Everything here runs in virtual time, on asyncio and on trio, unless a module says otherwise."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from orderbus.testing.clock import virtual_backends
from tests.runtime.world import World, open_world


@pytest.fixture(params=virtual_backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def world(anyio_backend: Any) -> AsyncIterator[World]:
    """A broker, a store and claims in memory, which outlive the buses that a test opens and closes on them."""
    async with open_world() as world:
        yield world
