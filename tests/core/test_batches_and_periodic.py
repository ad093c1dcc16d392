"""Batch handlers, resources and periodic functions: every wrong one is a UsageError that names it and the fix."""

import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from orderbus import Batch, Bus, Delivery, Retry, Tx
from orderbus._core.handler import Handler, Options, Periodic, Plan, check_options, queue_needs, resolve_periodic
from tests.core.handlers import Mailer, Paid, Placed, plan_of, refused


def test_a_batch_handler_of_several_events_says_them_in_its_own_signature(bus: Bus) -> None:
    async def good(orders: Batch[Placed | Paid], tx: Tx) -> None: ...
    async def no_batch(orders: Placed | Paid) -> None: ...
    async def nothing() -> None: ...
    async def no_event(orders: Batch[int]) -> None: ...

    bus.on_batch(name="both")(good)
    [(handler, plan)] = bus.plans()
    assert (handler.events, handler.queue, plan.arguments) == ((Placed, Paid), "payments.both", ("batch", "tx"))
    assert [sorted(need.topics) for need in queue_needs([handler])] == [sorted(handler.topics)]

    refused(lambda: bus.on_batch(name="a")(no_batch), "OB302", "no_batch (", "names no event", "write `batch: Batch[A | B]`")
    refused(lambda: bus.on_batch(name="b")(nothing), "OB302", "nothing (", "write `batch: Batch[A | B]`")
    refused(lambda: bus.on_batch(name="c")(no_event), "OB201", "no_event (", "which is no event class")
    refused(lambda: bus.on_batch()(good), "OB309", "good (", "give it a stable name=")  # type: ignore[call-overload]
    refused(lambda: bus.on_batch(name="both")(good), "OB308", "already called 'both'")


def test_a_batch_handler_takes_a_batch(bus: Bus) -> None:
    async def single(order: Placed) -> None: ...
    async def other(orders: Batch[Paid]) -> None: ...
    async def good(orders: Batch[Placed], tx: Tx) -> None: ...

    refused(lambda: bus.on_batch(Placed)(single), "OB302", "single (", "registered for Batch[Placed]", "`order: Batch[Placed]`")
    refused(lambda: bus.on_batch(Placed)(other), "OB302", "other (", "`orders: Batch[Placed]`")
    refused(lambda: bus.on(Placed)(good), "OB302", "good (", "`orders: Placed`")
    bus.on_batch(Placed)(good)
    assert plan_of(bus).arguments == ("batch", "tx")


def test_a_batch_handler_has_no_single_delivery(bus: Bus) -> None:
    async def handle(orders: Batch[Placed], delivery: Delivery) -> None: ...

    refused(lambda: bus.on_batch(Placed)(handle), "OB306", "handle (", "parameter 'delivery'", "use item.delivery")


@pytest.mark.parametrize("most", [0, 10_001])
def test_a_batch_has_bounds(bus: Bus, most: int) -> None:
    async def handle(orders: Batch[Placed]) -> None: ...

    refused(
        lambda: bus.on_batch(Placed, most=most)(handle), "OB311", "handle (", f"={most} must be a whole number from 1 to 10000"
    )


def test_a_resource_is_an_async_generator_with_a_type(bus: Bus) -> None:
    async def coroutine() -> Mailer:
        return Mailer()

    def generator() -> Any:
        yield Mailer()

    async def untyped():
        yield Mailer()

    async def wrong_type() -> Mailer:
        yield Mailer()

    async def no_class() -> AsyncIterator[int | str]:
        yield 1

    async def lost() -> AsyncIterator["Nowhere"]:  # noqa: F821
        yield 1

    async def parameters(url: str) -> AsyncIterator[Mailer]:
        yield Mailer()

    for function in (coroutine, generator, None, Mailer):
        refused(lambda function=function: bus.resource(function), "OB316", "resource ", "must be an async generator")
    for function in (untyped, wrong_type, no_class):
        refused(
            lambda function=function: bus.resource(function), "OB316", "needs the type it provides; write `-> AsyncIterator[T]`"
        )
    refused(lambda: bus.resource(lost), "OB305", "lost", "can't be found", "Nowhere")
    refused(lambda: bus.resource(parameters), "OB316", "parameters", "takes no parameters")


