"""The exchange and the queues. The dispatcher declares all of them before it publishes: what a queue that is not bound yet
misses while another one takes it, no confirm and no return tells."""

from __future__ import annotations

from faststream.rabbit import ExchangeType, QueueType, RabbitBroker, RabbitExchange, RabbitQueue

EVENTS = RabbitExchange("shop.events", type=ExchangeType.DIRECT, durable=True)
CONSUMED = {
    "payment": ("orders.placed", "orders.cancelled"),
    "inventory": ("orders.placed", "orders.cancelled"),
    "aggregator": ("payments.authorized", "payments.declined", "inventory.reserved", "inventory.rejected"),
    "notification": ("orders.confirmed", "orders.cancelled"),
}
DELIVERIES = 10
"""After so many failures a quorum queue moves a message to the dead letters."""


def queue(service: str, topic: str) -> RabbitQueue:
    """A durable quorum queue for a service and a topic."""
    arguments = {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{service}.{topic}.dlq",
        "x-delivery-limit": DELIVERIES,
    }
    return RabbitQueue(f"{service}.{topic}", QueueType.QUORUM, routing_key=topic, arguments=arguments)


async def declare_all(broker: RabbitBroker) -> None:
    """All that is consumed, bound, each with its dead letters beside it."""
    exchange = await broker.declare_exchange(EVENTS)
    for service, topics in CONSUMED.items():
        for topic in topics:
            await broker.declare_queue(RabbitQueue(f"{service}.{topic}.dlq", QueueType.QUORUM))
            declared = await broker.declare_queue(queue(service, topic))
            await declared.bind(exchange, routing_key=topic)
