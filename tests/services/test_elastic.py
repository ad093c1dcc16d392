"""What can be checked of the profile elastic where it can't be run: its files, and that what they refer to is really emitted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from compose.elastic import build
from compose.elastic.build import FOLDER, ndjson, read
from compose.elastic.rules import DATA, rules
from services.orders_api import openapi
from tests.faults.world import ROOT
from tests.services.test_alerts import RULES as PROMETHEUS_RULES, listed
from tests.services.test_compose import OURS, SERVICES
from tests.telemetry.page import attributes_of_spans

SOURCE = read("dashboards.yml")
RULES: list[dict[str, Any]] = read("rules.yml")["rules"]
PROMETHEUS = {rule["alert"]: rule for rule in PROMETHEUS_RULES}
PANELS = [(dashboard["id"], panel) for dashboard in SOURCE["dashboards"] for panel in dashboard["panels"]]
PROBES = {path for path, operations in openapi.document()["paths"].items() if "schemas/Health" in str(operations)}
OF_LOGS = {
    "@timestamp",
    "log.level",
    "log.logger",
    "message",
    "service.name",
    "event.id",
    "event.reason",
    "error.type",
    "trace.id",
    "span.id",
}
OF_SPANS = {"name", "duration", "status.code", "trace_id", "resource.attributes.service.name"}
OF_SCRAPES = {"metrics.up", "resource.attributes.service.name", "resource.attributes.service.instance.id"}
"""What the collector's Prometheus receiver says of each target itself: whether it answered, its job, its host and port."""
OF_THE_BROKER = {
    "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_detailed_queue_messages_unacked",
    "rabbitmq_detailed_queue_consumers",
    "rabbitmq_detailed_channel_messages_acked_total",
    "rabbitmq_alarms_memory_used_watermark",
    "rabbitmq_alarms_free_disk_space_watermark",
}
"""Seen on a real one: test_the_broker_has_the_metrics_that_alerts_and_dashboards_rest_on."""


def objects() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "dashboards.ndjson").read_text().splitlines()]


def test_the_saved_objects_are_those_of_the_source() -> None:
    assert (FOLDER / "dashboards.ndjson").read_text() == ndjson(), "run python -m compose.elastic.build"
    made = {path.name: path.read_text() for path in (FOLDER / "rules").iterdir()}
    assert made == rules(read("rules.yml")), "run python -m compose.elastic.build"


def test_there_are_the_four_dashboards() -> None:
    dashboards = [one for one in objects() if one["type"] == "dashboard"]
    assert [one["attributes"]["title"] for one in dashboards] == [
        "orderbus: Performance",
        "orderbus: RabbitMQ queues",
        "orderbus: Distributed traces",
        "orderbus: Business",
    ]
    assert len({one["id"] for one in objects()}) == len(objects())
    for dashboard in dashboards:
        panels = json.loads(dashboard["attributes"]["panelsJSON"])
        assert panels
        places = [tuple(panel["gridData"][side] for side in "xywh") for panel in panels]
        assert len(set(places)) == len(places)
        assert all(panel["gridData"]["x"] + panel["gridData"]["w"] <= 48 for panel in panels)


@pytest.mark.parametrize(("dashboard", "panel"), PANELS, ids=[f"{name}: {panel['title']}" for name, panel in PANELS])
def test_a_panel_shows_what_is_emitted(dashboard: str, panel: dict[str, Any]) -> None:
    assert sum(kind in panel for kind in ("lines", "columns", "markdown")) == 1
    for field in fields(panel):
        if panel["index"] == "metrics":
            assert field in fields_of_metrics()
        elif panel["index"] == "logs":
            assert field in OF_LOGS
        else:
            assert field in OF_SPANS or field.removeprefix("attributes.") in attributes_of_spans(), field


def test_the_slowest_spans_and_the_service_map_are_with_the_traces() -> None:
    (dashboard,) = [one for one in objects() if one["id"] == "orderbus-traces"]
    panels = json.loads(dashboard["attributes"]["panelsJSON"])
    (slowest,) = [panel for panel in panels if panel["type"] == "search"]
    (reference,) = dashboard["references"]
    assert reference["name"] == f"{slowest['panelIndex']}:{slowest['panelRefName']}"
    (search,) = [one for one in objects() if (one["type"], one["id"]) == (reference["type"], reference["id"])]
    assert search["attributes"]["sort"] == [["duration", "desc"]]
    assert {"duration", "trace_id"} <= set(search["attributes"]["columns"])
    texts = [panel["embeddableConfig"]["savedVis"]["params"].get("markdown", "") for panel in panels if panel != slowest]
    assert sum("](/app/apm/service-map)" in text for text in texts) == 1


