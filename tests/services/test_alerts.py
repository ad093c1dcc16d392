"""The alerts of compose/prometheus: their own cases, the names that they rest on, their paragraphs, and one that fires and resolves."""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import pytest
import yaml

from orderbus import errors
from orderbus._core.message import Outgoing, Settlement
from orderbus._core.topology import Queue, Topology
from orderbus.adapters.rabbitmq import open_broker
from services.demo.processes import Child, wait_until_ready, wait_until_said
from tests.faults.world import ROOT
from tests.servers import free_port, start_rabbit
from tests.services.shop import CUSTOMER
from tests.telemetry.page import listed_metrics

FOLDER = ROOT / "compose" / "prometheus"
LIMIT_S = 60.0
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
SERVICES = ("outbox-dispatcher", "payment", "inventory", "aggregator", "notification", "orders-api")
NAME = r"(?:messaging|orderbus|orders|http_server|db_client|rabbitmq)_[a-z_]+"


@pytest.mark.servers
@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml"), ("check", "config", "prometheus.yml")],
    ids=["rules", "cases", "configuration"],
)
def test_promtool_agrees(prometheus_program: str, arguments: tuple[str, ...]) -> None:
    promtool = Path(prometheus_program).with_name("promtool")
    done = subprocess.run([promtool, *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_each_alarm_of_the_broker_fires_alone() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    (alert,) = [rule for rule in RULES if rule["alert"] == "BrokerAlarm"]
    on = [
        {series["series"].partition("{")[0] for series in test["input_series"] if " 1x" in series["values"]}
        for test in tests
        if any(case["alertname"] == "BrokerAlarm" and case["exp_alerts"] for case in test["alert_rule_test"])
    ]
    assert sorted(on, key=str) == sorted(({name} for name in re.findall(r"rabbitmq_alarms_\w+", alert["expr"])), key=str)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_each_alert_has_its_paragraph(rule: dict[str, Any]) -> None:
    page = errors.PAGE.replace("errors.md", "operations.md")
    assert rule["annotations"]["runbook_url"] == f"{page}#{rule['alert'].lower()}"
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert rule["alert"] in headings


def listed() -> dict[str, set[str]]:
    """The labels of each metric that docs/telemetry.md lists, under the names that Prometheus gives them."""
    found = {}
    for metric, (kind, unit, attributes) in listed_metrics().items():
        name = metric.replace(".", "_") + ("_seconds" if unit == "s" else "")
        labels = {label.replace(".", "_") for label in attributes}
        if kind == "counter":
            found[f"{name}_total"] = labels
        elif kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
        else:
            found[name] = labels
    return found


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_rests_on_metrics_and_labels_that_there_are(rule: dict[str, Any]) -> None:
    known = listed()
    for name, selected in re.findall(rf"\b({NAME})(?:{{(.*?)}})?", _without_groupings(rule["expr"])):
        if not name.startswith("rabbitmq_"):
            assert name in known
            assert set(re.findall(r"(\w+)\s*[=!]", selected)) <= known[name]


def _without_groupings(expression: str) -> str:
    return re.sub(r"\bby \(.*?\)", "", expression)


@pytest.mark.servers
def test_the_broker_has_the_metrics_that_alerts_and_dashboards_rest_on() -> None:
    elastic = ROOT / "compose" / "elastic"
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    collector = yaml.safe_load((elastic / "collector.yml").read_text())["receivers"]["prometheus"]["config"]
    (queues, also) = (job for one in (config, collector) for job in one["scrape_configs"] if job["job_name"] == "rabbitmq-queues")
    asked = {"family": [*queues["params"]["family"], *also["params"]["family"]]}
    wanted = {name for rule in RULES for name in re.findall(r"\brabbitmq_[a-z_]+", rule["expr"])}
    wanted |= set(re.findall(r"metrics\.(rabbitmq_[a-z_]+)", (elastic / "dashboards.yml").read_text()))
    port = free_port()
    with ExitStack() as stack:
        rabbit = start_rabbit(stack, plugins="rabbitmq_prometheus", settings=f"prometheus.tcp.port = {port}\n")

        async def consumed(is_over: Callable[[], bool]) -> None:
            async with open_broker(rabbit.url, name="tests") as broker:
                await broker.apply(Topology(queues=(Queue("q"),)))
                await broker.publish([Outgoing("", "q", b"", "m", "t")])
                async with broker.subscribe("q", prefetch=1) as subscription:
                    (delivery,) = await subscription.receive()
                    subscription.settle(delivery, Settlement.ACK)
                    await subscription.flush()
                    await anyio.to_thread.run_sync(until, is_over, f"{wanted} to be scraped")

        def all_are_there() -> bool:
            url = f"http://127.0.0.1:{port}"
            scraped = httpx.get(f"{url}/metrics").text + httpx.get(url + queues["metrics_path"], params=asked).text
            return all(re.search(rf"^{name}[{{ ]", scraped, re.MULTILINE) for name in wanted)

        anyio.run(consumed, all_are_there)
    assert wanted


# A real Prometheus, and the demo's services on the real servers


class Prometheus:
    """Scrapes the services at these ports every half second, with the project's own rules."""

    def __init__(self, program: str, folder: Path, stack: ExitStack, services: dict[str, int]) -> None:
        targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"service": name}} for name, port in services.items()]
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"},
            "rule_files": [str(FOLDER / "alerts.yml")],
            "scrape_configs": [{"job_name": "orderbus", "static_configs": targets}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        arguments = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen([*arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        until(self._is_ready, "Prometheus")

    def value(self, query: str) -> float | None:
        """Of a query with one answer; None where there is none yet."""
        result = self._get("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire now, and of which service."""
        return {_named(one["labels"]) for one in self._get("alerts")["alerts"] if one["state"] == "firing"}

    def have_fired(self) -> set[tuple[str, str]]:
        """All that fired since it began, however briefly."""
        return {
            _named(one["metric"]) for one in self._get("query", query='last_over_time(ALERTS{alertstate="firing"}[1h])')["result"]
        }

    def names(self) -> set[str]:
        return set(self._get("label/__name__/values"))

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._url}/-/ready").status_code == 200
        except httpx.TransportError:
            return False


def _named(labels: dict[str, str]) -> tuple[str, str]:
    return labels["alertname"], labels.get("service", "")


def until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:g} s for {what}"
        time.sleep(0.1)


class Demo:
    """The six services, each a process of its own that serves its metrics."""

    def __init__(self, environment: dict[str, str], folder: Path, stack: ExitStack) -> None:
        api_port = free_port()
        self._url = f"http://127.0.0.1:{api_port}"
        self.ports: dict[str, int] = {}
        self.children: dict[str, Child] = {}
        for name in SERVICES:
            self.ports[name] = free_port()
            its_own = {"OTEL_EXPORTER_PROMETHEUS_PORT": str(self.ports[name]), "ORDERS_API_PORT": str(api_port)}
            module = f"services.{name.replace('-', '_')}"
            arguments = ["-m", module] if name == "orders-api" else ["-m", "orderbus", "run", f"{module}:bus"]
            self.children[name] = Child(name, arguments, {**environment, **its_own}, folder)
        for child in self.children.values():
            child.start()
            stack.callback(child.stop)
        wait_until_said("running: ", [child for name, child in self.children.items() if name != "orders-api"])
        wait_until_ready(f"{self._url}/ready", self.children.values())

    def place(self) -> str:
        line = {"sku": "article-00001", "quantity": 1, "unit_cents": 1_000}
        answer = httpx.post(f"{self._url}/orders", json={"customer_id": str(CUSTOMER), "lines": [line]})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["order_id"])

    def status(self, order_id: str) -> str:
        return str(httpx.get(f"{self._url}/orders/{order_id}").json()["status"])


@pytest.fixture
def demo(shop_database_url: str, shop_vhost_url: str, redis_url: str, tmp_path: Path) -> Iterator[Demo]:
    environment = {
        "ORDERBUS_BROKER_URL": shop_vhost_url,
        "ORDERBUS_DATABASE_URL": shop_database_url,
        "ORDERBUS_REDIS_URL": redis_url,
        "ORDERBUS_REDIS_PREFIX": f"orderbus-test:{secrets.token_hex(6)}:",
        "ORDERBUS_RELAY": "false",
        "NOTIFY_URL": "null:",
        "ORDER_DEADLINE_S": "600",
        "OTEL_METRICS_EXPORTER": "prometheus",
    }
    with ExitStack() as stack:
        yield Demo(environment, tmp_path, stack)


@pytest.mark.servers
def test_an_alert_fires_while_a_service_of_the_demo_is_gone_and_resolves_when_it_is_back(
    prometheus_program: str, demo: Demo, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        prometheus = Prometheus(prometheus_program, tmp_path, stack, demo.ports)
        until(lambda: prometheus.value("sum(up)") == len(SERVICES), "six targets that answer")
        until(lambda: prometheus.value("sum(orderbus_relay_buckets)") == 64, "the relay's buckets")
        before = demo.place()
        until(lambda: demo.status(before) == "confirmed", "an order's end")
        assert prometheus.firing() == set()

        payment = demo.children["payment"]
        assert payment.stop() == 0
        meanwhile = demo.place()
        until(lambda: prometheus.firing() == {("ServiceDown", "payment")}, "the alert")
        assert demo.status(meanwhile) == "pending"
        payment.start()
        until(lambda: prometheus.value('up{service="payment"}') == 1, "payment's metrics")
        until(lambda: prometheus.firing() == set(), "the alert's end")
        until(lambda: demo.status(meanwhile) == "confirmed", "the end of the order that waited for payment")

        assert prometheus.have_fired() == {("ServiceDown", "payment")}
        ours = {name for name in prometheus.names() if re.fullmatch(NAME, name)}
        assert {"orderbus_handled_total", "orderbus_outbox_age_seconds", "http_server_request_duration_seconds_count"} <= ours
        assert ours <= set(listed())
