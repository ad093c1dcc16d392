"""What the management API lists: which of it is orderbus's own, so that a plan may call it left over."""

from __future__ import annotations

from typing import Any

import pytest

from orderbus._core.topology import DELIVERY_LIMIT, NEVER, Queue, Topology
from orderbus.adapters.rabbitmq.inventory import inventory_there
from orderbus.adapters.rabbitmq.topology import queue_arguments


def listed(queue: Queue) -> dict[str, Any]:
    return {
        "name": queue.name,
        "durable": True,
        "auto_delete": False,
        "exclusive": False,
        "arguments": queue_arguments(queue),
    }


@pytest.mark.parametrize(
    ("limit", "ours"),
    [(DELIVERY_LIMIT, {"shop.old", "shop.old.dlq"}), (DELIVERY_LIMIT + 1, set())],
    ids=["declared by us", "with other arguments"],
)
def test_dead_letters_are_left_over_only_with_the_queue_that_writes_to_them(limit: int, ours: set[str]) -> None:
    queue = Queue("shop.old", limit, dead_letter_exchange="", dead_letter_routing_key="shop.old.dlq")
    queues = [listed(queue), listed(Queue("shop.old.dlq", NEVER))]

    found = inventory_there(Topology(), {"shop"}, exchanges=[], queues=queues, bindings=[])

    assert set(found.queues) == ours
