"""One trace from the caller to the last handler, over every way that a message takes; and nothing where nobody listens."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

from orderbus import Batch, Bus, Delivery, Event, Retry, Tx, UnavailableError
from orderbus._runtime.dead_letters import DeadLetters
from orderbus._runtime.tracing import TOLD_AFTER_S
from tests.runtime.world import Log, Paid, Placed, World, until
from tests.telemetry.spans import Recorded

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE}-b7ad6b7169203331-00"
AT_ONCE = Retry.exponential(first=0.1, attempts=3)


def shop(world: World, log: Log) -> Bus:
    """Takes Placed, emits Paid."""
    bus = world.bus("shop")

    @bus.on(Placed)
    async def pay(event: Placed, tx: Tx) -> Event:
        return Paid(order=event.order)

    return bus


def post(world: World, log: Log) -> Bus:
    """Takes Paid: the end of the way."""
    bus = world.bus("post")

    @bus.on(Paid)
    async def ship(event: Paid, delivery: Delivery) -> None:
        log(delivery)

    return bus


async def test_one_trace_goes_from_the_caller_to_the_last_handler(world: World, recorded: Recorded) -> None:
    log = Log()
    async with shop(world, log) as bus, post(world, log):
        with recorded.tracer.start_as_current_span("POST /orders"):
            async with bus.transaction() as tx:
                tx.emit(Placed(order="a"))
        await log.reached(1)

    last = recorded.one("process orders.paid")
    assert recorded.path(last) == [
        "POST /orders",
        "send orders.placed",
        "process orders.placed",
        "send orders.paid",
        "process orders.paid",
    ]
    assert {span.context.trace_id for span in recorded} == {last.context.trace_id}
    assert [recorded.path(span) for span in recorded.named("COMMIT")] == [
        ["POST /orders", "COMMIT"],
        ["POST /orders", "send orders.placed", "process orders.placed", "COMMIT"],
        [*recorded.path(last), "COMMIT"],
    ]
    assert [span.kind for span in recorded if span.name.startswith("send ")] == [SpanKind.PRODUCER] * 2
    assert all(span.status.status_code is StatusCode.UNSET for span in recorded)
    assert recorded.path(recorded.one("settle post.orders.paid"))[-2:] == ["process orders.paid", "settle post.orders.paid"]


async def test_a_span_says_which_message_it_was_and_what_became_of_it(world: World, recorded: Recorded) -> None:
    log = Log()
    async with post(world, log):
        event_id = await world.send(Paid(order="a"))
        await log.reached(1)
    span = recorded.one("process orders.paid")

    assert span.attributes == {
        "messaging.system": "memory",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "orders.paid",
        "messaging.destination.subscription.name": "post.orders.paid",
        "messaging.consumer.group.name": "post",
        "messaging.message.id": str(event_id),
        "orderbus.consumer": "post.orders.paid",
        "orderbus.attempt": 1,
        "orderbus.key": "a",
        "orderbus.outcome": "handled",
    }
    assert span.kind is SpanKind.CONSUMER


async def test_the_events_of_a_batch_stay_in_the_traces_of_their_keys(world: World, recorded: Recorded) -> None:
    log, bus = Log(), world.bus("shop")

    @bus.on_batch(Placed, most=10)
    async def pay(batch: Batch[Placed], tx: Tx) -> list[Event]:
        return [Paid(order=event.order) for event in batch.events]

    async with post(world, log), bus:
        with recorded.tracer.start_as_current_span("import"):
            pass  # begins and ends before: nothing may hang below it
        async with bus.transaction() as tx:
            for order in "abc":
                with recorded.tracer.start_as_current_span(f"POST {order}"):
                    tx.emit(Placed(order=order))
        await log.reached(3)

    for span in recorded.named("process orders.paid"):
        assert recorded.path(span)[0] == f"POST {(span.attributes or {})['orderbus.key']}"
    together = recorded.one("process batch shop.orders.placed")
    of_items = recorded.named("process orders.placed")
    assert len(of_items) == 3
    assert {link.context.span_id for link in together.links} == {span.context.span_id for span in of_items}
    assert "process orders.placed" not in {recorded.path(span)[-2] for span in recorded.named("COMMIT")}, "which all three share"


async def test_writes_that_commit_together_stay_in_their_own_traces(world: World, recorded: Recorded) -> None:
    log = Log()

    async def place(bus: Bus, order: str) -> None:
        with recorded.tracer.start_as_current_span(f"POST {order}"):
            await bus.group_commit(lambda tx: tx.emit(Paid(order=order)))

    async with post(world, log) as bus:
        async with anyio.create_task_group() as requests:
            for order in "abcd":
                requests.start_soon(place, bus, order)
        await log.reached(4)

    for span in recorded.named("process orders.paid"):
        assert recorded.path(span) == [f"POST {(span.attributes or {})['orderbus.key']}", "send orders.paid", span.name]


async def test_a_group_commit_has_nothing_of_whoever_was_the_first_to_ask_for_one(world: World) -> None:
    log, bus = Log(), world.bus("shop")

    @bus.on(Placed, guard="claims")
    async def pay(event: Placed) -> None:
        await bus.group_commit(lambda tx: tx.emit(Paid(order=event.order)))

    other = SAMPLED.replace(TRACE, "1" * 32)
    async with post(world, log), bus:
        for count, parent in enumerate((SAMPLED, other), 1):
            await world.send(Placed(order=str(count)), headers={"ob-key": str(count), "traceparent": parent})
            await log.reached(count)

    assert [delivery.headers["traceparent"] for delivery in log.lines] == [SAMPLED, other]


async def test_what_is_published_at_once_is_sent_in_the_caller_s_span(world: World, recorded: Recorded) -> None:
    log = Log()
    async with post(world, log) as bus:
        with recorded.tracer.start_as_current_span("POST"):
            await bus.publish(Paid(order="a"))
        await log.reached(1)

    assert recorded.path(recorded.one("process orders.paid")) == ["POST", "send orders.paid", "process orders.paid"]


async def test_a_retry_a_dead_letter_and_its_replay_are_in_the_trace(world: World, recorded: Recorded) -> None:
    log, bus = Log(), world.bus("post")

    @bus.on(Paid, retry=Retry.exponential(first=1.5, attempts=2))
    async def ship(event: Paid, delivery: Delivery) -> None:
        log(delivery)
        if len(log.lines) < 3:
            raise TimeoutError(f"secret of {event.order}")

    async with bus:
        with recorded.tracer.start_as_current_span("POST"):
            async with bus.transaction() as tx:
                tx.emit(Paid(order="a"))
        await until(lambda: world.parked("post.orders.paid"))
        await DeadLetters(world.broker).replay("post.orders.paid.dlq")
        await log.reached(3)

    tries = recorded.named("process orders.paid")
    assert [(span.attributes or {})["orderbus.outcome"] for span in tries] == ["retried", "parked", "handled"]
    assert [(span.attributes or {}).get("error.type") for span in tries] == ["TimeoutError", "TimeoutError", None]
    assert [span.status.status_code for span in tries] == [StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET]
    assert [recorded.path(span) for span in tries] == [["POST", "send orders.paid", "process orders.paid"]] * 3
    moved = [span for span in recorded if span.name.startswith("send ") and "process orders.paid" in recorded.path(span)]
    assert [span.name for span in moved] == ["send ob.retry.2000ms", "send post.orders.paid.dlq"]
    assert "secret" not in "".join(span.to_json() for span in recorded)


async def test_spans_are_told_within_a_second_and_have_the_times_at_which_they_took_place(
    world: World, recorded: Recorded
) -> None:
    log = Log()
    async with post(world, log):
        await world.send(Paid(order="a"))
        await log.reached(1)
        await anyio.sleep(TOLD_AFTER_S + 0.1)
        told = list(recorded)

    process, settle = recorded.one("process orders.paid"), recorded.one("settle post.orders.paid")
    assert {process.name, settle.name} <= {span.name for span in told}
    assert process.start_time is not None
    assert settle.start_time is not None
    assert process.end_time is not None
    assert process.start_time <= settle.start_time <= process.end_time
    assert settle.end_time == settle.start_time


async def test_each_member_of_a_unit_that_was_given_up_has_a_span_for_both_tries(world: World, recorded: Recorded) -> None:
    log, bus = Log(), world.bus("shop")

    @bus.on(Placed, fuse=10, retry=AT_ONCE)
    async def pay(event: Placed, tx: Tx) -> None:
        log(event)
        if event.n == 1:
            raise ConnectionResetError

    async with bus:
        pass  # now there is a queue
    for n in range(3):
        await world.send(Placed(order=str(n), n=n))
    async with bus:
        await until(lambda: len(recorded.named("send shop.orders.placed.dlq")) == 1)

    outcomes = [(span.attributes or {}).get("orderbus.outcome") for span in recorded.named("process orders.placed")]
    assert sorted(str(outcome) for outcome in outcomes) == ["None"] * 3 + ["handled"] * 2 + ["parked"] + ["retried"] * 2


class Till: ...


class Broken(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if self.at == "start":
            raise RuntimeError("a processor of the user's")

    def on_end(self, span: Any) -> None:
        if self.at == "end":
            raise RuntimeError("a processor of the user's")

    def __init__(self, at: str) -> None:
        self.at = at


@pytest.mark.parametrize("at", ["start", "end"])
async def test_no_message_suffers_for_a_processor_that_raises(
    world: World, recorded: Recorded, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(Broken(at))
    log = Log()
    async with shop(world, log), post(world, log):
        await world.send(Placed(order="a"), headers={"ob-key": "a", "traceparent": SAMPLED})
        await log.reached(1)

    assert "a processor of the user's" in caplog.text
    assert not world.broker.messages("shop.orders.placed.dlq")


class Tenants(SpanProcessor):
    """Writes down the baggage of each span's parent context."""

    def __init__(self) -> None:
        self.of: dict[str, object] = {}

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.of[span.name] = baggage.get_baggage("tenant", parent_context)


