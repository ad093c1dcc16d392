"""Handlers' signatures and options: every wrong one is a UsageError that names the handler, the parameter and the fix."""

import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from orderbus import Batch, Bus, Delivery, Event, Retry, Tx
from orderbus._core.handler import Periodic, Plan, queue_needs, resolve_periodic
from orderbus._core.topology import QueueNeed
from tests.core.handlers import Mailer, Paid, Placed, plan_of, refused


def test_a_handler_gets_what_its_types_ask_for(bus: Bus) -> None:
    @bus.resource
    async def mailer() -> AsyncIterator[Mailer]:
        yield Mailer()

    @bus.on(Placed)
    async def handle(event: Placed, mailer: Mailer, delivery: Delivery, tx: Tx) -> None: ...

    assert plan_of(bus).arguments == ("event", Mailer, "delivery", "tx")


def test_the_decorator_leaves_the_function_as_it_is(bus: Bus) -> None:
    async def handle(event: Placed) -> None: ...

    assert bus.on(Placed)(handle) is handle


@pytest.mark.parametrize(
    ("returns", "emits"),
    [
        (None, ()),
        (Paid, (Paid,)),
        (Paid | None, (Paid,)),
        (Paid | Placed | None, (Paid, Placed)),
        (Paid | None | Placed, (Paid, Placed)),
        (list[Paid], (Paid,)),
        (Sequence[Paid | Placed], (Paid, Placed)),
        (tuple[Paid, ...], (Paid,)),
        (list[Paid] | None, (Paid,)),
        (Event, (Event,)),
        (Sequence[Event], (Event,)),
    ],
)
def test_what_a_handler_says_it_returns_is_known_before_it_runs(bus: Bus, returns: Any, emits: tuple[type, ...]) -> None:
    async def handle(event: Placed) -> Any: ...

    handle.__annotations__["return"] = returns
    bus.on(Placed)(handle)

    assert plan_of(bus).emits == emits
    assert plan_of(bus).needs_tx is bool(emits)


@pytest.mark.parametrize("returns", [bool, str, list[int], dict[str, Paid], Any, int | None, Sequence[str]])
def test_a_handler_that_returns_no_events_is_refused(bus: Bus, returns: Any) -> None:
    async def handle(event: Placed) -> Any: ...

    handle.__annotations__["return"] = returns

    refused(
        lambda: bus.on(Placed)(handle), "OB307", "handle (", "test_handler.py", "a handler returns None, an event, or a sequence"
    )


def test_a_function_that_is_not_async_is_refused(bus: Bus) -> None:
    def handle(event: Placed) -> None: ...

    refused(lambda: bus.on(Placed)(handle), "OB301", "handle (", "must be an async function; write `async def handle(…)`")


def test_what_is_no_function_is_refused(bus: Bus) -> None:
    class Handles:
        async def __call__(self, event: Placed) -> None: ...

    async def handle(event: Placed) -> None: ...

    refused(lambda: bus.on(Placed)(Handles()), "OB301", "Handles", "must be an async function")
    refused(lambda: bus.on(Placed)(functools.partial(handle)), "OB301", "handle", "must be an async function")
    refused(lambda: bus.on(Placed)(None), "OB301", "None", "must be an async function")


def test_an_async_generator_is_refused(bus: Bus) -> None:
    async def handle(event: Placed) -> AsyncIterator[Paid]:
        yield Paid(order_id=1)

    refused(lambda: bus.on(Placed)(handle), "OB301", "must be an async function")


def test_a_method_can_be_a_handler(bus: Bus) -> None:
    class Service:
        async def handle(self, event: Placed, tx: Tx) -> None: ...

    bus.on(Placed)(Service().handle)

    assert plan_of(bus).arguments == ("event", "tx")


def test_a_handler_without_parameters_is_refused(bus: Bus) -> None:
    async def handle() -> None: ...

    refused(lambda: bus.on(Placed)(handle), "OB302", "handle (", "its first must be the event, `event: Placed`")


def test_another_event_than_the_registered_one_is_refused(bus: Bus) -> None:
    async def handle(order: Paid) -> None: ...

    refused(
        lambda: bus.on(Placed)(handle),
        "OB302",
        "first parameter 'order' is Paid",
        "registered for Placed",
        "write `order: Placed`",
    )


def test_a_first_parameter_that_is_not_the_event_is_refused(bus: Bus) -> None:
    async def handle(tx: Tx, order: Placed) -> None: ...

    refused(lambda: bus.on(Placed)(handle), "OB302", "first parameter 'tx' is Tx", "write `tx: Placed`")


