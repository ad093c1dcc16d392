"""What is measured, under which names; docs/telemetry.md lists the same."""

from __future__ import annotations

import random
import time
from typing import Any
from uuid import UUID

import pytest
from opentelemetry import metrics as api
from opentelemetry.sdk.metrics import ExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import TracerProvider

from orderbus import Delivery, Event, Park, Retry, Tx, UnavailableError
from orderbus._core.ids import uuid7
from orderbus._runtime.metrics import TOLD_TOGETHER, meters
from orderbus.adapters.postgres import open_store
from tests.runtime.world import Log, Noted, Paid, Placed, World, until
from tests.telemetry.page import Entry, differences, listed_metrics

pytestmark = pytest.mark.anyio


class Measured:
    """The metrics of a process, as its exporter would see them."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        self._reader = reader

    def all(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {metric.name: metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics}

    def __call__(self, name: str, **attributes: Any) -> list[Any]:
        """The points of a metric whose attributes have these values, dots written as two underscores."""
        wanted = {key.replace("__", "."): value for key, value in attributes.items()}
        metric = self.all().get(name)
        points = [] if metric is None else metric.data.data_points
        return [point for point in points if wanted.items() <= dict(point.attributes).items()]

    def value(self, name: str, **attributes: Any) -> float:
        (point,) = self(name, **attributes)
        return float(point.value)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    return Measured(reader)


async def run(world: World, measured: Measured) -> dict[str, Any]:
    """A bus that does a little of everything; the metrics of its life."""
    bus, log = world.bus("shop"), Log()

    @bus.on(Placed, retry=Retry.exponential(first=0.1, attempts=2))
    async def pay(event: Placed, delivery: Delivery, tx: Tx) -> Event | None:
        log(event)
        if event.n == 1 and delivery.attempt == 1:
            raise TimeoutError
        if event.n == 2:
            raise Park("fraud")
        return Paid(order=event.order)

    @bus.on(Paid)
    async def ship(event: Paid) -> None:
        log(event)

    async with bus:
        first = await world.send(Placed(order="a"))
        await world.send(Placed(order="a"), event_id=first)
        await world.send(Placed(order="b", n=1))
        await world.send(Placed(order="c", n=2))
        await bus.publish(Paid(order="d"))
        await log.reached(7)
        await until(lambda: bus.stats.handled == 5 and bus.stats.duplicates == 1 and world.parked())
        found = measured.all()
    return {**found, **measured.all()}


def old() -> UUID:
    """Of an event that was emitted a minute ago."""
    return uuid7(time.time_ns() // 1_000_000 - 60_000, random.getrandbits(80))


async def test_counts_are_those_of_the_bus(world: World, measured: Measured) -> None:
    await run(world, measured)

    def handled(outcome: str) -> float:
        return measured.value("orderbus.handled", orderbus__consumer="shop.orders.placed", orderbus__outcome=outcome)

    assert [handled(outcome) for outcome in ("handled", "duplicate", "failed", "retried", "waited")] == [2, 1, 2, 1, 0]
    assert measured.value("orderbus.parked", orderbus__reason="fraud") == 1
    assert measured.value("orderbus.dead_letters", messaging__destination__subscription__name="shop.orders.placed") == 1
    assert measured.value("orderbus.dead_letters", messaging__destination__subscription__name="shop.orders.paid") == 0
    assert measured.value("messaging.client.sent.messages", orderbus__outcome="relayed") == 2
    assert measured.value("messaging.client.sent.messages", orderbus__outcome="published") == 1
    assert measured.value("orderbus.emitted") == 2
    queue = {"messaging__destination__subscription__name": "shop.orders.placed"}
    assert measured.value("messaging.client.consumed.messages", **queue) == 4
    assert measured("orderbus.deliveries.in_hand", **queue) == measured("orderbus.relay.buckets") == []  # of open buses only
    (drain,) = measured("orderbus.drain.duration", orderbus__clean=True)
    assert drain.count == 1


async def test_what_is_recorded_later_is_counted_whole_and_is_no_example_of_the_span_that_is_current_then(
    measured: Measured,
) -> None:
    waits = meters().connection_wait
    for n in range(1000):
        with TracerProvider().get_tracer("tests").start_as_current_span("a request"):
            waits.record(n / 1000, {"db.client.connection.pool.name": "shop"})
    (point,) = measured("db.client.connection.wait_time")
    assert (point.count, point.exemplars) == (1000, [])


@pytest.mark.servers
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_wait_for_a_connection_counts_where_it_was_in_vain_too(measured: Measured, database_url: str) -> None:
    async with open_store(database_url, name="small", pool_size=1, acquire_s=0.05) as store:
        transaction = await store.begin()
        with pytest.raises(UnavailableError, match="stayed in use"):
            await store.begin()
        await transaction.rollback()

    (point,) = measured("db.client.connection.wait_time", db__client__connection__pool__name="small")
    assert point.max >= 0.05


async def test_durations_and_lags_are_recorded_once_a_unit(world: World, measured: Measured) -> None:
    bus, log = world.bus("shop"), Log()

    @bus.on(Placed, fuse=10)
    async def pay(event: Placed) -> None:
        log(event)

    async with bus:
        await world.broker.publish([world.message(Placed(order=str(n)), old()) for n in range(10)])
        await log.reached(10)
        await until(lambda: bus.stats.handled == 10)

        queue = {"messaging__destination__subscription__name": "shop.orders.placed"}
        assert measured.value("orderbus.deliveries.in_hand", **queue) == 0
        assert measured.value("orderbus.deliveries.limit", **queue) == 200

    process = {"messaging__system": "memory", "messaging__operation__name": "process"}
    (duration,) = measured("messaging.process.duration", orderbus__consumer="shop.orders.placed", **process)
    (lag,) = measured("orderbus.lag")
    assert duration.count == lag.count < 10
    assert lag.max > 59  # the clock of a virtual loop begins a moment before


async def test_what_waits_in_the_outbox_is_seen(world: World, measured: Measured) -> None:
    bus = world.bus("shop")
    async with bus:
        world.broker.block()
        async with bus.transaction() as tx:
            for n in range(3):
                tx.emit(Placed(order=str(n)))
        await until(lambda: bus.stats.outbox is not None and bus.stats.outbox.oldest_s > 30)
        assert measured.value("orderbus.outbox.waiting") == 3
        assert measured.value("orderbus.outbox.age") > 30
        assert measured.value("orderbus.outbox.stuck") == 0
        assert measured.value("orderbus.relay.buckets") == 64
        world.broker.unblock()
        await until(lambda: bus.stats.outbox is not None and bus.stats.outbox.waiting == 0 and bus.stats.outbox.stuck == 3)
        assert measured.value("orderbus.outbox.age") == 0


async def test_reasons_that_a_handler_makes_up_are_bounded(world: World, measured: Measured) -> None:
    bus = world.bus("shop")

    @bus.on(Placed)
    async def pay(event: Placed) -> None:
        raise Park(f"reason {event.n}")

    async with bus:
        for n in range(60):
            await world.send(Placed(order=str(n), n=n))
        await until(lambda: bus.stats.parked == 60)
        points = measured("orderbus.parked")

    assert len(points) == 51
    assert measured.value("orderbus.parked", orderbus__reason="other") == 10


async def test_two_buses_of_a_process_are_told_apart_and_what_a_closed_one_has_counted_stays(
    world: World, measured: Measured
) -> None:
    async with world.bus("one"), world.bus("two"):
        assert {dict(point.attributes)["orderbus.group"] for point in measured("orderbus.emitted")} == {"one", "two"}
    for _ in range(2):
        async with world.bus("three") as bus, bus.transaction() as tx:
            tx.emit(Noted())
    assert measured.value("orderbus.emitted", orderbus__group="three") == 2
    async with world.bus("three"):
        assert measured.value("orderbus.emitted", orderbus__group="three") == 2
        assert {dict(point.attributes)["orderbus.group"] for point in measured("orderbus.relay.buckets")} == {"three"}


NOT_PROVOKED = {
    "messaging.client.operation.duration: error.type": "every publish is confirmed",
    "db.client.connection.wait_time": "a store in memory has no connections",
    **dict.fromkeys(
        (
            "http.server.request.duration",
            "orders.finished",
            "orders.pending",
            "orders.revenue",
            "orders.stock",
            "orders.end_to_end",
        ),
        "of the demo's services; compared in tests/services/test_traces.py",
    ),
}


async def test_the_page_lists_every_metric_with_its_kind_unit_and_attributes(world: World, measured: Measured) -> None:
    found = await run(world, measured)
    seen = {
        name: Entry(
            _kind(metric.data), metric.unit, frozenset(one for point in metric.data.data_points for one in point.attributes)
        )
        for name, metric in found.items()
    }
    assert differences(listed_metrics(), seen, NOT_PROVOKED) == []


def _kind(data: object) -> str:
    if isinstance(data, Sum):
        return "counter" if data.is_monotonic else "up-down counter"
    return type(data).__name__.lower()


class Broken(ExemplarFilter):
    def should_sample(self, *_: Any) -> bool:
        raise RuntimeError("a filter of the user's")


async def test_no_message_suffers_for_a_filter_that_raises(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    provider = MeterProvider([InMemoryMetricReader()], exemplar_filter=Broken())
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    bus, log = world.bus("shop"), Log()

    @bus.on(Placed, fuse=1)
    async def pay(event: Placed) -> Paid:
        log(event.n)
        return Paid(order=event.order)

    @bus.on(Paid, fuse=1)
    async def ship(event: Paid) -> None: ...

    async with bus:
        for n in range(2 * TOLD_TOGETHER):
            await world.send(Placed(order="a", n=n))
        await until(lambda: bus.stats.handled == 2 * bus.stats.relayed == 4 * TOLD_TOGETHER)

    assert sorted(log.lines) == list(range(2 * TOLD_TOGETHER))
    assert "a filter of the user's" in caplog.text
