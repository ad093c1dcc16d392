"""How far a broker is from a topology: read from its management API where there is one, else asked for over AMQP, name by name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import anyio
from yarl import URL

from orderbus._core.topology import Binding, Topology
from orderbus._core.topology_plan import Change, Kind, binding_change, changes
from orderbus.adapters.rabbitmq.address import parse_addresses
from orderbus.adapters.rabbitmq.asking import Asking
from orderbus.adapters.rabbitmq.connection import Connection, connect_to_one
from orderbus.adapters.rabbitmq.inventory import inventory_there, wanted_inventory
from orderbus.adapters.rabbitmq.management import Management
from orderbus.adapters.rabbitmq.topology import Call, apply_topology, exchange_call, queue_call
from orderbus.errors import TopologyError, UnavailableError, UsageError

NO_BINDINGS = "can't be read over AMQP; give ORDERBUS_MANAGEMENT_URL"


@asynccontextmanager
async def open_drift(url: str, *, name: str, management_url: str | None) -> AsyncIterator[Drift]:
    """Connect to RabbitMQ, and see that the management API is the same broker's. Raises UsageError and UnavailableError."""
    addresses = parse_addresses(url)
    connection = await connect_to_one(addresses, name)
    try:
        management = None
        if management_url is not None:
            user = URL(addresses[0].url)
            management = Management(management_url, user=user.user or "", password=user.password or "")
            await _check_same(connection, management)
        yield Drift(connection, management)
    finally:
        await connection.close()


