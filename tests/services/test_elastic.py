"""What can be checked of the profile elastic where it can't be run: its files, and that what they refer to is really emitted."""

from __future__ import annotations

import base64
import importlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
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
    assert config["service"]["pipelines"]["metrics"]["processors"].index("cumulativetodelta") == 1
    counted = {re.match(r"metrics\.(\w+)", of["query"]) for rule in RULES for of in rule["of"].values() if of["take"] == "count"}
    (statement,) = config["processors"]["transform"]["metric_statements"][0]["statements"]
    assert {f'"{name[1]}"' for name in counted if name} == {statement.rpartition(" == ")[2]}
    jobs = {job["job_name"] for job in config["receivers"]["prometheus"]["config"]["scrape_configs"]}
    assert set(re.findall(r'service\.name: "(\w+)"', str(RULES))) <= jobs


class Kibana(BaseHTTPRequestHandler):
    """Answers a rule's creation with the status that `statuses` has for the alert, else 200; `taken` is what came."""

    statuses: dict[str, int]
    taken: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.taken.append((self.path, body))
        name = json.loads(body)["name"].split()[1].rstrip(":") if "/rule/" in self.path else ""
        assert self.headers["kbn-xsrf"]
        self.send_response(self.statuses.get(name, 200))
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(
    ("statuses", "code"), [({}, 0), ({"OrdersApiErrors": 409}, 0), ({"DeadLetters": 400}, 1)], ids=["new", "there", "refused"]
)
def test_the_setup_loads_dashboards_then_rules_and_leaves_those_that_are_there(
    statuses: dict[str, int], code: int, tmp_path: Path
) -> None:
    handler = type("Handler", (Kibana,), {"statuses": statuses, "taken": []})
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


# The smoke test

ORDER_ID = "01a21160-2929-7b8d-aa55-2764d5ae913a"
DOCKER = """#!/bin/sh
echo "$*" >> "$FAKE/calls"
case "$*" in
    "compose version") ;;
    *"ps -q elasticsearch") cat "$FAKE/container" ;;
    "inspect -f {{.State.Running}} abc") cat "$FAKE/running" ;;
    *"exec -T postgres psql"*) echo confirmed ;;
    *"exec -T elasticsearch "*)
        while [ "$1" != elasticsearch ]; do shift; done
        shift
        exec "$@"
        ;;
    *) exit 9 ;;
esac
"""
"""Instead of docker: has a container of Elasticsearch or not, and runs here what shall be run in it."""


