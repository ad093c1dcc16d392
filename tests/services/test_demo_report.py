"""The curves of the demo's report: what they are made of, how they are drawn, and that they are those of the dashboards."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import anyio
import msgspec
import psycopg
import pytest

from compose.elastic.build import read
from orderbus import Bus, Settings
from orderbus.adapters import memory, rabbitmq
from services import aggregator, payment
from services.demo import curves, queues
from services.demo.curves import CHARTS
from services.demo.page import charts, ticks
from services.demo.processes import Child
from services.demo.shop import SERVICES
from services.demo.watch import Sample, Watcher
from tests.services.shop import order

LIMIT_S = 20.0
SECONDS = [100, 101, 102]


class Shown(msgspec.Struct, frozen=True):
    """A panel's charts in the report."""

    charts: tuple[str, ...]


class Missing(msgspec.Struct, frozen=True):
    """Why the report has no chart for a panel."""

    why: str


SPANS = Missing("spans go to a trace store, and the demo runs without one")
MANAGEMENT = Missing(
    "a client of the broker can ask only for what is ready; the rest is for its management plugin, which need not run"
)

PANELS: dict[tuple[str, str], Shown | Missing] = {
    ("orderbus-performance", "POST /orders, latency"): Shown(("API latency, ms",)),
    ("orderbus-performance", "Orders finished a second"): Shown(("Orders finished per second, by status",)),
    ("orderbus-performance", "End to end"): Shown(("End to end, ms",)),
    ("orderbus-performance", "Answers a second, by status"): Shown(
        ("API answers per second, by status", "API errors, % of requests")
    ),
    ("orderbus-performance", "Handled a second, by consumer"): Shown(("Handled per second, by consumer",)),
    ("orderbus-performance", "Lag, by consumer"): Shown(("Lag p99, ms, by consumer",)),
    ("orderbus-performance", "Outbox, age of the oldest"): Shown(("Outbox, age of the oldest, s",)),
    ("orderbus-performance", "Errors and warnings in the logs"): Shown(("Errors and warnings in the logs, per second",)),
    ("orderbus-queues", "Ready"): Shown(("Ready, by queue",)),
    ("orderbus-queues", "Unacknowledged"): MANAGEMENT,
    ("orderbus-queues", "Consumers"): MANAGEMENT,
    ("orderbus-queues", "Acknowledged a second"): MANAGEMENT,
    ("orderbus-queues", "Dead letters"): Shown(("Dead letters, by queue",)),
    ("orderbus-queues", "Retried a second, by error"): Missing("the classes are in a counter that nobody scrapes here"),
    ("orderbus-queues", "Parked a second, by reason"): Missing(
        "the reasons are in a counter that nobody scrapes here; how much is parked, and where, is in the chart of the dead letters"
    ),
    ("orderbus-traces", "Spans a second, by service"): SPANS,
    ("orderbus-traces", "Duration p99, by span"): SPANS,
    ("orderbus-traces", "Failed spans, by name"): SPANS,
    ("orderbus-traces", "Tries by their outcome"): SPANS,
    ("orderbus-traces", "The slowest spans (duration in ns)"): SPANS,
    ("orderbus-traces", "Service map"): SPANS,
    ("orderbus-business", "Orders under way"): Shown(("Waiting",)),
    ("orderbus-business", "Orders a second, by status"): Shown(("Orders finished per second, by status",)),
    ("orderbus-business", "Declined and rejected, by reason"): Shown(("Orders cancelled per second, by reason",)),
    ("orderbus-business", "Revenue a second"): Shown(("Revenue per second, cents",)),
    ("orderbus-business", "Stock"): Shown(("Stock, pieces of all articles", "Stock, pieces of the scarcest article")),
}

OF_THE_REPORT_ALONE = {"Orders per second"}


def test_every_panel_of_the_dashboards_has_its_chart_or_a_reason() -> None:
    panels = {(one["id"], panel["title"]) for one in read("dashboards.yml")["dashboards"] for panel in one["panels"]}
    assert PANELS.keys() == panels
    shown = {title for found in PANELS.values() if isinstance(found, Shown) for title in found.charts}
    assert [chart.title for chart in CHARTS if chart.title not in shown] == sorted(OF_THE_REPORT_ALONE)
    assert shown <= {chart.title for chart in CHARTS}


# Curves


