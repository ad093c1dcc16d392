"""How fast dead letters are sent on."""

from __future__ import annotations

import anyio

BATCH = 100


class Pace:
    """At most `rate` letters a second, in batches of a tenth of a second."""

    def __init__(self, rate: float | None) -> None:
        self._rate = rate
        self._next_at: float | None = None
        self.batch = BATCH if rate is None else min(BATCH, max(1, int(rate / 10)))

    async def wait(self, count: int) -> None:
        if self._rate is None:
            return
        now = anyio.current_time()
        at = max(now, self._next_at or now)
        await anyio.sleep(at - now)
        self._next_at = at + count / self._rate
