"""The trace of an order whose payment fails: every try is in it, and so are the dead letter and its replay."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple
from uuid import UUID

import pytest

from services.payment import Rules
from tests.services.collector import Collector, Span
from tests.services.observed import Services, ancestors, below, collector, place, services

__all__ = ["collector", "services"]

pytestmark = pytest.mark.servers

TRACE = "0af7651916cd43dd8448eb211c80319c"
QUEUE = "payment.orders.placed"
TRIES = 6
"""What the payment service's policy allows."""
TRIED = ["BEGIN", f"process batch {QUEUE}", "COMMIT"]
"""What hangs below a try that failed and is made again without leaving the process: it is not settled."""
OTHERS = [
    *("POST /orders", "BEGIN", "COMMIT", "send orders.placed"),
    *("process orders.placed", "BEGIN", "process batch inventory.orders.placed", "INSERT", "SELECT", "UPDATE", "COMMIT"),
    *("settle inventory.orders.placed", "send inventory.reserved"),
    *("process inventory.reserved", "BEGIN", "process batch aggregator.answers", "SELECT", "UPDATE", "COMMIT"),
    "settle aggregator.answers",
]
"""All the spans of an order that waits for its payment alone."""
REST = [
    *("INSERT", "send payments.authorized"),
    *("process payments.authorized", "BEGIN", "process batch aggregator.answers", "SELECT", "UPDATE", "COMMIT"),
    *("settle aggregator.answers", "send orders.confirmed"),
    *("process orders.confirmed", "settle notification.orders.confirmed"),
]
"""What comes when the payment is made after all."""


class Try(NamedTuple):
    outcome: str
    number: int
    error: str | None
    below: list[str]


def test_the_tries_of_a_dead_letter_and_its_replay_are_in_the_order_s_trace(services: Services, collector: Collector) -> None:
    with services.running(PAYMENT_POISON="1"):
        order_id = place(services.url, f"00-{TRACE}-00f067aa0ba902b7-01")
        collector.until(lambda: _has_settled(collector, QUEUE, 2) and _has_settled(collector, "aggregator.answers", 1))
        if services.is_apart:
            services.restart("payment", PAYMENT_POISON="0")
            (letter,) = [span for span in collector.trace(TRACE) if span.attributes.get("orderbus.outcome") == "parked"]
            event_id = str(letter.attributes["messaging.message.id"])
            assert "1 replayed" in services.orderbus("dlq", "replay", QUEUE, "--id", event_id)
            collector.until(lambda: _has_settled(collector, "notification.orders.confirmed", 1))
    spans = collector.trace(TRACE)

    again = [Try("retried", number, "GatewayTimeout", TRIED) for number in range(1, TRIES - 1)]
    over_the_ladder = Try("retried", TRIES - 1, "GatewayTimeout", [*TRIED, "send ob.retry.2000ms", f"settle {QUEUE}"])
    parked = Try("parked", TRIES, "GatewayTimeout", [*TRIED, f"send {QUEUE}.dlq", f"settle {QUEUE}"])
    replayed = Try("handled", 1, None, [*TRIED, f"settle {QUEUE}"])
    expected = [*again, over_the_ladder, parked, *([replayed] if services.is_apart else [])]
    tries = _tries(spans)
    assert [_told(span, spans) for span in tries] == expected
    assert [[one.name for one in ancestors(span, spans)] for span in tries] == [
        ["POST /orders", "send orders.placed", "process orders.placed"]
    ] * len(tries)
    assert len({span.parent_id for span in tries}) == len({span.attributes["messaging.message.id"] for span in tries}) == 1
    assert {span.attributes["orderbus.key"] for span in tries} == {order_id}
    for span in spans:
        if not span.name.startswith("send "):
            continue
        (parent,) = [one for one in spans if one.span_id == span.parent_id]
        is_moved = span.name.endswith((".dlq", "ms"))
        assert span.attributes.get("orderbus.attempt") == (parent.attributes["orderbus.attempt"] if is_moved else None)
        assert ("messaging.rabbitmq.destination.routing_key" in span.attributes) is not is_moved
        assert (span.attributes["messaging.message.id"] == parent.attributes.get("messaging.message.id")) is is_moved
        assert "error.type" not in span.attributes, "its confirm came"

    of_tries = [name for one in expected for name in ("process orders.placed", *one.below)]
    assert Counter(span.name for span in spans) == Counter(OTHERS + of_tries + (REST if services.is_apart else []))
    assert {span.trace_id for span in collector.spans} == {TRACE}


def test_each_order_s_trace_has_the_tries_that_its_payment_took(services: Services, collector: Collector) -> None:
    """Which tries time out hangs on the orders' ids: orders are placed until one was retried and then paid."""
    rules = Rules(flaky=0.5)
    wanted: dict[str, list[tuple[str, int, str | None]]] = {}
    with services.running(PAYMENT_FLAKY=str(rules.flaky)):
        while not any(len(tries) > 1 and tries[-1][0] == "handled" for tries in wanted.values()):
            trace_id = f"{len(wanted) + 1:032x}"
            wanted[trace_id] = _outcomes(rules, UUID(place(services.url, f"00-{trace_id}-00f067aa0ba902b7-01")))
        paid = [trace_id for trace_id, tries in wanted.items() if tries[-1][0] == "handled"]
        collector.until(lambda: all(len(_tries(collector.trace(one))) == len(tries) for one, tries in wanted.items()))
        collector.until(lambda: all(_has_settled(collector, "notification.orders.confirmed", 1, trace_id=one) for one in paid))

    for trace_id, expected in wanted.items():
        spans = collector.trace(trace_id)
        assert [_told(span, spans)[:3] for span in _tries(spans)] == expected
        for span, (outcome, number, _) in zip(_tries(spans), expected, strict=True):
            leaves = outcome != "retried" or number == TRIES - 1
            assert [one.name for one in below(span, spans) if one.name.startswith("settle ")] == [f"settle {QUEUE}"] * leaves
        last = [span.name for span in spans if span.name == "process orders.confirmed"]
        assert len(last) == (1 if trace_id in paid else 0)


def _outcomes(rules: Rules, order_id: UUID) -> list[tuple[str, int, str | None]]:
    """What becomes of the tries of an order: outcome, number, and error."""
    found: list[tuple[str, int, str | None]] = []
    for number in range(1, TRIES + 1):
        if not rules.times_out(order_id, number):
            return [*found, ("handled", number, None)]
        found.append(("retried" if number < TRIES else "parked", number, "GatewayTimeout"))
    return found


def _tries(spans: list[Span]) -> list[Span]:
    """Those of the payment service, in their order."""
    return [
        span
        for span in spans
        if span.name == "process orders.placed" and span.attributes["messaging.destination.subscription.name"] == QUEUE
    ]


def _told(span: Span, spans: list[Span]) -> Try:
    """What a try says of itself, and what hangs below it but for its answer, which leaves when the relay comes to it."""
    names = [one.name for one in below(span, spans) if one.name != "send payments.authorized"]
    attributes = span.attributes
    return Try(attributes["orderbus.outcome"], attributes["orderbus.attempt"], attributes.get("error.type"), names)


def _has_settled(collector: Collector, queue: str, count: int, *, trace_id: str = TRACE) -> bool:
    return sum(span.name == f"settle {queue}" for span in collector.trace(trace_id)) >= count
