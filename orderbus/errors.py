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


PAGE = "https://github.com/orderbus/orderbus/blob/main/docs/errors.md"
"""Has the cause and the fix of each code, under the code as its anchor."""


class OrderbusError(Exception):
    """The root of every error that orderbus raises itself."""

    code: str | None = None
    """Stable, such as `OB204`: docs/errors.md says its cause and its fix. None in an error that your own code made."""


class UsageError(OrderbusError):
    """The program uses orderbus wrongly. The text names the thing and the fix; raised at definition or at start.

    Printed, it ends with its code and the address of the code's paragraph; `text` is without.
    """

    def __init__(self, text: str, *, code: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return with_code(self.text, self.code)


class SettingsError(UsageError):
    """One or more settings are wrong; the text lists every mistake at once, with secrets masked."""

    code = "OB101"

    def __init__(self, mistakes: list[str]) -> None:
        self.mistakes = mistakes
        super().__init__("wrong settings:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))


class TopologyError(UsageError):
    """The broker already has a queue or exchange of that name with other arguments. What differs was not changed."""

    code = "OB501"


class MessageError(OrderbusError):
    """A message is not what its handler can read. It is parked at once: retrying would not change it.

    `reason` is a short stable word (`malformed-properties`, `body-too-large`, `undecodable`, `wrong-type`, …), used as a label.
    """

    code = "OB804"

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


class UnavailableError(OrderbusError):
    """A server could not be reached, or dropped the connection. Retried without counting as an attempt."""

    code = "OB801"


class TransientError(UnavailableError):
    """The database asks to run the transaction again: deadlock, serialization failure or lock timeout. Retried at once, uncounted."""

    code = "OB802"


class HandlerTimeout(OrderbusError, TimeoutError):
    """A handler ran longer than its `timeout=`. It was cancelled and its transaction rolled back."""

    code = "OB803"


class InvariantError(OrderbusError):
    """A bug in orderbus: something that must hold did not. Please report it."""

    code = "OB901"


def with_code(text: str, code: str | None) -> str:
    """A text with the code and the address of its paragraph; on a line of its own below a list."""
    if code is None:
        return text
    apart = "\n" if "\n" in text else " "
    return f"{text}{apart}[{code}: {PAGE}#{code.lower()}]"
