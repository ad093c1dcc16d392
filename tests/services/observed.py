"""The six services as processes, and a collector to which they tell their spans and metrics."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.demo.processes import Child, wait_until_ready, wait_until_said
from tests.faults.world import ROOT
from tests.servers import free_port
from tests.services.collector import LIMIT_S, Collector, Span, collecting

__all__ = ["SERVICES", "Services", "ancestors", "below", "collector", "place", "services"]

SERVICES = ("outbox_dispatcher", "payment", "inventory", "aggregator", "notification")
"""Those that `orderbus run` runs; the sixth is the Orders API."""


class Services:
    """In one process on the memory broker, or each in its own on RabbitMQ and Redis."""

    def __init__(self, environment: Mapping[str, str], folder: Path, *, is_apart: bool) -> None:
        self.is_apart = is_apart
        self.url = f"http://127.0.0.1:{environment['ORDERS_API_PORT']}"
        self._environment = dict(environment)
        self._folder = folder
        self._stack = ExitStack()
        self._children: dict[str, Child] = {}

    @contextmanager
    def running(self, **environment: str) -> Iterator[None]:
        """When the block is left they are stopped, and have told everything."""
        self._environment |= environment
        with self._stack:
            names = SERVICES if self.is_apart else ()
            for name in names:
                self._start(name, name)
            program = "services.orders_api" if self.is_apart else "services.demo.together"
            api = Child("orders-api", ["-m", program], self._environment, self._folder)
            self._stack.callback(api.stop)
            api.start()
            wait_until_said("running: ", self._children.values())
            wait_until_ready(f"{self.url}/ready", [*self._children.values(), api])
            yield

    def restart(self, name: str, **environment: str) -> None:
        """One that has a process of its own, with other settings."""
        assert self._children[name].stop() == 0
        self._environment |= environment
        wait_until_said("running: ", [self._start(name, f"{name}-again")])

    def orderbus(self, *arguments: str) -> str:
        """What the command line prints, beside them and on the same servers."""
        done = subprocess.run(
            [sys.executable, "-m", "orderbus", *arguments],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", **self._environment},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _start(self, name: str, files: str) -> Child:
        child = Child(files, ["-m", "orderbus", "run", f"services.{name}:bus", "--log-json"], self._environment, self._folder)
        self._stack.callback(child.stop)
        child.start()
        self._children[name] = child
        return child


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(params=["together", "apart"])
def services(request: pytest.FixtureRequest, collector: Collector, shop_database_url: str, tmp_path: Path) -> Services:
    """To be started by the test. A trace is recorded where its caller wants that, and nothing that has no caller."""
    is_apart = request.param == "apart"
    environment = {
        "ORDERS_API_PORT": str(free_port()),
        "ORDERBUS_BROKER_URL": f"memory://{secrets.token_hex(4)}",
        "ORDERBUS_DATABASE_URL": shop_database_url,
        "ORDERBUS_RELAY": "false",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "ORDER_DEADLINE_S": "3600",
    }
    if is_apart:
        environment |= {
            "ORDERBUS_BROKER_URL": request.getfixturevalue("shop_vhost_url"),
            "ORDERBUS_REDIS_URL": request.getfixturevalue("redis_url"),
            "ORDERBUS_REDIS_PREFIX": f"orderbus-test:{secrets.token_hex(6)}:",
        }
    return Services(environment, tmp_path, is_apart=is_apart)


def place(url: str, parent: str, **changes: Any) -> str:
    """An order's id; `parent` is the caller's context."""
    order = {
        "customer_id": "00000000-0000-0000-0000-000000000001",
        "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1_000}],
        **changes,
    }
    answer = httpx.post(f"{url}/orders", json=order, headers={"traceparent": parent}, timeout=LIMIT_S)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["order_id"])


def ancestors(span: Span, spans: list[Span]) -> list[Span]:
    """From the root to the span itself."""
    by_id = {one.span_id: one for one in spans}
    found = [span]
    while found[-1].parent_id in by_id:
        found.append(by_id[found[-1].parent_id])
    return found[::-1]


def below(span: Span, spans: list[Span]) -> list[Span]:
    """Its children, in the order in which they began."""
    return [one for one in spans if one.parent_id == span.span_id]
