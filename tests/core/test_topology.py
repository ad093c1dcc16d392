"""What a group declares, by its names: they are on the broker, and so are for ever."""

import pytest
from hypothesis import given, strategies as st

from orderbus._core.topology import (
    BUCKETS,
    RETRY_STEPS_S,
    Binding,
    Exchange,
    Queue,
    QueueNeed,
    Topology,
    bucket_of,
    dead_letter_queue,
    retry_exchange,
    retry_step,
    routing_key,
    topology_for,
)

MOST = 2147483647


def test_a_bus_without_handlers_declares_the_events_the_retry_ladder_and_where_the_lost_go() -> None:
    ladder = [f"ob.retry.{step}000ms" for step in RETRY_STEPS_S]

    assert topology_for([]) == Topology(
        exchanges=(
            Exchange("ob.lost", "fanout"),
            Exchange("ob.events", "topic"),
            Exchange("ob.return", "direct", alternate="ob.lost"),
            *(Exchange(name, "fanout") for name in ladder),
        ),
        queues=(
            Queue("ob.lost", delivery_limit=MOST),
            *(
                Queue(name, message_ttl_ms=step * 1000, dead_letter_exchange="ob.return")
                for name, step in zip(ladder, RETRY_STEPS_S, strict=True)
            ),
        ),
        bindings=(Binding("ob.lost", "ob.lost", ""), *(Binding(name, name, "") for name in ladder)),
    )


@pytest.mark.parametrize("ordered", [False, True])
def test_a_handlers_queue_has_its_dead_letters_its_way_back_and_a_binding_for_each_topic(ordered: bool) -> None:
    nothing = topology_for([])
    made = topology_for([QueueNeed("shop.orders", ("orders.placed", "orders.cancelled"), ordered)])

    assert made.exchanges == nothing.exchanges
    assert made.queues[len(nothing.queues) :] == (
        Queue("shop.orders.dlq", delivery_limit=MOST),
        Queue(
            "shop.orders",
            delivery_limit=50,
            dead_letter_exchange="",
            dead_letter_routing_key="shop.orders.dlq",
            single_active_consumer=ordered,
        ),
    )
    assert made.bindings[len(nothing.bindings) :] == (
        Binding("ob.return", "shop.orders", "shop.orders"),
        Binding("ob.events", "shop.orders", "orders.placed.*"),
        Binding("ob.events", "shop.orders", "orders.cancelled.*"),
    )


def test_a_key_has_the_bucket_that_every_language_gives_it() -> None:
    assert [bucket_of(key) for key in ("", "a", "order-1", "Zürich", "日本")] == [0, 3, 47, 62, 12]


@given(st.text())
def test_every_key_has_one_of_64_buckets(key: str) -> None:
    assert 0 <= bucket_of(key) < BUCKETS == 64


def test_names_are_made_of_what_they_are_for() -> None:
    assert routing_key("orders.placed", 7) == "orders.placed.07"
    assert routing_key("orders.placed", 63) == "orders.placed.63"
    assert dead_letter_queue("shop.orders") == "shop.orders.dlq"
    assert retry_exchange(5) == "ob.retry.5000ms"


@pytest.mark.parametrize(
    ("delay_s", "step_s"), [(0, 1), (1, 1), (1.001, 2), (2, 2), (6, 10), (61, 120), (3600, 3600), (3601, 3600), (1e9, 3600)]
)
def test_a_delay_takes_the_shortest_step_that_is_long_enough(delay_s: float, step_s: int) -> None:
    assert retry_step(delay_s) == step_s
