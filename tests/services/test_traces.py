"""One order, one trace: from the POST through the outbox to the notification, as a collector sees it."""

from __future__ import annotations

import json
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from services.demo.processes import Child, wait_until_ready, wait_until_said
from tests.faults.world import ROOT
from tests.servers import free_port
from tests.services.collector import Collector, Span, collecting

pytestmark = pytest.mark.servers

LIMIT_S = 60.0
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SERVICES = ("outbox_dispatcher", "payment", "inventory", "aggregator", "notification")
SENT = [
    ("orders-api", "POST /orders"),
    ("outbox-dispatcher", "send orders.placed"),
    ("payment", "process orders.placed"),
    ("outbox-dispatcher", "send payments.authorized"),
    ("aggregator", "process payments.authorized"),
    ("inventory", "process orders.placed"),
    ("outbox-dispatcher", "send inventory.reserved"),
    ("aggregator", "process inventory.reserved"),
    ("outbox-dispatcher", "send orders.confirmed"),
    ("notification", "process orders.confirmed"),
]
"""Who makes which span of a confirmed order's way, besides those of the database and the settlements."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(params=["together", "apart"])
def shop_url(
    request: pytest.FixtureRequest, collector: Collector, shop_database_url: str, tmp_path: Path
) -> Iterator[tuple[str, bool]]:
    """The six services, in one process on the memory broker, or each in its own on RabbitMQ and Redis; their URL."""
    port = free_port()
    is_apart = request.param == "apart"
    environment = {
        "ORDERS_API_PORT": str(port),
        "ORDERBUS_BROKER_URL": request.getfixturevalue("vhost_url") if is_apart else f"memory://{secrets.token_hex(4)}",
        "ORDERBUS_DATABASE_URL": shop_database_url,
        "ORDERBUS_RELAY": "false",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
    }
    if is_apart:
        environment |= {
            "ORDERBUS_REDIS_URL": request.getfixturevalue("redis_url"),
            "ORDERBUS_REDIS_PREFIX": f"orderbus-test:{secrets.token_hex(6)}:",
        }
    with running(environment, tmp_path, is_apart=is_apart):
        yield f"http://127.0.0.1:{port}", is_apart


@contextmanager
def running(environment: Mapping[str, str], folder: Path, *, is_apart: bool) -> Iterator[None]:
    with ExitStack() as stack:
        children = []
        if is_apart:
            for name in SERVICES:
                arguments = ["-m", "orderbus", "run", f"services.{name}:bus", "--log-json"]
                children.append(Child(name, arguments, environment, folder))
        api = Child("orders-api", ["-m", "services.orders_api" if is_apart else "services.demo.together"], environment, folder)
        for child in (*children, api):
            child.start()
            stack.callback(child.stop)
        wait_until_said("running: ", children)
        wait_until_ready(f"http://127.0.0.1:{environment['ORDERS_API_PORT']}/ready", [*children, api])
        yield


def place(url: str, parent: str, **changes: Any) -> str:
    order = {
        "customer_id": "00000000-0000-0000-0000-000000000001",
        "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1_000}],
        **changes,
    }
    answer = httpx.post(f"{url}/orders", json=order, headers={"traceparent": parent}, timeout=LIMIT_S)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["order_id"])


def until(collector: Collector, is_there: Callable[[], bool]) -> None:
    with collector.changed:
        assert collector.changed.wait_for(is_there, LIMIT_S), [*collector.spans, *collector.metrics]


def ancestors(span: Span, spans: list[Span]) -> list[Span]:
    by_id = {one.span_id: one for one in spans}
    found = [span]
    while found[-1].parent_id in by_id:
        found.append(by_id[found[-1].parent_id])
    return found[::-1]


def test_an_order_s_trace_is_complete_from_the_request_to_the_notification(
    shop_url: tuple[str, bool], collector: Collector
) -> None:
    url, is_apart = shop_url
    order_id = place(url, f"00-{TRACE}-00f067aa0ba902b7-01")

    until(collector, lambda: any(span.name == "process orders.confirmed" for span in collector.trace(TRACE)))
    place(url, f"00-{'7' * 32}-00f067aa0ba902b7-00")  # a trace that nobody wants to see
    until(collector, lambda: len([span for span in collector.trace(TRACE) if _is_on_the_way(span)]) == len(SENT))
    spans = collector.trace(TRACE)

    seen = [(span.service if is_apart else "", span.name) for span in spans if _is_on_the_way(span)]
    assert sorted(seen) == sorted((service if is_apart else "", name) for service, name in SENT)
    (last,) = [span for span in spans if span.name == "process orders.confirmed"]
    way = [span.name for span in ancestors(last, spans)]
    assert way[:3] == ["POST /orders", "send orders.placed", "process orders.placed"]
    assert way[3] in ("send payments.authorized", "send inventory.reserved")
    assert way[-2:] == ["send orders.confirmed", "process orders.confirmed"]
    (request,) = [span for span in spans if span.name == "POST /orders"]
    assert request.parent_id == "00f067aa0ba902b7"
    assert request.attributes["http.response.status_code"] == 201
    for span in spans:
        assert ancestors(span, spans)[0] is request, f"{span} hangs under nothing"
        if span.name.startswith("process ") and "batch" not in span.name:
            assert span.attributes["orderbus.key"] == order_id
            assert span.attributes["orderbus.outcome"] == "handled"
    assert {span.trace_id for span in collector.spans} == {TRACE}


def test_the_metrics_of_all_services_arrive(shop_url: tuple[str, bool], collector: Collector) -> None:
    url, is_apart = shop_url
    place(url, f"00-{TRACE}-00f067aa0ba902b7-00")
    place(url, f"00-{TRACE}-00f067aa0ba902b7-00", lines=[{"sku": "article-00001", "quantity": 1, "unit_cents": 900_000}])

    def counted() -> dict[str, float]:
        return {
            name: sum(point.as_int for point in metric.sum.data_points)
            for (_, name), metric in collector.metrics.items()
            if name in ("orders.finished", "orders.revenue")
        }

    until(collector, lambda: counted() == {"orders.finished": 2, "orders.revenue": 1_000})
    everybody = {name.replace("_", "-") for name in SERVICES} | {"orders-api"} if is_apart else {"orders"}
    until(collector, lambda: {service for service, name in collector.metrics if name == "orderbus.emitted"} == everybody)
    for wanted in ("http.server.request.duration", "db.client.connection.wait_time", "orders.stock", "orders.end_to_end"):
        until(collector, lambda wanted=wanted: any(name == wanted for _, name in collector.metrics))


def _is_on_the_way(span: Span) -> bool:
    return span.name.startswith(("POST ", "send ", "process ")) and "batch" not in span.name


# What goes wrong


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "is-silent"])
def test_a_collector_that_is_away_holds_nothing_up_and_is_told_of_once(
    shop_database_url: str, vhost_url: str, tmp_path: Path, listens: bool
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening: every connection is refused
        if listens:
            nobody.listen()  # the kernel takes connections, and nobody ever answers
        environment = {
            "ORDERBUS_BROKER_URL": vhost_url,
            "ORDERBUS_DATABASE_URL": shop_database_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "30" if listens else "1",
        }
        child = Child("aggregator", ["-m", "orderbus", "run", "services.aggregator:bus"], environment, tmp_path)
        child.start()
        try:
            wait_until_said("running: ", [child])
            if not listens:
                wait_until_said("Connection refused", [child])
        finally:
            began = time.monotonic()
            code = child.stop()
    assert code == 0, child.log.read_text()
    assert child.receipts()[0]["clean"]
    assert time.monotonic() - began < 15  # 3 s for the goodbye, and whatever this machine takes for the rest
    told = [line for line in child.log.read_text().splitlines() if "opentelemetry" in line]
    assert len(told) == len({line.split(" ", 2)[-1] for line in told}) <= 4, told


def test_a_collector_that_is_full_holds_no_order_up_and_is_told_of_once(shop_database_url: str, tmp_path: Path) -> None:
    """What a collector answers whose Elasticsearch is full, when it has no room itself any more."""
    port = free_port()
    with collecting(status=503) as full, psycopg.connect(shop_database_url, autocommit=True) as connection:
        environment = {
            "ORDERS_API_PORT": str(port),
            "ORDERBUS_BROKER_URL": f"memory://{secrets.token_hex(4)}",
            "ORDERBUS_DATABASE_URL": shop_database_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": full.url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        with running(environment, tmp_path, is_apart=False):
            for number in range(20):
                place(f"http://127.0.0.1:{port}", f"00-{number + 1:032x}-00f067aa0ba902b7-01")
            until(full, lambda: bool(full.spans) and bool(full.metrics))
            deadline = time.monotonic() + LIMIT_S
            while connection.execute("select count(*) from orders where finished_at is not null").fetchone() != (20,):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    lines = [json.loads(line) for line in (tmp_path / "orders-api.out").read_text().splitlines() if line.startswith("{")]
    told = [line["message"] for line in lines if line.get("log.logger", "").startswith("opentelemetry")]
    assert 1 <= len(told) == len({re.sub(r"[\d.]+s", "", line) for line in told}) <= 6, told


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "must be http://host:port"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:port", "must be http://host:port"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "only http/protobuf is spoken here"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "must be otlp or none"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_opened(variable: str, value: str, says: str) -> None:
    environment = {"ORDERBUS_BROKER_URL": "memory://", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", variable: value}
    done = subprocess.run(
        [sys.executable, "-m", "orderbus", "run", "services.aggregator:bus"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 2
    assert variable in done.stderr
    assert says in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