class Drift:
    """Looks, makes what is missing, and removes what it is told to."""

    def __init__(self, connection: Connection, management: Management | None) -> None:
        self._connection = connection
        self._management = management
        self._asking = Asking(connection)

    async def look(self, topology: Topology, groups: Collection[str]) -> list[Change]:
        """Changes nothing.

        With the management API everything is compared, and what orderbus once declared for these groups and nobody needs any more
        is found. Without it, what exists is declared again as it should be: the broker refuses what differs.
        """
        if self._management is None:
            return await self._asked_for(topology)
        vhost = self._connection._control.vhost
        columns = "name,type,durable,auto_delete,internal,exclusive,arguments"
        exchanges = await self._management.get("exchanges", vhost, columns=columns)
        queues = await self._management.get("queues", vhost, columns=columns)
        bindings = await self._management.get("bindings", vhost)
        try:
            there = inventory_there(topology, groups, exchanges=exchanges, queues=queues, bindings=bindings)
        except (KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{self._management.shown} lists what RabbitMQ's management API does not: {error!r}", code="OB509"
            ) from error
        return changes(wanted_inventory(topology), there)

    async def refused(self, topology: Topology) -> list[Change]:
        """What exists and the user may not declare."""
        return [change for change in await self._asked_for(topology) if change.action == "unknown" and change.kind != "binding"]

    async def ahead(self) -> tuple[float, float]:
        """By how many seconds the broker's clock is ahead of this machine's, and how far off that may be."""
        assert self._management is not None
        return await self._management.ahead()

    async def create(self, topology: Topology) -> None:
        """Raises TopologyError, naming each thing that could not be declared; the others are there then."""
        await apply_topology(self._connection, topology)

    async def unbind(self, binding: Binding, arguments: dict[str, Any] | None = None) -> None:
        """Raises TopologyError where the user may not."""
        names = binding.queue, binding.exchange, binding.routing_key
        refused = await self._asking.ask(lambda channel: channel.queue_unbind(*names, arguments=arguments))
        if refused is not None:
            raise TopologyError(f"{binding_change('leftover', binding)}: the broker says {refused!r}")

    async def remove(self, queue: str) -> None:
        """Take a queue's bindings away and then the queue, where it is empty and nobody reads it. Raises UsageError otherwise.

        A quorum queue can't be deleted `if-empty` or `if-unused` (RabbitMQ 3.10.8 answers NOT_IMPLEMENTED), so it is looked at before the bindings
        go, and once more when nothing can come any more. A queue that is kept then gets its bindings back: somebody may have begun to read it.
        """
        assert self._management is not None
        vhost = self._connection._control.vhost
        await self._check_idle(queue)
        bindings = await self._management.get("queues", vhost, queue, "bindings")
        taken: list[tuple[Binding, dict[str, Any]]] = []
        try:
            for one in bindings:
                if one["source"]:
                    binding = Binding(one["source"], queue, one["routing_key"])
                    await self.unbind(binding, one["arguments"])
                    taken.append((binding, one["arguments"]))
            await self._check_idle(queue)
            refused = await self._asking.ask(lambda channel: channel.queue_delete(queue))
            if refused is not None:
                raise TopologyError(f"queue {queue}: the broker says {refused!r}")
        except BaseException:  # cancelled, or the management API does not answer any more
            with anyio.CancelScope(shield=True):
                for n, (binding, arguments) in enumerate(taken):
                    try:
                        await self._bind(binding, arguments)
                    except UnavailableError as error:
                        lost = ", ".join(f"{one.exchange} by {one.routing_key!r}" for one, _ in taken[n:])
                        raise UnavailableError(
                            f"queue {queue} is kept, and without its bindings to {lost}: open its bus once, which makes them again; {error}"
                        ) from error
            raise

    async def _bind(self, binding: Binding, arguments: dict[str, Any]) -> None:
        names = binding.queue, binding.exchange, binding.routing_key
        refused = await self._asking.ask(lambda channel: channel.queue_bind(*names, arguments=arguments))
        if refused is not None:
            raise TopologyError(f"{binding_change('create', binding)} was taken away, and can't be made again: {refused!r}")

    async def _check_idle(self, queue: str) -> None:
        """What is ready and who consumes comes from the queue itself; only the management API counts what is unacknowledged."""
        assert self._management is not None
        answer = await self._asking.call(_passive_queue(queue))
        ready, consumers = answer.message_count, answer.consumer_count
        document = await self._management.get("queues", self._connection._control.vhost, queue)
        unacknowledged = document.get("messages_unacknowledged")
        if ready or consumers or unacknowledged != 0:
            held = "not known" if unacknowledged is None else unacknowledged
            raise UsageError(
                f"queue {queue} is kept: messages ready: {ready}, unacknowledged: {held}, consumers: {consumers}; "
                f"stop those who read it, and drain it",
                code="OB510",
            )

    async def _asked_for(self, topology: Topology) -> list[Change]:
        found = []
        for exchange in topology.exchanges:
            passive = _passive_exchange(exchange.name)
            found += await self._ask_for("exchange", exchange.name, passive, exchange_call(exchange))
        for queue in topology.queues:
            found += await self._ask_for("queue", queue.name, _passive_queue(queue.name), queue_call(queue))
        missing = {(change.kind, change.name) for change in found if change.action == "create"}
        unknown = 0
        for binding in topology.bindings:
            if ("exchange", binding.exchange) in missing or ("queue", binding.queue) in missing:
                found.append(binding_change("create", binding))
            else:
                unknown += 1
        if unknown:
            found.append(Change("unknown", "binding", f"{unknown} of {len(topology.bindings)}", said=NO_BINDINGS))
        return found

    async def _ask_for(self, kind: Kind, name: str, passive: Call, active: Call) -> list[Change]:
        refused = await self._asking.ask(passive)
        if refused is None:
            refused = await self._asking.ask(active)
        if refused is None:
            return []
        if "NOT_FOUND" in refused:
            return [Change("create", kind, name)]
        return [Change("unknown" if "ACCESS_REFUSED" in refused else "differs", kind, name, said=refused)]


def _passive_exchange(name: str) -> Call:
    return lambda channel: channel.exchange_declare(name, passive=True)


def _passive_queue(name: str) -> Call:
    return lambda channel: channel.queue_declare(name, passive=True)


async def _check_same(connection: Connection, management: Management) -> None:
    """Two addresses of two brokers would compare the one and change the other."""
    overview = await management.get("overview")
    said = connection._control.server_properties.get("cluster_name")
    ours = said.decode(errors="replace") if isinstance(said, bytes) else said
    theirs = overview.get("cluster_name") if isinstance(overview, dict) else None
    if not isinstance(theirs, str):
        raise UsageError(
            f"ORDERBUS_MANAGEMENT_URL: what answers at {management.shown} is not RabbitMQ's management API", code="OB509"
        )
    if ours != theirs:
        raise UsageError(
            f"ORDERBUS_MANAGEMENT_URL is of another broker: {management.shown} is {theirs!r}, and {connection.address.shown} is {ours!r}",
            code="OB509",
        )
