"""A missing server is told of once, then every ten seconds: hundreds of deliveries that wait for it would each say the same."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import anyio

log = logging.getLogger("orderbus.consumer")

SAID_AGAIN_S = 10.0
OVER_AFTER_S = 1.0
"""It is over when something is handled and nothing has met it for so long: with a server that answers now and then, it goes on."""


class Outage:
    """What a consumer knows of the server that its handlers miss."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._said = self._met = 0.0
        self._tries = 0
        self._of_all: dict[str, str] = {}

    def met(self, consumer: str, event_id: object, error: str, delay_s: float, about: Mapping[str, str]) -> None:
        """A try failed for want of the server, and comes again in `delay_s`. `about` goes into the fields of its line."""
        self._met = now = anyio.current_time()
        self._tries += 1
        if self._began is None:
            self._began = self._said = now
            self._of_all = {name: text for name, text in about.items() if name.startswith("orderbus.")}
            log.warning("%s: event %s: %s; again in %.1f s", consumer, event_id, error, delay_s, extra=about)
        elif now >= self._said + SAID_AGAIN_S:
            self._said = now
            tries, waited_s = self._tries, now - self._began
            log.warning("%s: %d tries in %.0f s have met: %s; still trying", consumer, tries, waited_s, error, extra=about)

    def passed(self, consumer: str) -> None:
        """Something was handled."""
        if self._began is not None and anyio.current_time() >= self._met + OVER_AFTER_S:
            tries, waited_s = self._tries, self._met - self._began
            extra = {**self._of_all, "orderbus.consumer": consumer}
            log.warning("%s: goes on; %d tries in %.1f s had met a missing server", consumer, tries, waited_s, extra=extra)
            self._began, self._tries = None, 0
