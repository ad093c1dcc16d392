"""Declaring exchanges, queues and bindings: whatever is missing, and never against what is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelAccessRefused, ChannelClosed, ChannelLockedResource, ChannelPreconditionFailed

from orderbus._core.topology import Exchange, Queue, Topology
from orderbus.adapters.rabbitmq.connection import CLOSE_S, Connection, describe
from orderbus.errors import TopologyError, UnavailableError

log = logging.getLogger("orderbus.rabbitmq")

_FIX = "drain and delete it, so that it can be declared anew, or go back to the arguments it has"
_PERMISSION_FIX = "give the user the permission to configure it, or open the bus once as a user who has it"


async def apply_topology(connection: Connection, topology: Topology) -> None:
    """Declare everything. Raises TopologyError at the end, naming each object that could not be; the others are there then."""
    declarer = _Declarer(connection)
    try:
        refused: set[str] = set()
        for exchange in topology.exchanges:
            if not await declarer.declare(f"exchange {exchange.name!r}", exchange_call(exchange)):
                refused.add(f"exchange {exchange.name}")
        for queue in topology.queues:
            if not await declarer.declare(f"queue {queue.name!r}", queue_call(queue)):
                refused.add(f"queue {queue.name}")
        for binding in topology.bindings:
            if f"exchange {binding.exchange}" in refused or f"queue {binding.queue}" in refused:
                continue
            name = f"binding of queue {binding.queue!r} to exchange {binding.exchange!r} by {binding.routing_key!r}"
            await declarer.declare(name, _binding_call(binding.exchange, binding.queue, binding.routing_key))
    finally:
        await declarer.close()
    if declarer.problems:
        listing = "\n".join(f"  - {problem}" for problem in declarer.problems)
        raise TopologyError(f"{connection.address.shown}: {len(declarer.problems)} could not be declared\n{listing}")


async def ready_count(connection: Connection, queue: str) -> int | None:
    """How many messages wait in a queue, or None where there is no such queue."""
    channel = await connection.open_plain_channel()
    try:
        what = f"asking for the depth of queue {queue!r}"
        answer = await connection.call(channel.queue_declare(queue, passive=True), what, on_giving_up=ignore)
    except ChannelLockedResource as failure:
        raise UnavailableError(f"queue {queue!r}: {describe(failure)}") from failure
    except ChannelClosed as failure:
        if "NOT_FOUND" in describe(failure):
            return None
        raise UnavailableError(f"queue {queue!r}: {describe(failure)}") from failure
    finally:
        await _close(connection, channel)
    return answer.message_count or 0


def queue_arguments(queue: Queue) -> dict[str, Any]:
    """A quorum queue's arguments in RabbitMQ's terms. What is None is left out: the broker compares absent and present."""
    arguments: dict[str, Any] = {"x-queue-type": "quorum"}
    if queue.delivery_limit is not None:
        arguments["x-delivery-limit"] = queue.delivery_limit
    if queue.message_ttl_ms is not None:
        arguments["x-message-ttl"] = queue.message_ttl_ms
    if queue.single_active_consumer:
        arguments["x-single-active-consumer"] = True
    if queue.dead_letter_exchange is not None:
        arguments["x-dead-letter-exchange"] = queue.dead_letter_exchange
        if queue.dead_letter_routing_key is not None:
            arguments["x-dead-letter-routing-key"] = queue.dead_letter_routing_key
        # At-least-once asks for reject-publish; without it the broker falls back to at-most-once in silence.
        arguments["x-dead-letter-strategy"] = "at-least-once"
        arguments["x-overflow"] = "reject-publish"
    return arguments


def exchange_arguments(exchange: Exchange) -> dict[str, Any]:
    return {} if exchange.alternate is None else {"alternate-exchange": exchange.alternate}


Call = Callable[[AbstractChannel], Coroutine[Any, Any, Any]]


def exchange_call(exchange: Exchange) -> Call:
    arguments = exchange_arguments(exchange)
    return lambda channel: channel.exchange_declare(exchange.name, exchange_type=exchange.kind, durable=True, arguments=arguments)


def queue_call(queue: Queue) -> Call:
    return lambda channel: channel.queue_declare(queue.name, durable=True, arguments=queue_arguments(queue))


def _binding_call(exchange: str, queue: str, routing_key: str) -> Call:
    return lambda channel: channel.queue_bind(queue, exchange, routing_key)


class _Declarer:
    """Declares on a channel, and takes another one when the broker has closed it over a difference."""

    def __init__(self, connection: Connection) -> None:
        self.problems: list[str] = []
        self._connection = connection
        self._channel: AbstractChannel | None = None

    async def declare(self, what: str, call: Call) -> bool:
        if self._channel is None:
            self._channel = await self._connection.open_plain_channel()
        try:
            await self._connection.call(call(self._channel), f"declaring {what}", on_giving_up=ignore)
        except (ChannelPreconditionFailed, ChannelLockedResource) as failure:
            self._note(what, failure, _FIX)
        except ChannelAccessRefused as failure:
            self._note(what, failure, _PERMISSION_FIX)
        except ChannelClosed as failure:
            self._channel = None
            raise UnavailableError(f"declaring {what}, {self._connection.address.shown}: {describe(failure)}") from failure
        else:
            return True
        return False

    def _note(self, what: str, failure: ChannelClosed, fix: str) -> None:
        self._channel = None
        words = " ".join(str(argument) for argument in failure.args)
        self.problems.append(f"{what}: the broker says {words!r}; {fix}")

    async def close(self) -> None:
        if self._channel is not None:
            await _close(self._connection, self._channel)


async def _close(connection: Connection, channel: AbstractChannel) -> None:
    if channel.is_closed or connection.lost is not None:
        return
    with anyio.CancelScope(shield=True):
        try:
            await connection.call(channel.close(), "closing a channel", on_giving_up=ignore, limit_s=CLOSE_S)
        except (ChannelClosed, UnavailableError) as failure:
            log.debug("%s", describe(failure))  # The channel is gone, and it was all for nothing but itself.


def ignore(reason: str) -> None:
    """No content travels on these channels."""