def test_what_a_saved_object_refers_to_is_there() -> None:
    known = {(one["type"], one["id"]) for one in objects()}
    for one in objects():
        assert {(reference["type"], reference["id"]) for reference in one["references"]} <= known
        source = json.loads(one["attributes"].get("kibanaSavedObjectMeta", {}).get("searchSourceJSON", "{}"))
        if "indexRefName" in source:
            assert [reference["name"] for reference in one["references"]] == [source["indexRefName"]]


def test_the_pages_name_the_kibana_that_takes_the_dashboards() -> None:
    versions = {one["typeMigrationVersion"].rpartition(".")[0] for one in objects() if one["type"] == "dashboard"}
    assert versions == {"8.9"}
    assert build.__doc__ is not None
    assert "Kibana imports from 8.9 on" in build.__doc__
    assert "Kibana 8.9" in (ROOT / "docs" / "operations.md").read_text()


def fields(panel: dict[str, Any]) -> set[str]:
    """Every field that a panel names: of its lines, of what they are split by, of its columns, of its query."""
    of_lines = {line[part] for line in panel.get("lines", ()) for part in ("field", "by") if part in line}
    return of_lines | set(panel.get("columns", ())) | set(re.findall(r"([\w@.]+):", panel.get("query", "")))


def fields_of_metrics() -> set[str]:
    known = listed()
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in known} | known.keys() | OF_THE_BROKER
    labels = {label for of_one in known.values() for label in of_one} | {"queue", "vhost"}
    return {f"metrics.{name}" for name in names} | {f"attributes.{label}" for label in labels}


# Rules


