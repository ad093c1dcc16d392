"""What is around the library: SQL in the forms that psycopg takes, and HTTP methods that nobody has heard of."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import metrics as metrics_api, trace as trace_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from psycopg import sql

from orderbus import Bus, Settings
from orderbus.adapters.postgres import open_store
from orderbus.telemetry import _quiet_exporters
from services.orders_api.telemetry import Requests, Watched
from tests.telemetry.spans import Recorded


@pytest.fixture
def anyio_backend() -> Any:
    return "asyncio"


@pytest.fixture
async def bus(database_url: str, recorded: Recorded) -> AsyncIterator[Bus]:
    async with open_store(database_url, name="tests") as store:
        await store.apply_schema()
    async with Bus("shop", settings=Settings(broker_url="memory://", database_url=database_url, relay=False)) as bus:
        yield bus


@pytest.mark.servers
@pytest.mark.anyio
@pytest.mark.parametrize("query", ["select 1", sql.SQL("select {}").format(1), b"select 1"], ids=["text", "composed", "bytes"])
async def test_sql_in_every_form_that_psycopg_takes_works_with_an_sdk_as_without(
    bus: Bus, recorded: Recorded, query: Any
) -> None:
    with recorded.tracer.start_as_current_span("POST"):
        async with bus.transaction() as tx:
            assert await tx.fetch_one(query) == (1,)

    statement = recorded.named("SELECT") or recorded.named("EXECUTE")
    assert [recorded.path(span)[0] for span in statement] == ["POST"]
    assert (statement[0].attributes or {}).get("db.query.text") == (query if isinstance(query, str) else None)


def test_a_method_that_nobody_has_heard_of_makes_no_label(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(metrics_api, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(metrics_api, "get_meter", lambda name: provider.get_meter(name))
    monkeypatch.setattr(trace_api, "get_tracer", lambda name: recorded.tracer)
    requests = Requests()
    for method in ("GET", "BREW", "WHEN"):
        watched = Watched(SimpleNamespace(response_bytes=lambda *_: None))
        scope = SimpleNamespace(method=method, path="/orders", scheme="http", headers=Headers())
        with requests.request(scope, "/orders", watched):
            watched.response_bytes(405, [], b"")

    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert {point.attributes["http.request.method"] for point in metric.data.data_points} == {"GET", "_OTHER"}
    assert {span.name for span in recorded} == {"GET /orders", "HTTP /orders"}


class Headers(dict[str, str]):
    def get_all(self, key: str) -> list[str]:
        return [self[key]]


def test_a_collector_that_is_away_is_told_of_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1_000.0
    monkeypatch.setattr("orderbus.telemetry.time.monotonic", lambda: now)
    exporter = logging.getLogger("opentelemetry.exporter.tests")
    with _quiet_exporters(), caplog.at_level(logging.WARNING):
        for second in range(130):
            now = 1_000.0 + second
            exporter.error("connection refused at try %d", second)

    assert [record.getMessage() for record in caplog.records] == [
        "connection refused at try 0",
        "connection refused at try 60 (59 more since then)",
        "connection refused at try 120 (59 more since then)",
    ]
