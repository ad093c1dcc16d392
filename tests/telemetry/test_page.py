"""How a run is compared with docs/telemetry.md: what is wrong on either side is told."""

from __future__ import annotations

import pytest

from tests.telemetry.page import Entry, attributes_of_spans, differences, listed_metrics, listed_spans, row_of_span

SENT = Entry("counter", "{message}", frozenset({"a", "b"}))


@pytest.mark.parametrize(
    ("seen", "not_provoked", "told"),
    [
        ({"sent": SENT}, (), []),
        ({}, (), ["sent is listed and not emitted"]),
        ({}, ("sent",), []),
        ({"sent": SENT, "lag": SENT}, ("lag",), ["lag is emitted and not listed", "lag is not listed, and need not be excused"]),
        ({"sent": SENT._replace(kind="gauge")}, (), ["sent is a gauge {message}, and listed as a counter {message}"]),
        ({"sent": SENT._replace(unit="s")}, (), ["sent is a counter s, and listed as a counter {message}"]),
        ({"sent": SENT._replace(attributes=frozenset("a"))}, (), ["sent: b is listed and not emitted"]),
        ({"sent": SENT._replace(attributes=frozenset("a"))}, ("sent: b",), []),
        ({"sent": SENT._replace(attributes=frozenset("abc"))}, (), ["sent: c is emitted and not listed"]),
        ({"sent": SENT}, ("sent: c",), ["sent: c is not listed, and need not be excused"]),
    ],
)
def test_every_difference_is_told(seen: dict[str, Entry], not_provoked: tuple[str, ...], told: list[str]) -> None:
    assert differences({"sent": SENT}, seen, dict.fromkeys(not_provoked, "a reason")) == told


def test_every_row_of_the_page_is_read() -> None:
    assert {name.partition(".")[0] for name in listed_metrics()} == {"messaging", "orderbus", "db", "http", "orders"}
    assert {entry.kind for entry in listed_metrics().values()} == {"counter", "up-down counter", "gauge", "histogram"}
    spans = listed_spans()
    assert {entry.kind for entry in spans.values()} == {"producer", "consumer", "internal", "client", "server"}
    assert {one for entry in spans.values() for one in entry.attributes} <= attributes_of_spans()


@pytest.mark.parametrize(
    ("name", "attributes", "row"),
    [
        ("send shop.orders.placed.dlq", {}, "send <topic>"),
        ("process orders.placed", {}, "process <topic>"),
        ("process batch shop.orders.placed", {}, "process batch <queue>"),
        ("settle shop.orders.placed", {}, "settle <queue>"),
        ("every cancel_overdue", {}, "every <function>"),
        ("WITH", {"db.system.name": "postgresql"}, "BEGIN"),
        ("POST /orders", {"http.route": "/orders"}, "<method> <route>"),
        ("sweep", {}, "sweep"),
    ],
)
def test_a_span_is_found_in_the_page_s_table(name: str, attributes: dict[str, object], row: str) -> None:
    assert row_of_span(name, attributes) == row
    assert (row in listed_spans()) == (row != "sweep")
