"""Calls of other people's code: a cancellation that comes out of it without anybody having cancelled us is an error of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from orderbus.errors import UsageError


@contextmanager
def no_stray_cancellation(place: str) -> Iterator[None]:
    """Raises UsageError for a cancellation that nobody around us asked for.

    Under asyncio, awaiting a future or task that somebody cancelled raises CancelledError; let through, it would end the task
    that called, in silence, as if it had been cancelled itself.
    """
    try:
        yield
    except anyio.get_cancelled_exc_class() as error:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        raise UsageError(
            f"{place}: awaited a task or future that was cancelled; catch CancelledError where that is expected"
        ) from error
