"""orderbus: event-driven services that neither lose an event nor apply an effect twice.

Typed msgspec handlers with declarative decorators, a transactional outbox and its relay, idempotent consumers, retry and
dead letter policies, on RabbitMQ, PostgreSQL and Redis, under asyncio and trio.
"""

from orderbus._core.columns import Column, columns
from orderbus._core.delivery import Batch, Delivery, Item
from orderbus._core.event import Event
from orderbus._core.policy import Park, Retry, RetryLater
from orderbus._core.settings import Settings
from orderbus._runtime.bus import Bus, new_id
from orderbus._runtime.collecting import collect_rarely
from orderbus._runtime.environment import Middleware
from orderbus._runtime.signals import run_until_signalled
from orderbus._runtime.stats import DrainReceipt, Stats
from orderbus._runtime.tx import Tx
from orderbus.errors import (
    HandlerTimeout,
    InvariantError,
    MessageError,
    OrderbusError,
    SettingsError,
    TopologyError,
    TransientError,
    UnavailableError,
    UsageError,
)

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Bus",
    "Column",
    "Delivery",
    "DrainReceipt",
    "Event",
    "HandlerTimeout",
    "InvariantError",
    "Item",
    "MessageError",
    "Middleware",
    "OrderbusError",
    "Park",
    "Retry",
    "RetryLater",
    "Settings",
    "SettingsError",
    "Stats",
    "TopologyError",
    "TransientError",
    "Tx",
    "UnavailableError",
    "UsageError",
    "collect_rarely",
    "columns",
    "new_id",
    "run_until_signalled",
]