def test_the_axis_has_every_second_between_the_first_and_the_last() -> None:
    assert curves.axis([102], {100: "x"}) == SECONDS
    assert curves.axis([], {}) == []


def test_throughput_is_0_and_a_latency_unknown_where_there_was_nothing() -> None:
    found = curves.speed(SECONDS, [(100, 2, 0, None, None), (102, 1, 3, 5.0, 9.0)], {100: [1.0, 3.0]})
    assert found == {
        "Orders per second": {"accepted": [2, 0, 1], "completed": [0, 0, 3]},
        "API latency, ms": {"p50": [3.0, None, None], "p99": [3.0, None, None]},
        "End to end, ms": {"p50": [None, None, 5.0], "p99": [None, None, 9.0]},
    }


def test_what_became_of_the_orders() -> None:
    rows = [
        (100, "confirmed", "none", 2, 700.0),
        (102, "cancelled", "over-limit", 1, 0.0),
        (102, "cancelled", "deadline", 4, 0.0),
    ]
    assert curves.business(SECONDS, rows) == {
        "Orders finished per second, by status": {"cancelled": [0, 0, 5], "confirmed": [2, 0, 0]},
        "Orders cancelled per second, by reason": {"deadline": [0, 0, 4], "over-limit": [0, 0, 1]},
        "Revenue per second, cents": {"revenue": [700.0, 0, 0]},
    }


def test_answers_that_are_not_a_created_order_are_errors() -> None:
    assert curves.answers(SECONDS, {100: {"201": 8, "200": 1, "503": 3}, 102: {"none": 1}}) == {
        "API answers per second, by status": {"201": [8, 0, 0], "503": [3, 0, 0], "200": [1, 0, 0], "none": [0, 0, 1]},
        "API errors, % of requests": {"failed": [25.0, None, 100.0]},
    }


def test_what_was_looked_at_has_no_value_where_nobody_looked() -> None:
    samples = {100: Sample(5, 3, 7, 0.5, 900, 10), 102: Sample(9, 9, 0, 0.0, 800, 0)}
    depths = {101: {"a": 0, "a.dlq": 0, "b": 4, "b.dlq": 1}}
    assert curves.watched(SECONDS, samples, depths) == {
        "Waiting": {"orders pending": [2, None, 0], "rows in the outbox": [7, None, 0]},
        "Outbox, age of the oldest, s": {"oldest": [0.5, None, 0.0]},
        "Ready, by queue": {"b": [None, 4, None]},
        "Dead letters, by queue": {"b.dlq": [None, 1, None]},
        "Stock, pieces of all articles": {"all": [900, None, 800]},
        "Stock, pieces of the scarcest article": {"scarcest": [10, None, 0]},
    }


@pytest.mark.parametrize("as_json", [True, False])
def test_errors_and_warnings_are_found_in_the_lines_of_machines_and_of_people(as_json: bool) -> None:
    program = f"""
import logging
from orderbus.logs import configure
configure("x", as_json={as_json})
logging.info("fine")
logging.warning("odd")
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("ERROR of a kind")
"""
    began = int(time.time())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=30)
    seconds = list(range(began, int(time.time()) + 1))
    lines = [*(done.stdout + done.stderr).splitlines(), b'{"event": "drained"}', b"{ not JSON", b"\xff"]
    found = curves.logged(seconds, {"payment": lines, "inventory": [b"fine"]})["Errors and warnings in the logs, per second"]
    assert found.keys() == {"payment"}
    assert sum(value or 0 for value in found["payment"]) == 2


# Rows


@pytest.fixture
def connection(shop_database_url: str) -> Any:
    with psycopg.connect(shop_database_url, autocommit=True) as connection:
        yield connection


def put_order(
    connection: psycopg.Connection[Any],
    number: int,
    *,
    status: str,
    reason: str | None = None,
    cents: int = 100,
    ended_at: float = 0,
) -> None:
    connection.execute(
        "insert into orders (order_id, customer_id, total_cents, lines, status, reason, placed_at, finished_at)"
        " values (%s, %s, %s, '[]', %s, %s, to_timestamp(100.25), %s)",
        (UUID(int=number), UUID(int=1), cents, status, reason, datetime.fromtimestamp(ended_at, UTC) if ended_at else None),
    )