async def test_no_span_has_the_baggage_of_whoever_opened_the_bus(world: World, recorded: Recorded) -> None:
    provider: Any = trace.get_tracer_provider()
    provider.add_span_processor(tenants := Tenants())
    log = Log()
    token = attach(baggage.set_baggage("tenant", "of the opener"))
    try:
        async with post(world, log):
            await world.send(Paid(order="a"))
            await log.reached(1)
            await anyio.sleep(TOLD_AFTER_S + 0.1)
            await world.send(Paid(order="b"))
            await log.reached(2)
    finally:
        detach(token)

    assert tenants.of["settle post.orders.paid"] is None
    assert set(tenants.of.values()) == {None}


async def test_what_is_sent_while_the_bus_closes_has_an_end(world: World, recorded: Recorded) -> None:
    bus = world.bus("shop")

    @bus.resource
    async def till() -> AsyncIterator[Till]:
        yield Till()
        with recorded.tracer.start_as_current_span("goodbye"), contextlib.suppress(UnavailableError):
            await bus.publish(Paid(order="a"))

    @bus.on(Placed)
    async def pay(event: Placed, till: Till) -> None: ...

    async with bus:
        pass

    assert recorded.path(recorded.one("send orders.paid")) == ["goodbye", "send orders.paid"]


