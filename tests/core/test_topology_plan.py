"""What is missing, what differs, what is left over: decided from two lists."""

from __future__ import annotations

import pytest

from orderbus._core.topology import Binding, Exchange, Queue, QueueNeed, Topology, topology_for
from orderbus._core.topology_plan import Change, Difference, Inventory, changes, to_create, united

NOTHING = Inventory({}, {}, ())
HELD = {"durable": True, "limit": 50}


def test_what_is_the_same_is_no_change() -> None:
    held = Inventory({"x": HELD}, {"q": HELD}, (Binding("x", "q", "a.*"),))
    assert changes(held, held) == []


def test_what_is_missing_is_created_exchanges_first_and_bindings_last() -> None:
    wanted = Inventory({"x": HELD}, {"q": HELD}, (Binding("x", "q", "a.*"),))
    assert [(change.action, str(change)) for change in changes(wanted, NOTHING)] == [
        ("create", "exchange x"),
        ("create", "queue q"),
        ("create", "binding x → q by a.*"),
    ]


def test_a_difference_names_each_property_and_both_values() -> None:
    there = Inventory({}, {"q": {"durable": True, "limit": 7, "priority": 3}}, ())
    [change] = changes(Inventory({}, {"q": HELD | {"ttl": 5}}, ()), there)
    assert change == Change(
        "differs",
        "queue",
        "q",
        differences=(Difference("limit", 7, 50), Difference("ttl", None, 5), Difference("priority", 3, None)),
    )


def test_what_nobody_wants_is_left_over_with_its_bindings_and_a_dead_letter_queue_comes_after_its_own() -> None:
    there = Inventory({}, {"q.dlq": HELD, "q": HELD}, (Binding("x", "q", "a.*"),))
    assert [(change.action, str(change)) for change in changes(NOTHING, there)] == [
        ("leftover", "queue q"),
        ("leftover", "queue q.dlq"),
    ]


def test_a_binding_that_nobody_wants_of_a_queue_that_somebody_wants_is_left_over() -> None:
    there = Inventory({}, {"q": HELD}, (Binding("x", "q", "a.*"),))
    wanted = Inventory({}, {"q": HELD}, ())
    assert [(change.action, str(change)) for change in changes(wanted, there)] == [("leftover", "binding x → q by a.*")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Change("create", "binding", "q", "x", ""), "binding x → q"),
        (Change("create", "binding", "q", "x", "a.*"), "binding x → q by a.*"),
        (Change("unknown", "binding", "12"), "bindings, 12"),
        (Change("leftover", "queue", "q"), "queue q"),
    ],
)
def test_a_change_is_printed_as_what_it_is_about(change: Change, said: str) -> None:
    assert str(change) == said


def test_several_groups_need_each_shared_thing_once() -> None:
    groups = [topology_for([QueueNeed(f"{name}.orders", ("orders",))]) for name in ("a", "b")]
    both = united(groups)
    assert len(both.exchanges) == len(groups[0].exchanges)
    assert len(both.queues) == len(groups[0].queues) + 2
    assert len(both.bindings) == len(groups[0].bindings) + 2


def test_only_what_is_missing_is_to_be_made() -> None:
    topology = Topology(
        (Exchange("x", "topic"), Exchange("y", "topic")),
        (Queue("q"), Queue("r")),
        (Binding("x", "q", "a"), Binding("x", "q", "b")),
    )
    found = [
        Change("create", "exchange", "x"),
        Change("differs", "queue", "q"),
        Change("create", "queue", "r"),
        Change("create", "binding", "q", "x", "b"),
    ]
    assert to_create(topology, found) == Topology((Exchange("x", "topic"),), (Queue("r"),), (Binding("x", "q", "b"),))