@pytest.mark.servers
def test_the_database_tells_what_was_placed_and_finished_in_each_second(connection: psycopg.Connection[Any]) -> None:
    put_order(connection, 1, status="confirmed", cents=300, ended_at=100.75)
    put_order(connection, 2, status="confirmed", cents=400, ended_at=102.0)
    put_order(connection, 3, status="cancelled", reason="over-limit", cents=900, ended_at=102.5)
    put_order(connection, 4, status="pending")

    assert curves.speed_rows(connection) == [(100, 4, 1, 500.0, 500.0), (102, 0, 2, 2000.0, 2245.0)]
    assert curves.finished_rows(connection) == [
        (100, "confirmed", "none", 1, 300.0),
        (102, "cancelled", "over-limit", 1, 0.0),
        (102, "confirmed", "none", 1, 400.0),
    ]


@pytest.mark.servers
def test_the_inbox_tells_what_each_consumer_handled_and_how_late(connection: psycopg.Connection[Any]) -> None:
    def handled(consumer: str, emitted_ms: int, at: float, number: int) -> None:
        event_id = UUID(int=(emitted_ms << 80) | (7 << 76) | (2 << 62) | number)
        connection.execute("insert into orderbus.consumer (name) values (%s) on conflict do nothing", (consumer,))
        connection.execute(
            "insert into orderbus.inbox (event_id, consumer, body_hash, handled_at)"
            " select %s, id, 0, to_timestamp(%s) from orderbus.consumer where name = %s",
            (event_id, at, consumer),
        )

    handled("payment", 100_000, 100.25, 1)
    handled("payment", 101_990, 102.25, 2)
    handled("stock", 102_500, 102.25, 3)  # of a clock that is ahead

    rows = curves.handled_rows(connection)
    assert [(second, name, n, round(p99)) for second, name, n, p99 in rows] == [
        (100, "payment", 1, 250),
        (102, "payment", 1, 260),
        (102, "stock", 1, 0),
    ]
    found = curves.consumers(SECONDS, rows)
    assert found["Handled per second, by consumer"] == {"payment": [1, 0, 1], "stock": [0, 0, 1]}
    assert found["Lag p99, ms, by consumer"]["stock"] == [None, None, 0]


@pytest.mark.servers
def test_the_watcher_asks_once_a_second(connection: psycopg.Connection[Any]) -> None:
    put_order(connection, 1, status="confirmed", ended_at=101)
    put_order(connection, 2, status="pending")
    connection.execute("update stock set available = 7 where sku = 'article-00001'")
    watcher = Watcher(connection)

    assert watcher.look() == Sample(placed=2, finished=1, outbox_rows=0, outbox_age_s=0.0, pieces=407, scarcest=7)

    connection.execute(
        "insert into orderbus.outbox (bucket, event_id, topic, body, content_type, headers, unrouted, created_at)"
        " values (1, gen_random_uuid(), 'a.b', '', 'x', '{}', 'drop', now() - interval '1 hour')"
    )
    until(lambda: watcher.look().outbox_rows == 1, "a second in which it looks again")
    assert 3600 <= watcher.look().outbox_age_s < 3660
    seen = [watcher.look() for _ in range(50)]
    assert len({id(one) for one in seen}) <= len(watcher.samples)