def test_each_alert_of_prometheus_has_its_rule_or_a_reason() -> None:
    reasons: dict[str, str] = read("rules.yml")["without"]
    assert sorted([*(rule["alert"] for rule in RULES), *reasons]) == sorted(PROMETHEUS)
    assert all(len(reason) > 80 for reason in reasons.values())
    assert all(UUID(rule["id"]).version == 4 for rule in RULES)
    assert DATA in {one["id"] for one in objects()}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_is_told_of_in_the_paragraph_that_prometheus_names(rule: dict[str, Any]) -> None:
    (made,) = (FOLDER / "rules").glob(f"{rule['alert']}_*.json")
    assert json.loads(made.read_text())["tags"] == ["orderbus", PROMETHEUS[rule["alert"]]["annotations"]["runbook_url"]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_watches_what_is_emitted(rule: dict[str, Any]) -> None:
    queries = [rule.get("query", ""), *(of.get("query", "") for of in rule["of"].values())]
    named = {field for query in queries for field in re.findall(r"([\w@.]+):", query)}
    named |= {of["field"] for of in rule["of"].values() if "field" in of}
    named |= {rule["by"]} if "by" in rule else set()
    assert named <= fields_of_metrics() | OF_SCRAPES


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_has_the_limits_that_prometheus_has(rule: dict[str, Any]) -> None:
    found = re.findall(r"(>|<|==) ([\d.]+)", re.sub(r"{.*?}", "", PROMETHEUS[rule["alert"]]["expr"]))
    # `==` there is none in Kibana; what is up, consumed or in alarm is 0, 1 or more.
    limits = {{"== 0": "< 1", "== 1": "> 0"}.get(limit, limit) for limit in (" ".join(one) for one in found)}
    fires = [rule["fires"]] if isinstance(rule["fires"], str) else rule["fires"]
    assert limits == {" ".join(condition.split()[-2:]) for condition in fires}


def test_a_condition_is_given_what_its_equation_names() -> None:
    (consumers,) = (FOLDER / "rules").glob("NoConsumers_*.json")
    criteria = json.loads(consumers.read_text())["params"]["criteria"]
    assert [(one["equation"], one["comparator"], one["threshold"], len(one["metrics"])) for one in criteria] == [
        ("A", "<", [1], 1),
        ("B", ">", [0], 1),
    ]
    assert [one["metrics"][0]["aggType"] for one in criteria] == ["max", "min"]
    (alarm,) = (FOLDER / "rules").glob("BrokerAlarm_*.json")
    (both,) = json.loads(alarm.read_text())["params"]["criteria"]
    assert [metric["name"] for metric in both["metrics"]] == ["A", "B"]


def test_probes_are_no_requests_that_fail() -> None:
    """/ready says 503 while a process stops: who asks looks away then, and nobody loses anything."""
    (rule,) = [one for one in RULES if one["alert"] == "OrdersApiErrors"]
    assert rule["query"].startswith("not attributes.http_route: ")
    assert set(re.findall(r'"(/\w+)"', rule["query"])) == PROBES
    expression = PROMETHEUS["OrdersApiErrors"]["expr"]
    left_out = re.findall(r'http_route!~"(.*?)"', expression)
    assert len(left_out) == expression.count("_count{") == 2
    assert all(set(one.split("|")) == PROBES for one in left_out)


def test_the_collector_scrapes_what_is_watched_of_the_broker() -> None:
    config = yaml.safe_load((FOLDER / "collector.yml").read_text())["receivers"]["prometheus"]["config"]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    texts = [(FOLDER / name).read_text() for name in ("rules.yml", "dashboards.yml")]
    watched = {name for text in texts for name in re.findall(r"metrics\.(rabbitmq_\w+)", text)}
    assert watched == OF_THE_BROKER
    (kept,) = jobs["rabbitmq"]["metric_relabel_configs"]
    assert kept["action"] == "keep"
    assert "metrics_path" not in jobs["rabbitmq"]
    of_nodes = {name for name in watched if re.fullmatch(kept["regex"], name)}
    assert of_nodes == {name for name in watched if not name.startswith("rabbitmq_detailed_")}
    assert jobs["rabbitmq-queues"]["metrics_path"] == "/metrics/detailed"


def test_what_a_rule_sums_or_counts_is_what_is_new() -> None:
    """A counter that counts from the beginning on can't be summed, and Elasticsearch takes no such histogram."""
    config = yaml.safe_load((FOLDER / "collector.yml").read_text())
    assert config["service"]["pipelines"]["metrics"]["processors"] == [
        "memory_limiter",
        "cumulativetodelta",
        "filter",
        "transform",
        "batch",
    ]
    assert config["processors"]["cumulativetodelta"] == {
        "initial_value": "keep"
    }  # else a first dead letter would be the beginning
    counted = {re.match(r"metrics\.(\w+)", of["query"]) for rule in RULES for of in rule["of"].values() if of["take"] == "count"}
    (statement,) = config["processors"]["transform"]["metric_statements"][0]["statements"]
    (left_out,) = config["processors"]["filter"]["metrics"]["datapoint"]
    name = statement.rpartition(" == ")[2]
    assert {f'"{name[1]}"' for name in counted if name} == {name}
    assert left_out == f"metric.name == {name} and count == 0"  # a document of none would be counted as one
    jobs = {job["job_name"] for job in config["receivers"]["prometheus"]["config"]["scrape_configs"]}
    assert set(re.findall(r'service\.name: "(\w+)"', str(RULES))) <= jobs


class Kibana(BaseHTTPRequestHandler):
    """Answers a rule's creation with the status that `statuses` has for the alert, else 200; `taken` is what came."""

    statuses: dict[str, int]
    taken: list[tuple[str, bytes]]
    imported = b'{"success":true,"successCount":8}'

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.taken.append((self.path, body))
        name = json.loads(body)["name"].split()[1].rstrip(":") if "/rule/" in self.path else ""
        assert self.headers["kbn-xsrf"]
        answer = b"{}" if name else self.imported
        self.send_response(self.statuses.get(name, 200))
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: Any) -> None:
        pass


