from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from orderbus.adapters.memory import MemoryBroker, open_broker
from orderbus.testing.clock import virtual_backends


@pytest.fixture(params=virtual_backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Virtual time: an hour's delay costs nothing, and a wait for what never comes is cut off at once."""
    return request.param


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    async with open_broker("memory://", name="test") as broker:
        yield broker