def test_a_parameter_without_a_type_is_refused(bus: Bus) -> None:
    async def handle(order: Placed, tx) -> None: ...

    refused(lambda: bus.on(Placed)(handle), "OB303", "handle (", "parameter 'tx' has no type")


@pytest.mark.parametrize("kind", ["*args", "**options", "keyword only"])
def test_parameters_that_can_not_be_injected_are_refused(bus: Bus, kind: str) -> None:
    async def positional(order: Placed, *rest: Tx) -> None: ...
    async def keywords(order: Placed, **rest: Tx) -> None: ...
    async def keyword_only(order: Placed, *, rest: Tx) -> None: ...

    handle: Any = {"*args": positional, "**options": keywords, "keyword only": keyword_only}[kind]

    refused(lambda: bus.on(Placed)(handle), "OB303", "rest: ", "can't be injected; use plain parameters")


@pytest.mark.parametrize("kind", [int, str, dict, list[int], Placed, Any])
def test_a_type_that_nobody_can_provide_is_refused_at_definition(bus: Bus, kind: Any) -> None:
    async def handle(order: Placed, limit: Any) -> None: ...

    handle.__annotations__["limit"] = kind

    refused(lambda: bus.on(Placed)(handle), "OB304", "handle (", "parameter 'limit' is", "nobody provides", "@bus.resource")


def test_a_resource_that_nobody_provided_is_refused_at_start(bus: Bus) -> None:
    @bus.on(Placed)
    async def handle(order: Placed, mailer: Mailer) -> None: ...

    refused(bus.plans, "OB304", "handle (", "parameter 'mailer' is Mailer", "use one of Tx, Delivery")


def test_an_annotation_that_can_not_be_found_is_refused_at_start(bus: Bus) -> None:
    async def handle(order: Placed, mailer: "Nowhere") -> None: ...  # noqa: F821

    bus.on(Placed)(handle)

    refused(bus.plans, "OB305", "handle (", "name something that can't be found", "Nowhere")


def test_an_annotation_may_name_what_is_defined_later(bus: Bus) -> None:
    async def handle(order: Placed, mailer: "LateMailer") -> None: ...

    bus.on(Placed)(handle)

    @bus.resource
    async def late() -> AsyncIterator[LateMailer]:
        yield LateMailer()

    assert plan_of(bus).arguments == ("event", LateMailer)


class LateMailer:
    pass


def test_what_is_no_event_is_refused_with_the_handler_named(bus: Bus) -> None:
    async def handle(order: int) -> None: ...

    refused(lambda: bus.on(int)(handle), "OB201", "handle (", "no event class; derive it from Event")


def test_an_event_without_a_topic_can_not_be_handled(bus: Bus) -> None:
    class Base(Event):
        order_id: int

    async def handle(order: Base) -> None: ...

    refused(
        lambda: bus.on(Base)(handle),
        "OB202",
        "event class Base (",
        "test_handler.py:",
        ") has no topic",
        'write class Base(Event, topic="…")',
    )


@pytest.mark.parametrize("option", ["concurrency", "fuse", "prefetch"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True, 10**6])
def test_counts_that_are_zero_unbounded_or_no_numbers_are_refused(bus: Bus, option: str, value: Any) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, **{option: value})(handle), "OB311", "handle (", f"{option}={value!r} must be")


@pytest.mark.parametrize("timeout", [0, -1, 1201, float("nan"), float("inf"), "5", None])
def test_a_timeout_that_is_no_time_is_refused(bus: Bus, timeout: Any) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, timeout=timeout)(handle), "OB311", "handle (", f"timeout={timeout!r} must be more than 0")


@pytest.mark.parametrize("name", ["", "Upper", "with space", "ü", "a" * 101, ".dot", 5])
def test_a_name_that_no_queue_could_have_is_refused(bus: Bus, name: Any) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, name=name)(handle), "OB310", "handle (", f"name={name!r} must be lower-case")


def test_names_that_orderbus_needs_itself_are_refused(bus: Bus) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, name="ordered")(handle), "OB310", "the name 'ordered' is taken")
    refused(lambda: bus.on(Placed, name="x.dlq")(handle), "OB310", "ends like a dead letter queue")
    refused(lambda: Bus("ob"), "OB318", "choose another group")


@pytest.mark.parametrize("group", ["", "Upper", "a.b", "a b", "1a", "a" * 61])
def test_a_group_that_no_queue_could_have_is_refused(group: str) -> None:
    refused(lambda: Bus(group), "OB318", f"Bus({group!r})", "lower-case letters")