def set_up(handler: type[Kibana], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`setup.sh kibana`, against this Kibana."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        (tmp_path / ".curlrc").write_text(f"connect-to = kibana:5601:127.0.0.1:{server.server_address[1]}\n")
        done = subprocess.run(
            ["sh", str(FOLDER / "setup.sh"), "kibana"],
            env={"PATH": "/usr/bin:/bin", "CURL_HOME": str(tmp_path), "ELASTIC_PASSWORD": "x"},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        server.shutdown()
        thread.join()
    return done


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_dashboards_that_kibana_does_not_take_end_the_setup(tmp_path: Path) -> None:
    """It says so with status 200."""
    refused = b'{"success":false,"errors":[{"error":{"type":"missing_references"}}]}'
    handler = type("Handler", (Kibana,), {"statuses": {}, "taken": [], "imported": refused})
    done = set_up(handler, tmp_path)
    assert done.returncode == 1
    assert "dashboards: refused" in done.stderr
    assert "missing_references" in done.stderr
    assert len(handler.taken) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(
    ("statuses", "code"), [({}, 0), ({"OrdersApiErrors": 409}, 0), ({"DeadLetters": 400}, 1)], ids=["new", "there", "refused"]
)
def test_the_setup_loads_dashboards_then_rules_and_leaves_those_that_are_there(
    statuses: dict[str, int], code: int, tmp_path: Path
) -> None:
    handler = type("Handler", (Kibana,), {"statuses": statuses, "taken": []})
    done = set_up(handler, tmp_path)
    assert done.returncode == code, done.stderr
    (first, imported), *others = handler.taken
    assert first == "/api/saved_objects/_import?overwrite=true"
    assert ndjson().encode() in imported
    ids = [path.removeprefix("/api/alerting/rule/") for path, _ in others]
    in_order = sorted(RULES, key=lambda rule: rule["alert"])
    last = next((number for number, rule in enumerate(in_order) if statuses.get(rule["alert"]) == 400), len(RULES))
    assert ids == [rule["id"] for rule in in_order[: last + 1]]
    assert ("there already" in done.stdout) == (409 in statuses.values())
    assert ("refused" in done.stderr) == bool(code)


# The other files


def test_a_log_line_has_the_fields_that_are_named_here() -> None:
    text = (ROOT / "orderbus" / "logs.py").read_text() + (ROOT / "orderbus" / "_runtime" / "accounts.py").read_text()
    assert {name for name in OF_LOGS if f'"{name}"' not in text} == set()


def test_the_collector_scrapes_all_services_and_sends_everything_on() -> None:
    config = yaml.safe_load((FOLDER / "collector.yml").read_text())
    jobs = {job["job_name"]: job for job in config["receivers"]["prometheus"]["config"]["scrape_configs"]}
    targets = jobs["orderbus"]["static_configs"][0]["targets"]
    assert sorted(target.partition(":")[0] for target in targets) == sorted(OURS)
    for pipeline in config["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= config[kind].keys()


# Metricbeat

OF_METRICBEAT = {
    "system": {
        *("core", "cpu", "diskio", "entropy", "filesystem", "fsstat", "load", "memory", "network", "network_summary", "process"),
        *("process_summary", "raid", "service", "socket", "socket_summary", "uptime", "users"),
    },
    "docker": {
        *("container", "cpu", "diskio", "event", "healthcheck", "image", "info", "memory", "network", "network_summary"),
    },
    "rabbitmq": {"connection", "exchange", "node", "queue", "shovel"},
    "postgresql": {"activity", "bgwriter", "database", "statement"},
    "redis": {"info", "key", "keyspace"},
}
"""The metricsets of Metricbeat 8."""


def test_metricbeat_is_asked_for_metricsets_that_it_has() -> None:
    config = yaml.safe_load((FOLDER / "metricbeat.yml").read_text())
    assert config.keys() == {"metricbeat.modules", "output.elasticsearch", "logging.level", "logging.to_stderr"}
    modules = config["metricbeat.modules"]
    assert [one["module"] for one in modules] == list(OF_METRICBEAT)
    for one in modules:
        assert one["metricsets"]
        assert set(one["metricsets"]) <= OF_METRICBEAT[one["module"]]
        assert len(set(one["metricsets"])) == len(one["metricsets"])
        assert one.keys() <= {"module", "metricsets", "period", "hosts", "username", "password", "hostfs"}
        assert re.fullmatch(r"\d+s", one["period"])


# What they have in common


@pytest.mark.parametrize("name", ["collector.yml", "metricbeat.yml", "logstash.conf"])
def test_a_file_reads_only_variables_that_its_container_has(name: str) -> None:
    text = (FOLDER / name).read_text()
    (service,) = [one for one in SERVICES.values() if any(name in volume for volume in one.get("volumes", ()))]
    assert set(re.findall(r"\$\{(?:env:)?([A-Z_]+)\}", text)) <= service["environment"].keys()


@pytest.mark.parametrize("name", ["metricbeat.yml", "logstash.conf", "collector.yml"])
def test_a_file_speaks_only_to_servers_of_the_stack(name: str) -> None:
    hosts = set(re.findall(r"//([a-z][a-z-]*):\d+", (FOLDER / name).read_text()))
    assert hosts <= SERVICES.keys()
