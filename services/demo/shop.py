"""The services as child processes, and the environment that the demo gives them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from services.demo.processes import Child

SERVICES = ("outbox_dispatcher", "payment", "inventory", "aggregator", "notification", "orders_api")


def surroundings(port: int) -> dict[str, str]:
    """Where the API listens, how flaky the gateway is, and where notices go."""
    return {
        "ORDERS_API_PORT": str(port),
        "ORDERS_API_HOST": "127.0.0.1",
        "PAYMENT_FLAKY": os.environ.get("PAYMENT_FLAKY", "0.005"),
        "NOTIFY_URL": os.environ.get("NOTIFY_URL", "null:"),
    }


def free_port() -> int:
    """For the API."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


RUNNING = "orderbus: running:"
"""What `orderbus run` logs when its queues are bound. An order that is placed before would pass by those that are not."""


def children(apart: bool, environment: Mapping[str, str], folder: Path) -> list[Child]:
    """A process for each service, or one for all of them; not yet started."""
    if not apart:
        return [Child("together", ["-m", "services.demo.together"], environment, folder)]
    found = [
        Child(name, ["-m", "orderbus", "run", f"services.{name}:bus"], environment, folder)
        for name in SERVICES
        if name != "orders_api"
    ]
    return [*found, Child("orders_api", ["-m", "services.orders_api"], environment, folder)]