class Stack(BaseHTTPRequestHandler):
    """The API and Elasticsearch. `answers` is what Elasticsearch says, the last of it again and again; `asked` is what it was asked."""

    answers: list[tuple[int, bytes]]
    asked: list[tuple[str, str, str]]
    traces: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.traces.append(self.headers["traceparent"])
        self._say(201, f'{{"order_id":"{ORDER_ID}","status":"placed"}}'.encode())

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.asked.append((url.path, parse_qs(url.query)["q"][0], self.headers["authorization"]))
        self._say(*(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]))

    def _say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def smoke(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.CompletedProcess[str], type[Stack]]]]:
    """Runs smoke.sh against a stack that is no more than `Stack`, in a copy of compose/ without an .env."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    for name in ("docker-compose.yml", "scripts/compose.sh", "scripts/smoke.sh"):
        (tmp_path / "compose" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER.parent / name, tmp_path / "compose" / name)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    handler = type("Handler", (Stack,), {"answers": [(200, b'{"count":0}')], "asked": [], "traces": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        port = server.server_address[1]
        (tmp_path / ".curlrc").write_text(f"connect-to = 127.0.0.1:9200:127.0.0.1:{port}\n")

        def run(
            answers: list[tuple[int, bytes]], seconds: int, container: str = "abc", running: str = "true", **environment: str
        ) -> tuple[subprocess.CompletedProcess[str], type[Stack]]:
            handler.answers = answers
            (tmp_path / "container").write_text(container)
            (tmp_path / "running").write_text(running)
            done = subprocess.run(
                ["sh", str(tmp_path / "compose" / "scripts" / "smoke.sh"), str(seconds)],
                env={
                    "PATH": f"{tmp_path}:/usr/bin:/bin",
                    "FAKE": str(tmp_path),
                    "CURL_HOME": str(tmp_path),
                    "API_PORT": str(port),
                    "ELASTIC_PASSWORD": "secret",
                    **environment,
                },
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return done, handler

        yield run
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("container", "running"), [("", ""), ("abc", "false")], ids=["none", "stopped"])
def test_the_smoke_test_is_content_with_the_database_where_elasticsearch_does_not_run(
    smoke: Callable[..., Any], container: str, running: str
) -> None:
    done, stack = smoke([], 0, container, running)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"order {ORDER_ID}: confirmed\n", "")
    assert stack.asked == []


def test_the_smoke_test_waits_until_elasticsearch_has_the_trace(smoke: Callable[..., Any], tmp_path: Path) -> None:
    done, stack = smoke(
        [(200, b'{"count":0}'), (200, b'{"count":7,"_shards":{"total":1}}')], 30, OTEL_ENDPOINT="http://collector:4318"
    )
    assert done.returncode == 0, done.stderr
    (parent,) = stack.traces
    version, trace, span, flags = parent.split("-")
    assert (version, len(trace), len(span), flags) == ("00", 32, 16, "01")
    who = "Basic " + base64.b64encode(b"elastic:secret").decode()
    assert stack.asked == [("/traces-*/_count", f"trace_id:{trace}", who)] * 2
    assert done.stdout.splitlines()[1] == f"order {ORDER_ID}: Elasticsearch has its trace {trace}, 7 documents"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(" --profile core --profile elastic exec -T elasticsearch sh -c curl " in call for call in calls) == 2
    assert not any("secret" in call for call in calls)


@pytest.mark.parametrize("endpoint", ["", "http://elsewhere:4318"])
def test_the_smoke_test_asks_for_metrics_where_traces_go_nowhere_or_elsewhere(smoke: Callable[..., Any], endpoint: str) -> None:
    done, stack = smoke([(200, b'{"count":2}')], 0, OTEL_ENDPOINT=endpoint)
    assert done.returncode == 0, done.stderr
    ((path, query, _),) = stack.asked
    assert path == "/metrics-*/_count"
    assert set(re.findall(r"([a-z_.]+):", query)) - {"timestamp"} <= fields_of_metrics()
    assert re.fullmatch(r'.* AND @timestamp:\["\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ" TO \*\]', query)


@pytest.mark.parametrize(
    "answer", [(200, b'{"count":0}'), (401, b'{"error":"unable to authenticate"}')], ids=["nothing", "refused"]
)
def test_the_smoke_test_fails_where_elasticsearch_has_not_heard_of_the_order(
    smoke: Callable[..., Any], answer: tuple[int, bytes]
) -> None:
    done, stack = smoke([answer], 0, OTEL_ENDPOINT="http://collector:4318")
    assert done.returncode == 1
    assert len(stack.asked) == 1
    trace = stack.traces[0].split("-")[1]
    assert done.stderr.startswith(
        f"order {ORDER_ID}: Elasticsearch does not have its trace {trace}; it answers: {answer[1].decode()};"
    )


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


# Logstash


class LogstashFile:
    """A pipeline of Logstash, read: the plugins of each section with their settings, and the conditions. Raises ValueError where it can't be."""

    TOKEN = re.compile(r"""\s+|#.*|("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|=>|[=!<>]=|[=!]~|[{}\[\]()!,<>]|[\w.@-]+)""")

    def __init__(self, text: str) -> None:
        self.plugins: list[tuple[str, str, dict[str, Any]]] = []
        self.conditions: list[str] = []
        self._left: list[str] = []
        place = 0
        while place < len(text):
            token = self.TOKEN.match(text, place)
            if token is None:
                raise ValueError(f"nothing begins like this: {text[place : place + 20]!r}")
            place = token.end()
            self._left += [token[1]] if token[1] else []
        while self._left:
            section = self._take()
            if section not in ("input", "filter", "output"):
                raise ValueError(f"there is no section {section!r}")
            self._block(section)

    def _take(self, wanted: str = "") -> str:
        if not self._left or wanted not in ("", self._left[0]):
            raise ValueError(f"there is {' '.join(self._left[:5])!r} instead of {wanted or 'more'!r}")
        return self._left.pop(0)

    def _is_next(self, wanted: str) -> bool:
        return self._left[:1] == [wanted]

    def _block(self, section: str) -> None:
        self._take("{")
        while not self._is_next("}"):
            name = self._take()
            if name in ("if", "else"):
                condition = []
                while not self._is_next("{"):
                    condition.append(self._take())
                self.conditions.append("".join(condition))
                self._block(section)
            else:
                self.plugins.append((section, name, self._settings()))
        self._take("}")

    def _settings(self) -> dict[str, Any]:
        found = {}
        self._take("{")
        while not self._is_next("}"):
            name = self._take().strip("\"'")
            self._take("=>")
            found[name] = self._value()
        self._take("}")
        return found

    def _value(self) -> Any:
        if self._is_next("{"):
            return self._settings()
        if not self._is_next("["):
            return self._take().strip("\"'")
        self._take("[")
        values = [self._value()]
        while not self._is_next("]"):
            self._take(",")
            values.append(self._value())
        self._take("]")
        return values


