"""Virtual time, on asyncio and on trio, unless a test says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from orderbus.testing import virtual_backends


@pytest.fixture(params=virtual_backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param
