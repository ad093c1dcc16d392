"""An SDK of the test's own: nothing is installed for the process, so that all other tests run without one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orderbus.testing.clock import virtual_backends
from tests.runtime.world import World, open_world
from tests.telemetry.spans import Recorded


@pytest.fixture(params=virtual_backends())
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def world(anyio_backend: Any) -> AsyncIterator[World]:
    async with open_world() as world:
        yield world


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """All spans of the test, whichever bus made them."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    return Recorded(exporter, provider.get_tracer("test"))