async def test_an_unsampled_trace_makes_no_span_and_goes_on(world: World, recorded: Recorded) -> None:
    await _goes_on(world, UNSAMPLED)

    assert list(recorded) == []


async def test_without_an_sdk_the_context_of_a_message_goes_on_to_what_its_handler_emits(world: World) -> None:
    await _goes_on(world, SAMPLED)


async def _goes_on(world: World, parent: str) -> None:
    log = Log()
    async with shop(world, log), post(world, log):
        await world.send(Placed(order="a"), headers={"ob-key": "a", "traceparent": parent, "tracestate": "vendor=1"})
        await log.reached(1)

    (delivery,) = log.lines
    assert delivery.headers["traceparent"] == parent
    assert delivery.headers["tracestate"] == "vendor=1"


@pytest.mark.parametrize(
    "parent", ["", "00", SAMPLED[:-1], SAMPLED.upper(), f"ff{SAMPLED[2:]}", f"00-{'0' * 32}-b7ad6b7169203331-01", 7]
)
async def test_a_context_that_can_t_be_read_begins_a_trace_anew(world: World, recorded: Recorded, parent: Any) -> None:
    log = Log()
    async with post(world, log):
        await world.send(Paid(order="a"), headers={"ob-key": "a", "traceparent": parent})
        await log.reached(1)

    assert recorded.path(recorded.one("process orders.paid")) == ["process orders.paid"]


async def test_what_a_bus_runs_hangs_under_nobody_who_happened_to_open_it(world: World, recorded: Recorded) -> None:
    log = Log()
    with recorded.tracer.start_as_current_span("startup"):
        async with shop(world, log), post(world, log):
            await world.send(Placed(order="a"))
            await log.reached(1)

    assert recorded.path(recorded.one("process orders.placed")) == ["process orders.placed"]
