"""Dead letters: look at them without taking them, and send them back to their queues."""

from __future__ import annotations

import enum
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import msgspec

from orderbus._core.leaving import replayed_message
from orderbus._core.message import Incoming, Receipt, Settlement
from orderbus._core.parked import EVERYTHING, Parked, Wanted, is_dead_letter_queue, read_parked, refusal
from orderbus.abc import Broker, Subscription
from orderbus.errors import UnavailableError, UsageError

HOLD = 1_000
MOST_HELD = 65_535
BATCH = 100
QUIET_S = 5.0
"""Fewer may come than were counted, when somebody else looks or replays at the same time: after this long nothing more comes."""
PUBLISH_S = 60.0
FLUSH_S = 30.0


class Outcome(enum.Enum):
    """What a replay did with a letter."""

    REPLAYED = "replayed"
    """It is in its queue again, and no longer here."""
    WOULD_REPLAY = "would-replay"
    """A dry run would have been a replay."""
    REFUSED = "refused"
    """A replay would be no use; it stays."""
    FAILED = "failed"
    """The broker did not confirm it. It stays, and may be in its queue as well: replaying it again does no harm."""


class Listing(msgspec.Struct, frozen=True):
    """Dead letters of one queue, oldest first."""

    queue: str
    ready: int
    """How many the queue held."""
    looked_at: int
    """How many of them were looked at, from the oldest on."""
    letters: tuple[Parked, ...]
    """Those of them that were wanted, up to the limit."""


class Replay(msgspec.Struct, frozen=True):
    """What became of the letters of one queue."""

    queue: str
    ready: int
    looked_at: int
    counts: dict[Outcome, int]

    @property
    def complete(self) -> bool:
        """Whether none that was wanted and seen stays behind: none refused, none failed."""
        return not (self.counts[Outcome.REFUSED] or self.counts[Outcome.FAILED])


Tell = Callable[[Parked, Outcome, str], None]
"""Told of each letter: what became of it, and why."""


