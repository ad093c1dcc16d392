"""What a broker has beside what it should have, as a list of changes: decided here, without any server."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from orderbus._core.topology import Binding, Topology

Action = Literal["create", "differs", "leftover", "unknown"]
"""`differs` is never changed by us: the broker can't, and a queue that is replaced loses what it holds."""
Kind = Literal["exchange", "queue", "binding"]
Properties = Mapping[str, object]
"""Type, durability and arguments, in the broker's own terms."""


class Inventory(msgspec.Struct, frozen=True):
    """Exchanges and queues by name with their properties, and the bindings between them."""

    exchanges: Mapping[str, Properties]
    queues: Mapping[str, Properties]
    bindings: tuple[Binding, ...]


class Difference(msgspec.Struct, frozen=True):
    """A property that is not as it should be. None: it is not set."""

    name: str
    there: object
    wanted: object


class Change(msgspec.Struct, frozen=True):
    action: Action
    kind: Kind
    name: str
    """Of the exchange or queue; of a binding, its queue; of bindings that can't be read, how many."""
    exchange: str | None = None
    routing_key: str | None = None
    differences: tuple[Difference, ...] = ()
    said: str = ""
    """Why it is not known, or what the broker said of a difference that it does not list."""

    def __str__(self) -> str:
        if self.kind != "binding":
            return f"{self.kind} {self.name}"
        if self.exchange is None:
            return f"bindings, {self.name}"
        by = f" by {self.routing_key}" if self.routing_key else ""
        return f"binding {self.exchange} → {self.name}{by}"


def united(topologies: Iterable[Topology]) -> Topology:
    """What several groups need together: each exchange, queue and binding once, in the order of their first appearance."""
    several = list(topologies)
    return Topology(
        tuple(dict.fromkeys(one for topology in several for one in topology.exchanges)),
        tuple(dict.fromkeys(one for topology in several for one in topology.queues)),
        tuple(dict.fromkeys(one for topology in several for one in topology.bindings)),
    )


def changes(wanted: Inventory, there: Inventory) -> list[Change]:
    """What must be made, what differs, and what is there beyond need: exchanges, queues, bindings, each in the order wanted.

    The bindings of a queue that is left over are part of it: a queue that is kept goes on receiving.
    """
    return [
        *_of_kind("exchange", wanted.exchanges, there.exchanges),
        *_of_kind("queue", wanted.queues, there.queues),
        *(binding_change("create", one) for one in wanted.bindings if one not in there.bindings),
        *(binding_change("leftover", one) for one in there.bindings if one not in wanted.bindings and one.queue in wanted.queues),
    ]


def binding_change(action: Action, binding: Binding) -> Change:
    return Change(action, "binding", binding.queue, binding.exchange, binding.routing_key)


def to_create(topology: Topology, found: Iterable[Change]) -> Topology:
    """The part of a topology that is to be made."""
    names = {str(change) for change in found if change.action == "create"}
    return Topology(
        tuple(one for one in topology.exchanges if f"exchange {one.name}" in names),
        tuple(one for one in topology.queues if f"queue {one.name}" in names),
        tuple(one for one in topology.bindings if str(binding_change("create", one)) in names),
    )


def _of_kind(kind: Kind, wanted: Mapping[str, Properties], there: Mapping[str, Properties]) -> Iterable[Change]:
    for name, properties in wanted.items():
        if name not in there:
            yield Change("create", kind, name)
        elif differences := _differences(properties, there[name]):
            yield Change("differs", kind, name, differences=differences)
    # A dead letter queue comes after its own queue, which writes to it.
    for name in sorted(there.keys() - wanted.keys()):
        yield Change("leftover", kind, name)


def _differences(wanted: Properties, there: Properties) -> tuple[Difference, ...]:
    return tuple(
        Difference(name, there.get(name), wanted.get(name))
        for name in dict.fromkeys([*wanted, *there])
        if there.get(name) != wanted.get(name)
    )
