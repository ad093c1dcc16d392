"""One order, one trace: from the POST through the outbox to the notification, as a collector sees it; and that the page lists it all."""

from __future__ import annotations

import json
import re
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from services.demo.processes import Child, wait_until_said
from services.payment import Rules
from tests.faults.world import ROOT
from tests.servers import free_port
from tests.services.collector import LIMIT_S, Collector, Span, collecting
from tests.services.observed import SERVICES, Services, ancestors, below, collector, place, services
from tests.telemetry.page import differences, listed_metrics, listed_spans

__all__ = ["collector", "services"]

pytestmark = pytest.mark.servers

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
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
BELOW = {
    "payment.orders.placed": ["BEGIN", "COMMIT", "process batch", "send payments.authorized", "settle"],
    "inventory.orders.placed": ["BEGIN", "COMMIT", "process batch", "send inventory.reserved", "settle"],
    "notification.orders.confirmed": ["settle"],
}
"""What hangs below the `process` of each queue; the aggregator may take both answers in one transaction, which then has no span."""
STATEMENTS = {
    "payment.orders.placed": ["INSERT"],
    "inventory.orders.placed": ["INSERT", "SELECT", "UPDATE"],
    "aggregator.answers": ["SELECT", "UPDATE"],
}
"""What hangs below the `process batch` of each queue."""
OURS = ("messaging.", "orderbus.", "db.", "http.", "orders.")
"""How the names of metrics begin that are not the SDK's own."""
METRICS_NOT_PROVOKED = {"messaging.client.operation.duration: error.type": "every publish is confirmed"}
SPANS_NOT_PROVOKED = {
    "send <topic>: error.type": "every publish is confirmed",
    "process batch <queue>: error.type": "no handler raises: payment gives single orders back, whose `process` has the error",
    "BEGIN: error.type": "the database is there, and no statement is wrong",
    "every <function>: error.type": "no round fails",
}


def test_an_order_s_trace_is_complete_from_the_request_to_the_notification(services: Services, collector: Collector) -> None:
    with services.running():
        order_id = place(services.url, f"00-{TRACE}-00f067aa0ba902b7-01")
        collector.until(lambda: any(span.name == "process orders.confirmed" for span in collector.trace(TRACE)))
        place(services.url, f"00-{'7' * 32}-00f067aa0ba902b7-00")  # a trace that nobody wants to see
        collector.until(lambda: len([span for span in collector.trace(TRACE) if _is_on_the_way(span)]) == len(SENT))
        told = {"orderbus__consumer": "notification.orders.confirmed", "orderbus__outcome": "handled"}
        collector.until(lambda: collector.sum("orderbus.handled", **told) == 2)
    spans = collector.trace(TRACE)

    seen = [(span.service if services.is_apart else "", span.name) for span in spans if _is_on_the_way(span)]
    assert sorted(seen) == sorted((service if services.is_apart else "", name) for service, name in SENT)
    (last,) = [span for span in spans if span.name == "process orders.confirmed"]
    way = [span.name for span in ancestors(last, spans)]
    assert way[:3] == ["POST /orders", "send orders.placed", "process orders.placed"]
    assert way[3] in ("send payments.authorized", "send inventory.reserved")
    assert way[-2:] == ["send orders.confirmed", "process orders.confirmed"]
    (request,) = [span for span in spans if span.name == "POST /orders"]
    assert request.parent_id == "00f067aa0ba902b7"
    assert request.attributes["http.response.status_code"] == 201
    assert [span.name for span in below(request, spans)] == ["BEGIN", "COMMIT", "send orders.placed"]
    assert {span.service for span in below(request, spans)[:2]} == {request.service}
    for span in spans:
        assert ancestors(span, spans)[0] is request, f"{span} hangs under nothing"
        if _is_try(span):
            assert span.attributes["orderbus.key"] == order_id
            assert span.attributes["orderbus.outcome"] == "handled"
            _check_what_is_below(span, spans)
    assert {span.trace_id for span in collector.spans} == {TRACE}


def _check_what_is_below(span: Span, spans: list[Span]) -> None:
    """A try is settled once, and has the conversations with the store that its handler leads."""
    queue = str(span.attributes["messaging.destination.subscription.name"])
    children = below(span, spans)
    (settle,) = [one for one in children if one.name == f"settle {queue}"]
    assert settle.service == span.service
    assert settle.attributes["messaging.operation.name"] == "ack"
    assert settle.attributes["messaging.message.id"] == span.attributes["messaging.message.id"]
    if queue in BELOW:
        assert sorted(one.name.removesuffix(f" {queue}") for one in children) == BELOW[queue]
    for batch in (one for one in children if one.name == f"process batch {queue}"):
        assert [one.name for one in below(batch, spans)] == STATEMENTS[queue]


