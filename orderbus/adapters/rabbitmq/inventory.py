"""A topology in RabbitMQ's own terms, to be compared with what its management API says is there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from orderbus._core.topology import (
    DELIVERY_LIMIT,
    EVENTS_EXCHANGE,
    NEVER,
    RETURN_EXCHANGE,
    Binding,
    Exchange,
    Queue,
    Topology,
    dead_letter_queue,
)
from orderbus._core.topology_plan import Inventory, Properties
from orderbus.adapters.rabbitmq.topology import exchange_arguments, queue_arguments

Documents = list[dict[str, Any]]


def wanted_inventory(topology: Topology) -> Inventory:
    return Inventory(
        {exchange.name: _exchange(exchange) for exchange in topology.exchanges},
        {queue.name: _queue(queue) for queue in topology.queues},
        topology.bindings,
    )


def inventory_there(
    topology: Topology, groups: Collection[str], *, exchanges: Documents, queues: Documents, bindings: Documents
) -> Inventory:
    """Of what the management API lists, what is ours: the topology's own things, and what orderbus once declared for these groups.

    Whatever else the broker has is somebody else's, and so are bindings that a person made from another exchange. Raises KeyError
    or TypeError where the documents are not those of that API.
    """
    wanted = {queue.name for queue in topology.queues}
    names = {exchange.name for exchange in topology.exchanges}
    there = {one["name"]: _properties(one, "auto_delete", "exclusive") for one in queues}
    ours = {
        name: properties for name, properties in there.items() if name in wanted or _was_declared_by_us(name, properties, groups)
    }
    # A queue with other arguments (of an older orderbus, or made by hand) stays, and goes on writing to its dead letters.
    written_to = {dead_letter_queue(name) for name in there.keys() - ours.keys()} - wanted
    ours = {name: properties for name, properties in ours.items() if name not in written_to}
    bound = (
        Binding(one["source"], one["destination"], one["routing_key"])
        for one in bindings
        if one["destination_type"] == "queue" and one["destination"] in ours and not one["arguments"]
    )
    return Inventory(
        {one["name"]: _properties(one, "type", "auto_delete", "internal") for one in exchanges if one["name"] in names},
        ours,
        tuple(one for one in bound if one in topology.bindings or one.exchange in (EVENTS_EXCHANGE, RETURN_EXCHANGE)),
    )


def _exchange(exchange: Exchange) -> Properties:
    return {
        "durable": True,
        "type": exchange.kind,
        "auto_delete": False,
        "internal": False,
        **exchange_arguments(exchange),
    }


def _queue(queue: Queue) -> Properties:
    return {"durable": True, "auto_delete": False, "exclusive": False, **queue_arguments(queue)}


def _properties(document: Mapping[str, Any], *others: str) -> Properties:
    return {"durable": document["durable"], **{name: document[name] for name in others}, **document["arguments"]}


def _was_declared_by_us(name: str, properties: Properties, groups: Collection[str]) -> bool:
    """A group's name has no dot, so `payment.…` is of the group payment; its arguments tell it from a queue made by hand."""
    if name.partition(".")[0] not in groups or "." not in name:
        return False
    parked = dead_letter_queue(name)
    forms = [
        Queue(name, DELIVERY_LIMIT, dead_letter_exchange="", dead_letter_routing_key=parked, single_active_consumer=ordered)
        for ordered in (False, True)
    ]
    if name.endswith(".dlq"):
        forms.append(Queue(name, NEVER))
    return any(properties == _queue(form) for form in forms)
