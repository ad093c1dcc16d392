"""`python -m compose.elastic.build`: dashboards.yml to dashboards.ndjson, which Kibana imports from 8.9 on (9 as well), and rules.yml to rules/.

A panel of lines is a TSVB visualization and one of text a Markdown visualization, both held by the dashboard itself; a panel with columns is a
saved search beside it. A data view for each index goes with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from compose.elastic.rules import rules

FOLDER = Path(__file__).parent
COLOURS = ("#1f6feb", "#2da44e", "#bf8700", "#cf222e")
UNITS = {"number": "number", "s": "s,humanize,2", "ms": "ns,ms,1", "cents": "number"}
WIDTH, HEIGHT = 24, 12


def saved_objects(source: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, pattern in source["indices"].items():
        yield {
            "id": f"orderbus-data-{name}",
            "type": "index-pattern",
            "attributes": {"title": pattern, "name": f"orderbus {name}", "timeFieldName": "@timestamp"},
            "references": [],
        }
    for dashboard in source["dashboards"]:
        for number, panel in enumerate(dashboard["panels"]):
            if "columns" in panel:
                yield _search(panel, f"{dashboard['id']}-{number}")
        yield _dashboard(dashboard, source["indices"])


def _dashboard(dashboard: Mapping[str, Any], indices: Mapping[str, str]) -> dict[str, Any]:
    panels = [_panel(panel, number, dashboard["id"], indices) for number, panel in enumerate(dashboard["panels"])]
    searches = [number for number, panel in enumerate(dashboard["panels"]) if "columns" in panel]
    return {
        "id": dashboard["id"],
        "type": "dashboard",
        "attributes": {
            "title": f"orderbus: {dashboard['title']}",
            "description": "Made from compose/elastic/dashboards.yml",
            "panelsJSON": json.dumps(panels),
            "optionsJSON": json.dumps({"useMargins": True, "syncColors": False, "hidePanelTitles": False}),
            "timeRestore": True,
            "timeFrom": "now-30m",
            "timeTo": "now",
            "refreshInterval": {"pause": False, "value": 10_000},
            "kibanaSavedObjectMeta": {
                "searchSourceJSON": json.dumps({"query": {"query": "", "language": "kuery"}, "filter": []})
            },
        },
        "references": [
            {"name": f"{number}:panel_{number}", "type": "search", "id": f"{dashboard['id']}-{number}"} for number in searches
        ],
        "coreMigrationVersion": "8.8.0",
        "typeMigrationVersion": "8.9.0",  # an older Kibana refuses what is of a later version than it knows
    }


def _panel(panel: Mapping[str, Any], number: int, dashboard: str, indices: Mapping[str, str]) -> dict[str, Any]:
    place = {"x": WIDTH * (number % 2), "y": HEIGHT * (number // 2), "w": WIDTH, "h": HEIGHT, "i": str(number)}
    found: dict[str, Any] = {"type": "visualization", "gridData": place, "panelIndex": str(number)}
    if "columns" in panel:
        found |= {"type": "search", "panelRefName": f"panel_{number}", "embeddableConfig": {"enhancements": {}}}
    else:
        is_text = "markdown" in panel
        visualization = {
            "title": panel["title"],
            "type": "markdown" if is_text else "metrics",
            "params": _text(panel) if is_text else _lines(panel, indices[panel["index"]], f"{dashboard}-{number}"),
            "uiState": {},
            "data": {"aggs": [], "searchSource": {"query": {"query": "", "language": "kuery"}, "filter": []}},
        }
        found["embeddableConfig"] = {"savedVis": visualization, "enhancements": {}}
    return found | {"title": panel["title"]}


def _text(panel: Mapping[str, Any]) -> dict[str, Any]:
    return {"fontSize": 12, "openLinksInNewTab": True, "markdown": panel["markdown"].strip()}


def _search(panel: Mapping[str, Any], ident: str) -> dict[str, Any]:
    index = "kibanaSavedObjectMeta.searchSourceJSON.index"
    query = {"query": panel.get("query", ""), "language": "kuery"}
    return {
        "id": ident,
        "type": "search",
        "attributes": {
            "title": f"orderbus: {panel['title']}",
            "description": "Made from compose/elastic/dashboards.yml",
            "columns": panel["columns"],
            "sort": [[panel["largest"], "desc"]],
            "kibanaSavedObjectMeta": {"searchSourceJSON": json.dumps({"query": query, "filter": [], "indexRefName": index})},
        },
        "references": [{"name": index, "type": "index-pattern", "id": f"orderbus-data-{panel['index']}"}],
        "coreMigrationVersion": "8.8.0",
        "typeMigrationVersion": "7.9.3",
    }


def _lines(panel: Mapping[str, Any], pattern: str, ident: str) -> dict[str, Any]:
    return {
        "id": ident,
        "type": "timeseries",
        "series": [_line(line, panel, f"{ident}-{n}", COLOURS[n % len(COLOURS)]) for n, line in enumerate(panel["lines"])],
        "use_kibana_indexes": False,
        "index_pattern": pattern,
        "time_field": "@timestamp",
        "time_range_mode": "entire_time_range",
        "interval": ">=10s",
        "filter": {"query": panel.get("query", ""), "language": "kuery"},
        "axis_position": "left",
        "axis_formatter": "number",
        "axis_scale": "normal",
        "axis_min": "0",
        "show_legend": 1,
        "show_grid": 1,
        "tooltip_mode": "show_all",
        "drop_last_bucket": 1,
        "isModelInvalid": False,
    }


def _line(line: Mapping[str, Any], panel: Mapping[str, Any], ident: str, colour: str) -> dict[str, Any]:
    split = {"split_mode": "everything"}
    if "by" in line:
        split = {"split_mode": "terms", "terms_field": line["by"], "terms_size": "20", "terms_order_by": "_count"}
    return {
        "id": ident,
        "label": line["label"] if "by" not in line else "",
        "color": colour,
        "palette": {"type": "palette", "name": "default"},
        "metrics": _metrics(line, f"{ident}-metric"),
        "separate_axis": 0,
        "axis_position": "right",
        "formatter": UNITS[panel.get("unit", "number")],
        "chart_type": "line",
        "line_width": 2,
        "point_size": 0,
        "fill": 0,
        "stacked": "none",
        **split,
    }


def _metrics(line: Mapping[str, Any], ident: str) -> list[dict[str, Any]]:
    what, _, number = str(line["of"]).partition(" ")
    if what == "percentile":
        percentiles = [{"id": f"{ident}-p", "mode": "line", "shade": 0.2, "value": number, "percentile": ""}]
        return [{"id": ident, "type": "percentile", "field": line["field"], "percentiles": percentiles}]
    kind = {"rate": "sum", "max": "max", "average": "avg", "sum": "sum", "count": "value_count" if "field" in line else "count"}[
        what
    ]
    found: list[dict[str, Any]] = [{"id": ident, "type": kind}]
    if "field" in line:
        found[0]["field"] = line["field"]
    if "rate" in (what, number):  # the collector says what is new since the last scrape; the interval is in ms
        variables = [{"id": f"{ident}-v", "name": "new", "field": ident}]
        found.append(
            {"id": f"{ident}-s", "type": "math", "variables": variables, "script": "params.new / params._interval * 1000"}
        )
    return found


def ndjson() -> str:
    return "".join(json.dumps(one) + "\n" for one in saved_objects(read("dashboards.yml")))


def read(name: str) -> dict[str, Any]:
    source: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return source


if __name__ == "__main__":
    (FOLDER / "dashboards.ndjson").write_text(ndjson(), encoding="utf-8")
    for name, text in rules(read("rules.yml")).items():
        (FOLDER / "rules" / name).write_text(text, encoding="utf-8")
