"""The pytest plugin of orderbus: fixtures that do nothing until a test asks for them.

A module beside the package, for pytest imports it at every start: in the package it would bring all of orderbus along.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

__all__ = ["virtual_time"]

BACKENDS = ("asyncio", "trio") if find_spec("trio") is not None else ("asyncio",)


@pytest.fixture(params=BACKENDS)
def virtual_time(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """An event loop in virtual time for anyio's pytest plugin: asyncio's, and trio's where it is installed. Each test has a new one.

    @pytest.fixture
    def anyio_backend(virtual_time):
        return virtual_time
    """
    from orderbus.testing import virtual_backend

    return virtual_backend(request.param)
