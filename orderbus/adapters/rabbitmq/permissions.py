"""What a bus must be permitted to do beside declaring its topology, and which of it the broker's user may not."""

from __future__ import annotations

from functools import partial
from typing import Any

from aiormq.abc import AbstractChannel

from orderbus._core.topology import EVENTS_EXCHANGE, RETRY_STEPS_S, RETURN_EXCHANGE, Topology, retry_exchange
from orderbus.adapters.rabbitmq.address import parse_addresses
from orderbus.adapters.rabbitmq.asking import Asking
from orderbus.adapters.rabbitmq.connection import connect_to_one

__all__ = ["missing_permissions"]

DEFAULT_EXCHANGE = ""
"""By it a message is parked."""
_NOWHERE = "orderbus.check"


async def missing_permissions(url: str, topology: Topology, *, relays: bool) -> list[str]:
    """In words, such as "read queue 'payment.authorize'"; what is not there yet is passed over. Raises UnavailableError.

    It leaves nothing behind, and takes no message: what is published is rolled back, and the consumer that is asked for has an
    argument that the broker refuses after it has looked at the permission (406 PRECONDITION_FAILED; seen on RabbitMQ 3.10).
    """
    consumes = [binding.queue for binding in topology.bindings if binding.exchange == RETURN_EXCHANGE]
    exchanges = [EVENTS_EXCHANGE] if relays else []
    if consumes:
        exchanges += [DEFAULT_EXCHANGE, *(retry_exchange(step) for step in RETRY_STEPS_S)]
    connection = await connect_to_one(parse_addresses(url), "orderbus check")
    try:
        asking = Asking(connection)
        missing = []
        for exchange in exchanges:
            if _is_denied(await asking.ask(partial(_publish, exchange))):
                missing.append(f"write to exchange {exchange or 'amq.default'!r}")
        for queue in consumes:
            if _is_denied(await asking.ask(partial(_consume, queue))):
                missing.append(f"read queue {queue!r}")
        return missing
    finally:
        await connection.close()


async def _publish(exchange: str, channel: AbstractChannel) -> None:
    await channel.tx_select()
    await channel.basic_publish(b"", exchange=exchange, routing_key=_NOWHERE)
    await channel.tx_rollback()


async def _consume(queue: str, channel: AbstractChannel) -> None:
    await channel.basic_consume(queue, _never, arguments={"x-priority": "none"})


async def _never(_: Any) -> None:
    """For a consumer that does not come to be."""


def _is_denied(refused: str | None) -> bool:
    return refused is not None and "ACCESS_REFUSED" in refused