def test_two_resources_of_one_type_are_refused(bus: Bus) -> None:
    async def first() -> AsyncIterator[Mailer]:
        yield Mailer()

    bus.resource(first)

    refused(lambda: bus.resource(first), "OB317", "has a resource of type Mailer already")


@pytest.mark.parametrize("seconds", [0, -1, 86_401, float("nan"), "1"])
def test_periodic_work_needs_an_interval(bus: Bus, seconds: Any) -> None:
    async def tidy() -> None: ...

    refused(lambda: bus.every(seconds)(tidy), "OB311", "periodic ", "tidy (", "every 0.01 to 86,400 seconds")


def test_periodic_work_has_a_signature_like_a_handler(bus: Bus) -> None:
    async def delivered(delivery: Delivery) -> None: ...
    async def untyped(tx) -> None: ...
    async def unknown(limit: int) -> None: ...
    async def returns() -> int:
        return 1

    def plain() -> None: ...

    refused(lambda: bus.every(1)(delivered), "OB306", "delivered (", "nothing is delivered here")
    refused(lambda: bus.every(1)(untyped), "OB303", "untyped (", "parameter 'tx' has no type")
    refused(lambda: bus.every(1)(unknown), "OB304", "unknown (", "parameter 'limit' is int", "nobody provides")
    refused(lambda: bus.every(1)(returns), "OB307", "returns (", "a handler returns None, an event")
    refused(lambda: bus.every(1)(plain), "OB301", "plain (", "must be an async function")
    refused(lambda: bus.every(1)(functools.partial(plain)), "OB301", "plain", "must be an async function")


def test_a_batch_can_not_be_ordered() -> None:
    async def handle(orders: Batch[Placed]) -> None: ...

    handler = Handler("payments", handle, (Placed,), Options(Retry.exponential(attempts=5), ordered=True), batch=True)

    refused(lambda: check_options(handler), "OB312", "handle (", "a batch handler can't be ordered; use bus.on(…, ordered=True")


def test_a_batch_of_what_can_not_be_found_is_refused_at_definition(bus: Bus) -> None:
    async def handle(orders: "Batch[Nowhere]") -> None: ...  # noqa: F821

    refused(
        lambda: bus.on_batch(name="both")(handle),
        "OB305",
        "handle (",
        "can't be found: name 'Nowhere' is not defined; write `batch: Batch[A | B]` with event classes that are defined above, "
        "or name the event in the decorator",
    )


def test_a_batch_handler_without_an_event_is_told_what_its_first_parameter_is(bus: Bus) -> None:
    async def handle(orders: int) -> None: ...

    refused(lambda: bus.on_batch(name="both")(handle), "OB302", "its first parameter is int; write `batch: Batch[A | B]`")


def test_periodic_work_gets_what_its_types_ask_for() -> None:
    async def tidy(mailer: Mailer, tx: Tx) -> Paid | None: ...

    assert resolve_periodic(Periodic(tidy, 1, 1), Tx, {Mailer: Mailer()}) == Plan((Mailer, "tx"), (Paid,))


@pytest.mark.parametrize(("every_s", "timeout_s"), [(0.01, 0.001), (86_400, 3_600)])
def test_periodic_work_at_its_bounds_is_taken(every_s: float, timeout_s: float) -> None:
    async def tidy() -> None: ...

    assert resolve_periodic(Periodic(tidy, every_s, timeout_s), Tx, {}) == Plan((), ())


@pytest.mark.parametrize("timeout_s", [0, -1, 3_600.5, float("nan"), "1"])
def test_periodic_work_needs_a_time_limit_of_an_hour_at_most(timeout_s: Any) -> None:
    async def tidy() -> None: ...

    refused(lambda: resolve_periodic(Periodic(tidy, 1, timeout_s), Tx, {}), "OB311", "tidy (", "a timeout of at most 3,600")
