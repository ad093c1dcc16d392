"""What can be checked of the profile elastic where it can't be run: its files, and that what they refer to is really emitted."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from compose.elastic.build import FOLDER, ndjson
from tests.faults.world import ROOT
from tests.services.test_alerts import listed
from tests.services.test_compose import OURS, SERVICES

SOURCE: dict[str, Any] = yaml.safe_load((FOLDER / "dashboards.yml").read_text())
PANELS = [(dashboard["id"], panel) for dashboard in SOURCE["dashboards"] for panel in dashboard["panels"]]
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
OF_QUEUES = {
    "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_detailed_queue_messages_unacked",
    "rabbitmq_detailed_queue_consumers",
    "rabbitmq_detailed_channel_messages_acked_total",
}
"""Seen on a real one: test_the_broker_has_the_metrics_that_alerts_and_dashboards_rest_on."""


def objects() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "dashboards.ndjson").read_text().splitlines()]


def test_the_saved_objects_are_those_of_the_source() -> None:
    assert (FOLDER / "dashboards.ndjson").read_text() == ndjson(), "run python -m compose.elastic.build"


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
    known = listed()
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in known} | known.keys() | OF_QUEUES
    labels = {label for of_one in known.values() for label in of_one} | {"queue", "vhost"}
    for field in fields(panel):
        if panel["index"] == "metrics":
            kind, _, name = field.partition(".")
            assert name in {"metrics": names, "attributes": labels}[kind], field
        elif panel["index"] == "logs":
            assert field in OF_LOGS
        else:
            assert field in OF_SPANS or field.removeprefix("attributes.") in attributes_of_spans(), field


def fields(panel: dict[str, Any]) -> set[str]:
    """Every field that a panel names: of its lines, of what they are split by, of its query."""
    of_lines = {line[part] for line in panel["lines"] for part in ("field", "by") if part in line}
    return of_lines | set(re.findall(r"([\w@.]+):", panel.get("query", "")))


def attributes_of_spans() -> set[str]:
    page = (ROOT / "docs" / "telemetry.md").read_text().partition("## Metrics")[0]
    return set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)`", page))


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


@pytest.mark.parametrize("name", ["collector.yml", "metricbeat.yml", "logstash.conf"])
def test_a_file_reads_only_variables_that_its_container_has(name: str) -> None:
    text = (FOLDER / name).read_text()
    (service,) = [one for one in SERVICES.values() if any(name in volume for volume in one.get("volumes", ()))]
    assert set(re.findall(r"\$\{(?:env:)?([A-Z_]+)\}", text)) <= service["environment"].keys()


@pytest.mark.parametrize("name", ["metricbeat.yml", "logstash.conf", "collector.yml"])
def test_a_file_speaks_only_to_servers_of_the_stack(name: str) -> None:
    hosts = set(re.findall(r"//([a-z][a-z-]*):\d+", (FOLDER / name).read_text()))
    assert hosts <= SERVICES.keys()
