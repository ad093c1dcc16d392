"""A consumer of a memory queue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import anyio
from anyio.lowlevel import checkpoint

from orderbus._core.message import Incoming, Settlement
from orderbus.adapters.memory.queue import MemoryQueue, Stored
from orderbus.errors import InvariantError, UnavailableError, UsageError

__all__ = ["MemorySubscription"]


class _Owner(Protocol):
    """What a subscription needs of its broker."""

    next_expiry: float

    def expire(self) -> None: ...
    def forget(self, stored: Stored) -> None: ...
    def reject(self, queue: MemoryQueue, stored: Stored) -> None: ...
    def give_back(self, queue: MemoryQueue, returned: Sequence[Stored]) -> None: ...


class MemorySubscription:
    """Implements `orderbus.abc.Subscription`. Messages stay in the queue until `receive` takes them."""

    def __init__(self, owner: _Owner, queue: MemoryQueue, prefetch: int, epoch: int) -> None:
        self._owner = owner
        self._queue = queue
        self._prefetch = prefetch
        self._epoch = epoch
        self._unsettled: dict[int, Stored] = {}
        self._last_tag = 0
        self._event: anyio.Event | None = None
        self._is_paused = False
        self._is_forsaken = False
        self._ended_because: str | None = None

    async def receive(self) -> Sequence[Incoming]:
        """What is ready, at least one and up to the prefetch. Raises UnavailableError once the subscription has ended.

        A cancelled call has taken nothing. After `pause` it waits until it is cancelled or the subscription ends. Raises
        UsageError where another task is waiting in it.
        """
        await checkpoint()
        while True:
            if self._ended_because is not None:
                raise UnavailableError(self._ended_because)
            self._owner.expire()
            if self.wants_more() and self._queue.may_take(self):
                taken = self._queue.take(self._prefetch - len(self._unsettled))
                self._queue.notify()
                if taken:
                    return self._deliver(taken)
            await self._wait()

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        """Takes effect at once. Raises InvariantError for a delivery that was settled before."""
        if delivery.epoch != self._epoch or self._ended_because is not None or self._is_forsaken:
            return
        stored = self._unsettled.pop(delivery.tag, None)
        if stored is None:
            raise InvariantError(f"{delivery!r} was settled twice")
        if how is Settlement.ACK:
            self._owner.forget(stored)
        elif how is Settlement.DEAD_LETTER:
            self._owner.reject(self._queue, stored)
        else:
            self._owner.give_back(self._queue, (stored,))
        if self._event is not None:
            self._queue.notify()

    def tried(self, delivery: Incoming) -> None:
        """Nothing waits for it: a consumer in this process that is killed takes the queue with it."""

    async def pause(self) -> None:
        """Hand over nothing more. Where the queue has a single active consumer, this one stays it until it leaves.

        Raises UnavailableError once the subscription has ended.
        """
        await checkpoint()
        if self._ended_because is not None:
            raise UnavailableError(self._ended_because)
        self._is_paused = True
        self._queue.notify()

    async def flush(self) -> None:
        """Settlements take effect at once; there is nothing to wait for. Raises UnavailableError once the subscription has ended."""
        await checkpoint()
        if self._ended_because is not None:
            raise UnavailableError(self._ended_because)

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    @property
    def holds(self) -> int:
        """How many deliveries are unsettled."""
        return len(self._unsettled)

    def wants_more(self) -> bool:
        return not self._is_paused and len(self._unsettled) < self._prefetch

    def wake(self) -> None:
        if self._event is not None:
            self._event.set()

    def end(self, because: str) -> list[Stored]:
        """No more deliveries and no more settlements; what was unsettled, in the order of its delivery."""
        self._ended_because = because
        unsettled = list(self._unsettled.values())
        self._unsettled.clear()
        self.wake()
        return unsettled

    def forsake(self) -> list[Stored]:
        """Its queue is deleted; what was unsettled. One that is paused has no consumer any more, so nobody tells it: it waits on."""
        self._is_forsaken = True
        unsettled = list(self._unsettled.values())
        self._unsettled.clear()
        return unsettled

    def _deliver(self, taken: Sequence[Stored]) -> list[Incoming]:
        queue, epoch, unsettled, tag = self._queue.name, self._epoch, self._unsettled, self._last_tag
        delivered = []
        for stored in taken:
            tag += 1
            unsettled[tag] = stored
            delivered.append(
                Incoming(
                    queue=queue,
                    exchange=stored.exchange,
                    routing_key=stored.routing_key,
                    body=stored.body,
                    tag=tag,
                    epoch=epoch,
                    redelivered=stored.deliveries > 0,
                    properties=stored.delivered_properties(),
                )
            )
        self._last_tag = tag
        return delivered

    async def _wait(self) -> None:
        """Until somebody wakes us or the next message of the broker expires: waiting consumers are its only clock."""
        if self._event is not None:
            raise UsageError(
                f"two tasks receive from one subscription of {self._queue.name!r}; let one receive and hand on", code="OB508"
            )
        self._event = anyio.Event()
        self._queue.waiting[self] = None
        try:
            if self._owner.next_expiry == math.inf:
                await self._event.wait()
            else:
                with anyio.CancelScope(deadline=self._owner.next_expiry):
                    await self._event.wait()
        except BaseException:
            self._queue.woken(self)
            self._queue.notify()  # cancelled just when it was woken: the next one must hear of the message
            raise
        finally:
            self._queue.woken(self)
            self._event = None