LOGSTASH = (FOLDER / "logstash.conf").read_text()
OF_LOGSTASH: dict[tuple[str, str], set[str]] = {
    ("input", "file"): {
        *(
            "path",
            "codec",
            "mode",
            "start_position",
            "sincedb_path",
            "sincedb_write_interval",
            "stat_interval",
            "discover_interval",
        ),
        *(
            "close_older",
            "delimiter",
            "exclude",
            "ignore_older",
            "max_open_files",
            "file_chunk_size",
            "file_chunk_count",
            "tags",
            "id",
        ),
    },
    ("filter", "mutate"): {
        "copy",
        "rename",
        "remove_field",
        "add_field",
        "replace",
        "update",
        "convert",
        "gsub",
        "add_tag",
        "id",
    },
    ("filter", "json"): {"source", "target", "skip_on_invalid_json", "tag_on_failure", "ecs_compatibility", "id"},
    ("filter", "drop"): {"percentage", "id"},
    ("filter", "ruby"): {"code", "init", "path", "script_params", "tag_on_exception", "id"},
    ("output", "elasticsearch"): {
        *(
            "hosts",
            "user",
            "password",
            "api_key",
            "index",
            "pipeline",
            "timeout",
            "id",
            "ssl_enabled",
            "ssl_certificate_authorities",
        ),
        *("data_stream", "data_stream_type", "data_stream_dataset", "data_stream_namespace", "data_stream_auto_routing"),
    },
}
"""What Logstash 8 and 9 bring with them, as far as it is of use here: plugins, and settings of each."""


def test_the_pipeline_uses_plugins_and_settings_that_logstash_has() -> None:
    plugins = LogstashFile(LOGSTASH).plugins
    assert [(section, name) for section, name, _ in plugins] == list(OF_LOGSTASH)
    for section, name, settings in plugins:
        assert settings.keys() <= OF_LOGSTASH[section, name], name


@pytest.mark.parametrize(
    "damaged",
    [
        LOGSTASH.rstrip().removesuffix("}"),
        LOGSTASH.replace("drop {}", "drop {"),
        LOGSTASH.replace("drop {}", "drop"),
        LOGSTASH.replace("mode => ", "mode = "),
        LOGSTASH.replace('"tail"', '"tail'),
        LOGSTASH.replace("output {", "outputs {"),
        LOGSTASH + "}",
    ],
    ids=["end", "open", "no-block", "arrow", "quote", "section", "one-more"],
)
def test_a_damaged_pipeline_would_be_noticed(damaged: str) -> None:
    assert damaged != LOGSTASH
    with pytest.raises(ValueError, match=r"^nothing begins|^there is"):
        LogstashFile(damaged)


def test_only_what_our_services_say_is_stored() -> None:
    """Elasticsearch, Kibana and Metricbeat write lines of the common schema, too: a line for each that is stored would never end."""
    (condition,) = LogstashFile(LOGSTASH).conditions
    refused = re.fullmatch(
        r"!\[@metadata\]\[parsed\]\[ecs\.version\]or\[@metadata\]\[parsed\]\[service\.name\]notin\[(.*)\]", condition
    )
    assert refused is not None
    that_run = [name for name, one in SERVICES.items() if "ORDERBUS_IMAGE" in one["image"] and one["restart"] != "no"]
    assert refused[1].replace('"', "").split(",") == [name_in_logs(name) for name in that_run]
    assert sorted(that_run) == sorted(OURS)


def name_in_logs(service: str) -> str:
    """What a service of docker-compose.yml calls itself: as it is told, or its bus's group."""
    named: str | None = SERVICES[service]["environment"].get("OTEL_SERVICE_NAME")
    if named is not None:
        return named
    (module,) = [part.removesuffix(":bus") for part in SERVICES[service]["command"] if part.endswith(":bus")]
    group: str = importlib.import_module(module).bus.group
    return group


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