def test_a_policy_that_is_none_is_refused(bus: Bus) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, retry=5)(handle), "OB311", "handle (", "retry=5 must be a Retry")


def test_an_unknown_guard_is_refused(bus: Bus) -> None:
    async def handle(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed, guard="redis")(handle), "OB311", "handle (", "guard='redis' must be")


def test_claims_can_not_guard_what_needs_a_transaction(bus: Bus) -> None:
    async def writes(order: Placed, tx: Tx) -> None: ...
    async def returns(order: Placed) -> Paid | None: ...

    for handle in (writes, returns):
        refused(
            lambda handle=handle: bus.on(Placed, guard="claims")(handle), "OB314", "handlers that write to no database; drop Tx"
        )


def test_ordered_retries_that_take_too_long_together_are_refused(bus: Bus) -> None:
    async def handle(order: Placed) -> None: ...

    policy = Retry.fixed(300, attempts=5)

    refused(
        lambda: bus.on(Placed, ordered=True, retry=policy)(handle), "OB313", "handle (", "must stay below 900 s", "waits 1200 s"
    )


def test_two_handlers_for_one_event_need_names(bus: Bus) -> None:
    async def first(order: Placed) -> None: ...
    async def second(order: Placed) -> None: ...

    bus.on(Placed)(first)

    refused(lambda: bus.on(Placed)(second), "OB308", "second (", "first (", "already called 'orders.placed'", "name='second'")
    bus.on(Placed, name="second")(second)
    assert [handler.queue for handler in bus.handlers] == ["payments.orders.placed", "payments.second"]


def test_two_ordered_handlers_for_one_event_are_refused_even_with_names(bus: Bus) -> None:
    async def first(order: Placed) -> None: ...
    async def second(order: Placed) -> None: ...

    bus.on(Placed, ordered=True)(first)

    refused(lambda: bus.on(Placed, ordered=True, name="second")(second), "OB308", "second (", "one ordered handler for a topic")


def test_one_name_for_two_events_is_refused(bus: Bus) -> None:
    async def first(order: Placed) -> None: ...
    async def second(order: Paid) -> None: ...

    bus.on(Placed, name="same")(first)

    refused(lambda: bus.on(Paid, name="same")(second), "OB308", "already called 'same'")


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 1, "fuse": 1, "prefetch": 1},
        {"concurrency": 1_000, "fuse": 10_000, "prefetch": 65_535},
        {"timeout": 0.001},
        {"timeout": 1_200},
        {"guard": "inbox"},
        {"guard": "claims"},
        {"guard": "none"},
        {"ordered": True, "retry": Retry.fixed(300, attempts=4)},
        {"name": "a" * 100},
        {"name": "a.b-c_1"},
    ],
)
def test_options_at_their_bounds_are_taken(bus: Bus, options: dict[str, Any]) -> None:
    async def handle(order: Placed) -> None: ...

    bus.on(Placed, **options)(handle)

    assert len(bus.plans()) == 1


@pytest.mark.parametrize("option", [{"concurrency": 1_001}, {"fuse": 10_001}, {"prefetch": 65_536}])
def test_options_one_beyond_their_bounds_are_refused(bus: Bus, option: dict[str, int]) -> None:
    async def handle(order: Placed) -> None: ...

    ((name, value),) = option.items()
    refused(lambda: bus.on(Placed, **option)(handle), "OB311", "handle (", f"{name}={value} must be")


@pytest.mark.parametrize(
    ("options", "prefetch"),
    [
        ({}, 20),
        ({"concurrency": 1}, 16),
        ({"concurrency": 10, "fuse": 5}, 100),
        ({"concurrency": 1_000, "fuse": 10_000}, 65_535),
        ({"prefetch": 3}, 3),
    ],
)
def test_without_a_prefetch_each_worker_has_as_much_again_waiting(bus: Bus, options: dict[str, int], prefetch: int) -> None:
    async def handle(order: Placed) -> None: ...

    bus.on(Placed, **options)(handle)

    assert bus.handlers[0].prefetch == prefetch