def test_the_metrics_and_spans_of_all_services_arrive_and_are_those_that_the_page_lists(
    services: Services, collector: Collector
) -> None:
    """One order confirmed, one too dear, one poisoned: which it is, hangs on their ids, so that some more may be needed."""
    rules = Rules(poison=0.5)
    sampled = f"00-{TRACE}-00f067aa0ba902b7-01"
    confirmed = cancelled = poisoned = 0
    with services.running(PAYMENT_POISON=str(rules.poison), OTEL_TRACES_SAMPLER="always_on"):
        while not (confirmed and cancelled and poisoned):
            is_dear = confirmed > 0 and not cancelled
            line = {"sku": "article-00001", "quantity": 1, "unit_cents": 900_000 if is_dear else 1_000}
            if rules.times_out(UUID(place(services.url, sampled, lines=[line])), 1):
                poisoned += 1
            elif is_dear:
                cancelled += 1
            else:
                confirmed += 1
        collector.until(lambda: collector.sum("orders.finished", order__status="confirmed") == confirmed)
        collector.until(lambda: collector.sum("orders.finished", order__status="cancelled") == cancelled)
        collector.until(lambda: collector.sum("orders.revenue") == confirmed * 1_000)
        collector.until(lambda: collector.sum("orderbus.parked", orderbus__reason="retries-exhausted") == poisoned)
        everybody = {name.replace("_", "-") for name in SERVICES} | {"orders-api"} if services.is_apart else {"orders"}
        collector.until(lambda: {service for service, name in collector.metrics if name == "orderbus.emitted"} == everybody)
        for every_10_s in ("orders.stock", "orders.pending"):
            collector.until(lambda wanted=every_10_s: any(name == wanted for _, name in collector.metrics))
        collector.until(lambda: any(span.name.startswith("every ") for span in collector.spans))

    ours = {name: one for name, one in collector.seen_metrics().items() if name.startswith(OURS)}
    assert differences(listed_metrics(), ours, METRICS_NOT_PROVOKED) == []
    assert differences(listed_spans(), collector.seen_spans(), SPANS_NOT_PROVOKED) == []


def _is_on_the_way(span: Span) -> bool:
    return span.name.startswith(("POST ", "send ")) or _is_try(span)


def _is_try(span: Span) -> bool:
    return span.name.startswith("process ") and not span.name.startswith("process batch ")


# What goes wrong


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "is-silent"])
def test_a_collector_that_is_away_holds_nothing_up_and_is_told_of_once(
    shop_database_url: str, shop_vhost_url: str, tmp_path: Path, listens: bool
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening: every connection is refused
        if listens:
            nobody.listen()  # the kernel takes connections, and nobody ever answers
        environment = {
            "ORDERBUS_BROKER_URL": shop_vhost_url,
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


@pytest.mark.parametrize("status", [503, 404], ids=["full", "no-collector"])
def test_what_takes_no_telemetry_holds_no_order_up_and_is_told_of_once(
    shop_database_url: str, tmp_path: Path, status: int
) -> None:
    """What a collector answers whose Elasticsearch is full, when it has no room itself any more; and a server that is no collector."""
    port = free_port()
    with collecting(status=status) as full, psycopg.connect(shop_database_url, autocommit=True) as connection:
        environment = {
            "ORDERS_API_PORT": str(port),
            "ORDERBUS_BROKER_URL": f"memory://{secrets.token_hex(4)}",
            "ORDERBUS_DATABASE_URL": shop_database_url,
            "OTEL_EXPORTER_OTLP_ENDPOINT": full.url,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        with Services(environment, tmp_path, is_apart=False).running():
            for number in range(20):
                place(f"http://127.0.0.1:{port}", f"00-{number + 1:032x}-00f067aa0ba902b7-01")
            full.until(lambda: bool(full.spans) and bool(full.metrics))
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
        ("OTEL_BSP_SCHEDULE_DELAY", "0", "must be positive"),
        ("OTEL_SPAN_LINK_COUNT_LIMIT", "-1", "must be a non-negative integer"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-5", "is invalid and needs to be larger than zero"),
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
