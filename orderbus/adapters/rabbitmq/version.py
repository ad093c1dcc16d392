"""Which RabbitMQ answers."""

from __future__ import annotations

from orderbus.adapters.rabbitmq.address import parse_addresses
from orderbus.adapters.rabbitmq.connection import connect_to_one

__all__ = ["server_version"]


async def server_version(url: str) -> str:
    """Connect, read what the server says of itself, and leave. Raises UnavailableError, naming host and port, and UsageError."""
    connection = await connect_to_one(parse_addresses(url), "orderbus check")
    try:
        said = connection._control.server_properties
    finally:
        await connection.close()
    return f"{_text(said.get('product'))} {_text(said.get('version'))}"


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