class DeadLetters:
    """The dead letter queues of a broker, for those who look after them. Works on every broker, in the broker's process or not.

    `window_s` is the dedupe window of the consumers: an older event is refused, for its consumer would only park it again.
    """

    def __init__(self, broker: Broker, *, window_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        self._broker = broker
        self._window_s = window_s
        self._clock = clock

    async def list(self, queue: str, wanted: Wanted = EVERYTHING, *, limit: int = 100, hold: int = HOLD) -> Listing:
        """The oldest `limit` wanted letters of a dead letter queue. They stay in it, in their order.

        To see the next letter one must hold the ones before it: at most `hold` (1 to 65,535) are held, and kept in memory,
        and the rest stays out of sight. While they are held, and for a moment after (a quorum queue takes them back when it
        notices that the channel is gone), a second look finds only what is left. Cancelled, it has taken nothing. Raises
        UsageError where there is no such queue, or it keeps no dead letters; UnavailableError.
        """
        found: list[Parked] = []
        async with self._look(queue, hold) as look:
            while len(found) < limit and (deliveries := await look.more()):
                found += [letter for letter in map(read_parked, deliveries) if wanted.matches(letter)]
        return Listing(queue, look.ready, look.looked_at, tuple(found[:limit]))

    async def replay(
        self,
        queue: str,
        wanted: Wanted = EVERYTHING,
        *,
        limit: int | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        hold: int = HOLD,
        tell: Tell | None = None,
    ) -> Replay:
        """Send the oldest wanted letters (up to `limit`) back to their queues, at most `rate` a second.

        Each is published, confirmed, then acknowledged: killed or cancelled at any moment it loses nothing, and a letter that
        is replayed twice keeps its event id, so that its handler's effect is applied once. Only those that lay there at the
        beginning are replayed: what fails again waits for the next call. Letters that are not wanted are held meanwhile, at
        most `hold`. Raises UsageError as `list` does; UnavailableError when the broker goes, after telling what has failed.
        """
        if rate is not None and not rate > 0:
            raise UsageError(f"rate={rate!r}: letters a second, more than 0")
        pace = _Pace(rate)
        counts = dict.fromkeys(Outcome, 0)

        def count(letter: Parked, outcome: Outcome, why: str = "") -> None:
            counts[outcome] += 1
            if tell is not None:
                tell(letter, outcome, why)

        left = limit
        async with self._look(queue, hold) as look:
            while (left is None or left > 0) and (deliveries := await look.more()):
                chosen = [(letter, delivery) for delivery in deliveries if wanted.matches(letter := read_parked(delivery))][:left]
                if left is not None:
                    left -= len(chosen)
                await self._send(look, self._possible(chosen, count), pace, dry_run, count)
            if counts[Outcome.REPLAYED]:
                await look.flush()
        return Replay(queue, look.ready, look.looked_at, counts)

    def _possible(
        self, chosen: Sequence[tuple[Parked, Incoming]], count: Callable[..., None]
    ) -> Sequence[tuple[Parked, Incoming]]:
        possible = []
        for letter, delivery in chosen:
            why = refusal(letter, now_s=self._clock(), window_s=self._window_s)
            if why is None:
                possible.append((letter, delivery))
            else:
                count(letter, Outcome.REFUSED, why)
        return possible

    async def _send(
        self, look: _Look, chosen: Sequence[tuple[Parked, Incoming]], pace: _Pace, dry_run: bool, count: Callable[..., None]
    ) -> None:
        for start in range(0, len(chosen), pace.batch):
            batch = chosen[start : start + pace.batch]
            if dry_run:
                for letter, _ in batch:
                    count(letter, Outcome.WOULD_REPLAY)
                continue
            await pace.wait(len(batch))
            try:
                receipts = await self._publish(batch)
            except UnavailableError as error:
                for letter, _ in batch:
                    count(letter, Outcome.FAILED, str(error))
                raise
            for (letter, delivery), receipt in zip(batch, receipts, strict=True):
                if receipt is Receipt.CONFIRMED:
                    look.replayed(delivery)
                    count(letter, Outcome.REPLAYED)
                else:
                    count(letter, Outcome.FAILED, _why(receipt, letter))

    async def _publish(self, batch: Sequence[tuple[Parked, Incoming]]) -> Sequence[Receipt]:
        try:
            with anyio.fail_after(PUBLISH_S):
                return await self._broker.publish([replayed_message(delivery, letter.origin) for letter, delivery in batch])
        except TimeoutError as error:
            raise UnavailableError(f"the broker did not confirm within {PUBLISH_S:g} s; it may be blocked by an alarm") from error

    @asynccontextmanager
    async def _look(self, queue: str, hold: int) -> AsyncIterator[_Look]:
        if not is_dead_letter_queue(queue):
            raise UsageError(
                f"{queue!r} is not a dead letter queue (their names end in .dlq): looking into a queue that is consumed would "
                f"take work from its consumers, and count against its delivery limit"
            )
        if not 1 <= hold <= MOST_HELD:
            raise UsageError(f"hold={hold!r}: from 1 to {MOST_HELD} letters")
        ready = await self._broker.depth(queue)
        if not ready:
            yield _Look(None, 0, hold)
            return
        prefetch = min(ready, hold)
        async with self._broker.subscribe(queue, prefetch=prefetch) as subscription:
            yield _Look(subscription, ready, prefetch)


class _Look:
    """The letters that lay in a queue when it was opened. What is not settled goes back, in its order, when it is left."""

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

    def replayed(self, delivery: Incoming) -> None:
        assert self._subscription is not None
        self._subscription.settle(delivery, Settlement.ACK)
        self._held -= 1

    async def flush(self) -> None:
        """So that no letter is here and there only because the connection was closed too early."""
        assert self._subscription is not None
        try:
            with anyio.fail_after(FLUSH_S):
                await self._subscription.flush()
        except TimeoutError as error:
            raise UnavailableError(f"the broker did not take the acknowledgements within {FLUSH_S:g} s") from error


class _Pace:
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


def _why(receipt: Receipt, letter: Parked) -> str:
    return {
        Receipt.UNROUTABLE: f"there is no queue {letter.origin!r}: start its consumer, which declares it, and replay again",
        Receipt.REFUSED: f"the broker refused it for {letter.origin!r}",
    }.get(receipt, "the connection ended before the confirm: it may be in its queue as well; replay again")
