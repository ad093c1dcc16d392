"""A start that fails for want of a server says which, where, since when, and what was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from orderbus.errors import UnavailableError


@contextmanager
def starting(group: str, step: str, clock: Callable[[], float]) -> Iterator[None]:
    """Add to an UnavailableError of a block who could not start, what was tried, how long, and since when.

    A start is not repeated: whoever runs the process (systemd, Kubernetes, compose) does that, and sees why.
    """
    began_s = clock()
    try:
        yield
    except UnavailableError as error:
        since = datetime.fromtimestamp(began_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        raise type(error)(
            f"the bus {group!r} can't start: {error}; tried once, for {max(clock() - began_s, 0.0):.1f} s since {since}: {step}"
        ) from error
