"""Looking into a dead letter queue: its letters are held while they are looked at, and go back, in their order, afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from orderbus._core.message import Incoming, Settlement
from orderbus._core.parked import is_dead_letter_queue
from orderbus.abc import Broker, Subscription
from orderbus.errors import UnavailableError, UsageError

MOST_HELD = 65_535
"""As many as AMQP lets a consumer hold, and what every look holds unless told otherwise.

A quorum queue hands out first what was given back to it, and puts what is given back behind that (RabbitMQ 3.10). So a look that
holds fewer letters than an earlier one had held leaves them behind the rest of those; one that holds as many keeps their order.
"""
QUIET_S = 5.0
"""Fewer may come than were counted, when somebody else looks or replays at the same time: after this long nothing more comes."""
FLUSH_S = 30.0


@asynccontextmanager
async def look_into(broker: Broker, queue: str, hold: int) -> AsyncIterator[Look]:
    """Hold at most `hold` letters of a dead letter queue for the length of a block.

    Raises UsageError where there is no such queue, or it keeps no dead letters; UnavailableError.
    """
    if not is_dead_letter_queue(queue):
        raise UsageError(
            f"{queue!r} is not a dead letter queue; did you mean {queue + '.dlq'!r}? Looking into a queue that is consumed would "
            f"take work from its consumers, and count against its delivery limit",
            code="OB701",
        )
    if not 1 <= hold <= MOST_HELD:
        raise UsageError(f"hold={hold!r}: from 1 to {MOST_HELD} letters", code="OB702")
    ready = await broker.depth(queue)
    if not ready:
        yield Look(None, 0, hold)
        return
    prefetch = min(ready, hold)
    async with broker.subscribe(queue, prefetch=prefetch) as subscription:
        yield Look(subscription, ready, prefetch)


class Look:
    """The letters that lay in a queue when it was opened. What is not taken goes back, in its order, when it is left."""

    def __init__(self, subscription: Subscription | None, ready: int, prefetch: int) -> None:
        self._subscription = subscription
        self._prefetch = prefetch
        self._held = 0
        self.ready = ready
        self.looked_at = 0

    async def more(self) -> Sequence[Incoming]:
        """The next ones; none when all were seen, as many are held as may be, or nothing more comes."""
        if self._subscription is None or self.looked_at >= self.ready or self._held >= self._prefetch:
            return ()
        with anyio.move_on_after(QUIET_S):
            deliveries = (await self._subscription.receive())[: self.ready - self.looked_at]
            self.looked_at += len(deliveries)
            self._held += len(deliveries)
            return deliveries
        return ()

    def take(self, delivery: Incoming) -> None:
        """Out of the queue, for good."""
        assert self._subscription is not None
        self._subscription.settle(delivery, Settlement.ACK)
        self._held -= 1

    async def flush(self) -> None:
        """So that nothing that was taken comes back only because the connection was closed too early."""
        assert self._subscription is not None
        try:
            with anyio.fail_after(FLUSH_S):
                await self._subscription.flush()
        except TimeoutError as error:
            raise UnavailableError(f"the broker did not take the acknowledgements within {FLUSH_S:g} s") from error
