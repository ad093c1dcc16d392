"""rules.yml to what Kibana's alerting API takes: a rule of the kind "custom threshold" each, in Kibana 8.13 and later.

A rule has no action of its own: who is told, and how, is added in Kibana, and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

PAGE = "https://github.com/orderbus/orderbus/blob/main/docs/operations.md"
DATA = "orderbus-data-metrics"
"""The data view that goes with the dashboards."""
KINDS = {"percentile 99": "p99", "max": "max", "min": "min", "sum": "sum", "count": "count"}
CONDITION = re.compile(r"(?P<equation>[A-Z][A-Z /*+()-]*) (?P<comparator>[<>]=?) (?P<threshold>[0-9.]+)")


def rules(source: Mapping[str, Any]) -> dict[str, str]:
    """The body of each rule's creation, by the name of its file: the alert's, and the rule's id."""
    return {f"{one['alert']}_{one['id']}.json": json.dumps(_rule(one), indent=2) + "\n" for one in source["rules"]}


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    conditions = [rule["fires"]] if isinstance(rule["fires"], str) else rule["fires"]
    params: dict[str, Any] = {
        "criteria": [_criterion(rule, condition) for condition in conditions],  # Kibana fires where all of them are true
        "alertOnNoData": False,
        "alertOnGroupDisappear": False,
        "searchConfiguration": {"index": DATA, "query": {"query": rule.get("query", ""), "language": "kuery"}},
    }
    if "by" in rule:
        params["groupBy"] = [rule["by"]]
    return {
        "name": f"orderbus {rule['alert']}: {rule['title']}",
        "tags": ["orderbus", f"{PAGE}#{rule['alert'].lower()}"],
        "rule_type_id": "observability.rules.custom_threshold",
        "consumer": "stackAlerts",
        "schedule": {"interval": "1m"},
        "params": params,
        "actions": [],
    }


def _criterion(rule: Mapping[str, Any], text: str) -> dict[str, Any]:
    condition = CONDITION.fullmatch(text)
    if condition is None:
        raise ValueError(f"{rule['alert']}: 'fires: {text}' should look like 'A / B > 0.001'")
    return {
        "metrics": [_metric(name, of) for name, of in rule["of"].items() if name in condition["equation"]],
        "equation": condition["equation"],
        "comparator": condition["comparator"],
        "threshold": [float(condition["threshold"])],
        "timeSize": int(rule["over"][:-1]),
        "timeUnit": rule["over"][-1],
    }


def _metric(name: str, of: Mapping[str, str]) -> dict[str, str]:
    found = {"name": name, "aggType": KINDS[of["take"]]}
    return found | ({"filter": of["query"]} if of["take"] == "count" else {"field": of["field"]})