@pytest.mark.parametrize(
    ("options", "prefetch"),
    [
        ({"concurrency": 1, "timeout": 93.75}, 16),
        ({"concurrency": 1, "timeout": 110}, 13),
        ({"concurrency": 1, "timeout": 600}, 2),
        ({"concurrency": 1, "timeout": 1_200}, 1),
        ({"concurrency": 10, "timeout": 750}, 20),
        ({"concurrency": 10, "timeout": 751}, 10),
        ({"concurrency": 2, "fuse": 50, "timeout": 1_200}, 100),
        ({"concurrency": 1, "timeout": 1e-310}, 16),
        ({"ordered": True}, 20),
        ({"ordered": True, "concurrency": 100}, 200),
        ({"ordered": True, "fuse": 100, "concurrency": 1}, 200),
        ({"ordered": True, "timeout": 120}, 12),
        ({"ordered": True, "timeout": 600}, 10),
        ({"ordered": True, "fuse": 5, "concurrency": 1, "timeout": 600}, 10),
    ],
)
def test_without_a_prefetch_none_waits_for_longer_than_the_broker_allows(
    bus: Bus, options: dict[str, Any], prefetch: int
) -> None:
    async def handle(order: Placed) -> None: ...

    bus.on(Placed, **options)(handle)

    assert bus.handlers[0].prefetch == prefetch


@pytest.mark.parametrize(("most", "prefetch"), [(100, 100), (8, 8)])
def test_a_slow_batch_handler_has_one_batch_in_hand(bus: Bus, most: int, prefetch: int) -> None:
    async def handle(orders: Batch[Placed]) -> None: ...

    bus.on_batch(Placed, most=most, timeout=1_000)(handle)

    assert bus.handlers[0].prefetch == prefetch


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 3, "fuse": 2, "timeout": 400, "prefetch": 18},
        {"prefetch": 500, "timeout": 30},
        {"ordered": True, "prefetch": 250},
    ],
)
def test_a_prefetch_of_which_the_last_is_done_in_time_is_taken(bus: Bus, options: dict[str, Any]) -> None:
    async def handle(order: Placed) -> None: ...

    bus.on(Placed, **options)(handle)

    assert bus.handlers[0].prefetch == options["prefetch"]


class PlacedAgain(Event, topic="orders.placed"):
    pass


def test_two_events_of_one_topic_can_not_share_a_handler(bus: Bus) -> None:
    async def handle(orders: Batch[Placed | PlacedAgain]) -> None: ...

    refused(
        lambda: bus.on_batch(name="both")(handle),
        "OB309",
        "handle (",
        "two of its events have the same topic: orders.placed, orders.placed",
    )


def test_ordered_handlers_share_a_queue_and_each_other_has_its_own(bus: Bus) -> None:
    async def paid(order: Paid) -> None: ...
    async def placed(order: Placed) -> None: ...

    bus.on(Paid, ordered=True)(paid)
    bus.on(Placed, ordered=True)(placed)
    bus.on(Placed, name="mail")(placed)

    assert queue_needs(bus.handlers) == [
        QueueNeed("payments.ordered", ("orders.placed", "payments.paid"), True),
        QueueNeed("payments.mail", ("orders.placed",), False),
    ]


def test_a_handler_is_compared_with_all_before_it(bus: Bus) -> None:
    async def first(order: Paid) -> None: ...
    async def second(order: Placed) -> None: ...
    async def third(order: Placed) -> None: ...

    bus.on(Paid)(first)
    bus.on(Placed)(second)

    refused(lambda: bus.on(Placed)(third), "OB308", "third (", "second (", "already called 'orders.placed'")


def test_an_ordered_and_an_unordered_handler_of_one_event_get_along_by_their_names(bus: Bus) -> None:
    async def first(order: Placed) -> None: ...
    async def second(order: Placed) -> None: ...

    bus.on(Placed)(first)
    bus.on(Placed, ordered=True, name="second")(second)

    assert [handler.queue for handler in bus.handlers] == ["payments.orders.placed", "payments.ordered"]


def test_a_handler_that_says_nothing_of_what_it_returns_returns_nothing(bus: Bus) -> None:
    async def handle(event: Placed): ...
    async def tidy(): ...

    bus.on(Placed)(handle)

    assert plan_of(bus).emits == ()
    assert resolve_periodic(Periodic(tidy, 1, 1), Tx, {}) == Plan((), ())


def test_a_type_without_a_name_is_printed_as_it_is_written(bus: Bus) -> None:
    async def handle(order: Placed, limit: int | str) -> None: ...
    async def returns(order: Placed) -> int: ...

    refused(lambda: bus.on(Placed)(handle), "OB304", "parameter 'limit' is int | str, which nobody provides")
    refused(lambda: bus.on(Placed)(returns), "OB307", "returns int; a handler returns None")


def test_what_is_not_async_is_told_how_to_be_by_its_own_name(bus: Bus) -> None:
    def charge(order: Placed) -> None: ...

    refused(lambda: bus.on(Placed)(charge), "OB301", "write `async def charge(…)`")
    refused(lambda: bus.on(Placed)(functools.partial(charge)), "OB301", "write `async def handle(…)`")
