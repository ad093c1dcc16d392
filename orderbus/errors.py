"""The errors of orderbus, sorted by who must act on them."""

from __future__ import annotations

__all__ = [
    "HandlerTimeout",
    "InvariantError",
    "MessageError",
    "OrderbusError",
    "SettingsError",
    "TopologyError",
    "TransientError",
    "UnavailableError",
    "UsageError",
]


class OrderbusError(Exception):
    """The root of every error that orderbus raises itself."""


class UsageError(OrderbusError):
    """The program uses orderbus wrongly. The text names the thing and the fix; raised at definition or at start."""


class SettingsError(UsageError):
    """One or more settings are wrong; the text lists every mistake at once, with secrets masked."""

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("wrong settings:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))


class TopologyError(UsageError):
    """The broker already has a queue or exchange of that name with other arguments. What differs was not changed."""


class MessageError(OrderbusError):
    """A message is not what its handler can read. It is parked at once: retrying would not change it.

    `reason` is a short stable word (`malformed-properties`, `body-too-large`, `undecodable`, `wrong-type`, …), used as a label.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


class UnavailableError(OrderbusError):
    """A server could not be reached, or dropped the connection. Retried without counting as an attempt."""


class TransientError(UnavailableError):
    """The database asks to run the transaction again: deadlock, serialization failure or lock timeout. Retried at once, uncounted."""


class HandlerTimeout(OrderbusError, TimeoutError):
    """A handler ran longer than its `timeout=`. It was cancelled and its transaction rolled back."""


class InvariantError(OrderbusError):
    """A bug in orderbus: something that must hold did not. Please report it."""