def until(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


# Queues


def test_the_queues_are_those_of_all_services() -> None:
    found = queues.consumed(SERVICES)
    assert set(queues.of_buses([payment.bus, aggregator.bus])) < set(found)
    assert "notification.orders.confirmed" in found
    assert sorted(name.removesuffix(".dlq") for name in found if name.endswith(".dlq")) == [
        name for name in found if not name.endswith(".dlq")
    ]


async def place_one(broker_url: str, broker: Any) -> None:
    """An order that waits in the payment's queue."""
    await broker.apply(payment.bus.topology())
    async with Bus("load", settings=Settings(broker_url=broker_url)) as bus:
        await bus.publish(order(1))


@pytest.mark.servers
def test_rabbitmq_is_asked_for_the_depths_until_it_has_all_queues(shop_vhost_url: str) -> None:
    async def prepare() -> None:
        async with rabbitmq.open_broker(shop_vhost_url, name="tests") as broker:
            await place_one(shop_vhost_url, broker)

    names = queues.of_buses([payment.bus])
    with queues.watching(shop_vhost_url, names) as watch:
        assert watch is not None
        watch.look()
        anyio.run(prepare)

        def seen() -> bool:
            watch.look()
            return any(depths["payment.orders.placed"] == 1 for depths in watch.depths.values())

        until(seen, "an answer with the order that waits")
    assert all(depths.keys() == set(names) for depths in watch.depths.values())


def test_nobody_is_asked_without_queues_or_from_outside_of_a_process() -> None:
    for url, names in (("amqp://127.0.0.1:1/", []), ("memory://demo", ["payment.orders.placed"])):
        with queues.watching(url, names) as watch:
            assert watch is None


@pytest.mark.anyio
async def test_a_process_tells_of_the_broker_inside_it(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    async with memory.open_broker("memory://test-demo-report", name="tests") as broker:
        await place_one("memory://test-demo-report", broker)
        async with queues.telling(broker, queues.of_buses([payment.bus])):
            with anyio.fail_after(LIMIT_S):
                while not said:
                    await anyio.sleep(0.01)
                    said += capsys.readouterr().out.splitlines()

    depths = queues.told([{"event": "drained"}, *map(msgspec.json.decode, said)])
    assert [found["payment.orders.placed"] for found in depths.values()] == [1]
    assert all(abs(time.time() - second) < LIMIT_S for second in depths)


def test_a_child_hands_over_its_lines_by_their_kind(tmp_path: Any) -> None:
    program = """print('{"event": "queues", "second": 7, "ready": {"a": 1}}'); print('{"event": "drained"}'); print("x")"""
    child = Child("one", ["-c", program], {}, tmp_path)
    child.start()
    assert child.wait(LIMIT_S) == 0
    assert queues.told(child.told("queues")) == {7: {"a": 1}}
    assert child.receipts() == [{"event": "drained"}]
    assert child.lines()[-1] == b"x"


# Drawing


def test_a_chart_without_data_is_left_out_with_a_word() -> None:
    page = charts(
        SECONDS, {"Orders per second": {"accepted": [1, 2, 3]}, "API errors, % of requests": {"failed": [0.0, None, 0.0]}}
    )
    assert page.count("<svg") == 1
    assert "<li>API errors, % of requests: every request was answered with 200 or 201</li>" in page
    assert re.findall("<h2>(.*?)</h2>", page) == ["Orders per second", "Without a curve"]
    assert page.count("<li>") == len(CHARTS) - 1


def test_every_curve_has_its_line_and_one_point_is_a_dot() -> None:
    page = charts(SECONDS, {"Ready, by queue": {"a": [1, 2, 0], "b": [None, 5, None], "<c>": [4, None, 4]}})
    assert page.count("<polyline") == 2
    assert page.count("<circle") == 1
    assert "&lt;c&gt;</text>" in page
    assert "<c>" not in page


def test_names_in_a_legend_do_not_run_into_each_other_or_over_the_edge() -> None:
    names = [f"a-rather-long-name.orders.number-{n}" for n in range(9)]
    page = charts(SECONDS, {"Ready, by queue": {name: [n + 1.0] * 3 for n, name in enumerate(names)}})
    _, _, width, height = map(float, re.search(r'viewBox="([\d. ]+)"', page)[1].split())  # type: ignore[index]
    at = [(float(x), float(y), text) for x, y, text in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">([^<]+)</text>', page)]
    assert [text for *_, text in at] == names
    for (x, y, text), (next_x, next_y, _) in zip(at, [*at[1:], (0.0, height, "")], strict=True):
        assert x + 6.5 * len(text) < width
        assert next_y > y or next_x > x + 6.5 * len(text) + 18
    first_line = min(float(y) for y in re.findall(r'<line [^>]*y1="([\d.]+)"', page))
    assert first_line > max(y for _, y, _ in at)


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 2210, [0, 500, 1000, 1500, 2000, 2500]),
        (98_999_000, 99_000_100, [98_999_000, 98_999_200, 98_999_400, 98_999_600, 98_999_800, 99_000_000, 99_000_200]),
        (7, 7, [7.0, 8.0]),
        (0, 0.00004, [0, 0.00001, 0.00002, 0.00003, 0.00004]),
    ],
)
def test_an_axis_has_round_marks_around_its_values(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(marks)


def test_only_the_stock_has_an_axis_that_does_not_begin_at_0_and_says_so() -> None:
    assert [(chart.title, chart.note) for chart in CHARTS if not chart.from_zero] == [
        ("Stock, pieces of all articles", "The axis does not begin at 0.")
    ]
