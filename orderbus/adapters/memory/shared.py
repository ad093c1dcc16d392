"""What `memory://` and `memory://NAME` mean: a private object, or one shared by its name within the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from anyio.lowlevel import EventLoopToken, current_token

from orderbus.errors import UsageError

__all__ = ["SharedByName"]

T = TypeVar("T")


class SharedByName(Generic[T]):
    """Objects that live as long as somebody has them open, like the shared cache of SQLite.

    `memory://NAME` belongs to the event loop that opened it first: its objects are not safe between threads or loops.
    """

    def __init__(self, what: str, make: Callable[[], T]) -> None:
        self._what = what
        self._make = make
        self._lock = threading.Lock()
        # Weak, so that an opener whose event loop died without closing does not keep the content (and the name) for ever.
        self._entries: WeakValueDictionary[str, _Entry[T]] = WeakValueDictionary()

    @contextmanager
    def open(self, url: str) -> Iterator[T]:
        """The object for this URL, from within a running event loop. Raises UsageError for a wrong URL or another loop."""
        name = _name_in(url, self._what)
        if not name:
            yield self._make()
            return
        entry = self._enter(name, url)
        try:
            yield entry.value
        finally:
            self._leave(name, entry)

    def lend(self, name: str, value: T) -> object:
        """Have `memory://NAME` mean `value` in this event loop, for as long as the caller keeps what this returns.

        For a test that stands between a bus and its servers. Nobody may have the name open.
        """
        entry = self._entries[name] = _Entry(value, current_token())
        return entry

    def _enter(self, name: str, url: str) -> _Entry[T]:
        home = current_token()
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                entry = self._entries[name] = _Entry(self._make(), home)
            elif entry.home != home:
                raise UsageError(
                    f"{url} is open in another event loop or thread, and a memory {self._what} can't be shared between them: "
                    f"use another name there, or run everything that shares it in one event loop",
                    code="OB107",
                )
            entry.openers += 1
            return entry

    def _leave(self, name: str, entry: _Entry[T]) -> None:
        with self._lock:
            entry.openers -= 1
            if not entry.openers and self._entries.get(name) is entry:
                del self._entries[name]


class _Entry(Generic[T]):
    def __init__(self, value: T, home: EventLoopToken) -> None:
        self.value = value
        self.home = home
        self.openers = 0


def _name_in(url: str, what: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "memory" or parts.path.strip("/") or parts.query or parts.fragment:
        raise UsageError(
            f"{url!r} is no URL of a memory {what}: write memory:// for a private one, memory://NAME to share it", code="OB106"
        )
    return parts.netloc
