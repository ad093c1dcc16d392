"""Dead letters: look at them without taking them; send them back to their queues, edit, remove and restore them."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from uuid import UUID

import anyio
import msgspec

from orderbus._core.leaving import replayed_message
from orderbus._core.letter_record import edited_message, fingerprint, returned_message
from orderbus._core.message import Incoming, Outgoing, Receipt
from orderbus._core.parked import EVERYTHING, Parked, Wanted, read_parked, refusal
from orderbus._core.signing import SigningKeys
from orderbus._runtime.looking import MOST_HELD, Look, look_into
from orderbus._runtime.pace import Pace
from orderbus.abc import Broker
from orderbus.errors import UnavailableError, UsageError

PUBLISH_S = 60.0
RETURN_S = 5.0


class Outcome(enum.Enum):
    """What was done with a letter. Those that begin with `would-` are of a dry run, which does nothing."""

    REPLAYED = "replayed"
    """It is in its queue again, and no longer here."""
    WOULD_REPLAY = "would-replay"
    PURGED = "purged"
    """It is nowhere any more."""
    WOULD_PURGE = "would-purge"
    EDITED = "edited"
    """It is in its queue again with another body, and no longer here."""
    WOULD_EDIT = "would-edit"
    IMPORTED = "imported"
    """It is here again."""
    WOULD_IMPORT = "would-import"
    PRESENT = "present"
    """It was here already: the same id with the same body."""
    REFUSED = "refused"
    """It would be no use; it stays."""
    FAILED = "failed"
    """The broker did not confirm it. It may be here, and in its queue as well: doing it again does no harm."""


class Looked(msgspec.Struct, frozen=True):
    """How far a look went."""

    queue: str
    ready: int
    """How many the queue held."""
    looked_at: int
    """How many of them were looked at, from the oldest on."""


class Listing(Looked, frozen=True):
    """Dead letters of one queue, oldest first."""

    letters: tuple[Parked, ...]
    """Those of them that were wanted, up to the limit."""


class Tally(Looked, frozen=True):
    """What became of the letters of one queue."""

    counts: dict[Outcome, int]

    @property
    def complete(self) -> bool:
        """Whether none that was wanted and seen was left as it was: none refused, none failed."""
        return not (self.counts[Outcome.REFUSED] or self.counts[Outcome.FAILED])


Tell = Callable[[Parked, Outcome, str], None]
"""Told of each letter: what became of it, and why."""


class DeadLetters:
    """The dead letter queues of a broker, for those who look after them. Works on every broker, in the broker's process or not.

    `window_s` is the dedupe window of the consumers: an older event is refused, for its consumer would only park it again.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        window_s: float | None = None,
        signing: SigningKeys | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._window_s = window_s
        self._signing = signing
        self._clock = clock

    async def list(self, queue: str, wanted: Wanted = EVERYTHING, *, limit: int = 100, hold: int = MOST_HELD) -> Listing:
        """The oldest `limit` wanted letters of a dead letter queue. They stay in it, in their order.

        To see the next letter one must hold the ones before it: at most `hold` (1 to 65,535) are held, and kept in memory,
        and the rest stays out of sight. Fewer than an earlier look has held change their order (see looking.py). While they are
        held, and for a moment after (a quorum queue takes them back when it notices that the channel is gone), a second look
        finds only what is left. Cancelled, it has taken nothing. Raises UsageError where there is no such queue, or it keeps no
        dead letters; UnavailableError.
        """
        found: list[Incoming] = []
        looked = await self.visit(queue, found.extend, wanted, limit=limit, hold=hold)
        return Listing(queue, looked.ready, looked.looked_at, tuple(map(read_parked, found)))

    async def visit(
        self,
        queue: str,
        each: Callable[[Sequence[Incoming]], object],
        wanted: Wanted = EVERYTHING,
        *,
        limit: int | None = None,
        hold: int = MOST_HELD,
    ) -> Looked:
        """Show the same letters, as they are, to `each`, some at a time; none is kept here. Raises as `list` does."""
        left = limit
        async with look_into(self._broker, queue, hold) as look:
            while (left is None or left > 0) and (deliveries := await look.more()):
                found = [delivery for delivery in deliveries if wanted.matches(read_parked(delivery))][:left]
                each(found)
                if left is not None:
                    left -= len(found)
        return Looked(queue, look.ready, look.looked_at)

    async def returned(self, queue: str, count: int) -> None:
        """Wait until a queue has so many again that were held, at most RETURN_S: somebody else may have taken them."""
        with anyio.move_on_after(RETURN_S):
            while await self._broker.depth(queue) < count:
                pass

    async def replay(
        self,
        queue: str,
        wanted: Wanted = EVERYTHING,
        *,
        limit: int | None = None,
        rate: float | None = None,
        dry_run: bool = False,
        hold: int = MOST_HELD,
        tell: Tell | None = None,
    ) -> Tally:
        """Send the oldest wanted letters (up to `limit`) back to their queues, at most `rate` a second.

        Each is published, confirmed, then acknowledged: killed or cancelled at any moment it loses nothing, and a letter that
        is replayed twice keeps its event id, so that its handler's effect is applied once. Letters of one key are replayed in
        their order: each after the confirm of the one before, and none after one that was not confirmed. Only those that lay
        there at the beginning are replayed: what fails again waits for the next call. Letters that are not wanted are held
        meanwhile, at most `hold`. Raises UsageError as `list` does; UnavailableError when the broker goes, after telling what
        has failed.
        """
        if rate is not None and not rate > 0:
            raise UsageError(f"rate={rate!r}: letters a second, more than 0", code="OB702")
        count, sending = _Count(tell), _Sending(self._broker, Pace(rate))
        async with look_into(self._broker, queue, hold) as look:
            while deliveries := await look.more():
                chosen = self._possible(_chosen(deliveries, wanted, limit, count), count)
                if dry_run:
                    for letter, _ in chosen:
                        count(letter, Outcome.WOULD_REPLAY)
                else:
                    await sending.send(look, chosen, count)
                if count.reached(limit):
                    break
            if count.counts[Outcome.REPLAYED]:
                await look.flush()
        return Tally(queue, look.ready, look.looked_at, count.counts)

    async def purge(
        self,
        queue: str,
        wanted: Wanted = EVERYTHING,
        *,
        limit: int | None = None,
        dry_run: bool = False,
        hold: int = MOST_HELD,
        keep: Callable[[Sequence[Incoming]], None] | None = None,
        tell: Tell | None = None,
    ) -> Tally:
        """Remove the oldest wanted letters (up to `limit`) for good, after `keep` has stored them. Raises as `list` does.

        A letter is told of as purged once the broker has taken its acknowledgement; as failed where the broker was lost before.
        """
        count = _Count(tell)
        async with look_into(self._broker, queue, hold) as look:
            while deliveries := await look.more():
                chosen = _chosen(deliveries, wanted, limit, count)
                if keep is not None and not dry_run:
                    keep([delivery for _, delivery in chosen])
                if dry_run:
                    for letter, _ in chosen:
                        count(letter, Outcome.WOULD_PURGE)
                elif chosen:
                    await _purge(look, chosen, count)
                if count.reached(limit):
                    break
        return Tally(queue, look.ready, look.looked_at, count.counts)

    async def edit(
        self,
        seen: Parked,
        body: bytes,
        *,
        event_id: UUID,
        dry_run: bool = False,
        hold: int = MOST_HELD,
        tell: Tell | None = None,
    ) -> Tally:
        """Replay one letter with another body, under `event_id`. It is the one that was seen: the same id, the same body.

        Raises UsageError where it is not there any more, and as `list` does; UnavailableError.
        """
        count = _Count(tell)
        async with look_into(self._broker, seen.queue, hold) as look:
            found: Incoming | None = None
            while found is None and (deliveries := await look.more()):
                found = next((one for one in deliveries if _is_same(one, seen)), None)
            if found is None:
                raise UsageError(
                    f"the letter of event {seen.event_id} is not in {seen.queue} any more as it was shown; look again",
                    code="OB703",
                )
            why = refusal(seen, now_s=self._clock(), window_s=self._window_s)
            if why is not None:
                count(seen, Outcome.REFUSED, why)
            elif dry_run:
                count(seen, Outcome.WOULD_EDIT)
            else:
                message = edited_message(found, seen.origin, body, event_id=event_id, signing=self._signing)
                [receipt] = await _published(self._broker, [(seen, message)], count)
                if receipt is Receipt.CONFIRMED:
                    look.take(found)
                    try:
                        await look.flush()
                    except BaseException:  # cancelled, too
                        count(
                            seen, Outcome.EDITED, "interrupted before the broker had taken the letter out: it may be here as well"
                        )
                        raise
                    count(seen, Outcome.EDITED)
                else:
                    count(seen, Outcome.FAILED, _why(receipt, seen.origin))
                    _stop_at_unknown([receipt])
        return Tally(seen.queue, look.ready, look.looked_at, count.counts)

    async def put_back(
        self,
        queue: str,
        letters: Sequence[Incoming],
        *,
        dry_run: bool = False,
        rate: float | None = None,
        tell: Tell | None = None,
    ) -> Tally:
        """Put letters that were taken out of a dead letter queue into it again, but for those that are there.

        What lies in the queue is looked at first, as far as MOST_HELD. Raises UsageError as `list` does; UnavailableError.
        """
        count, pace = _Count(tell), Pace(rate)
        known: set[tuple[str | None, bytes]] = set()
        looked = await self.visit(queue, lambda there: known.update(map(fingerprint, there)))
        missing: list[tuple[Parked, Incoming]] = []
        for delivery in letters:
            letter = read_parked(delivery)
            if fingerprint(delivery) in known:
                count(letter, Outcome.PRESENT)
            elif dry_run:
                count(letter, Outcome.WOULD_IMPORT)
            else:
                missing.append((letter, delivery))
            known.add(fingerprint(delivery))
        for start in range(0, len(missing), pace.batch):
            batch = missing[start : start + pace.batch]
            await pace.wait(len(batch))
            receipts = await _published(self._broker, [(letter, returned_message(delivery)) for letter, delivery in batch], count)
            count.each(
                (letter, Outcome.IMPORTED, "") if receipt is Receipt.CONFIRMED else (letter, Outcome.FAILED, _why(receipt, queue))
                for (letter, _), receipt in zip(batch, receipts, strict=True)
            )
            _stop_at_unknown(receipts)
        return Tally(queue, looked.ready, looked.looked_at, count.counts)

    def _possible(self, chosen: Sequence[tuple[Parked, Incoming]], count: _Count) -> Sequence[tuple[Parked, Incoming]]:
        possible = []
        for letter, delivery in chosen:
            why = refusal(letter, now_s=self._clock(), window_s=self._window_s)
            if why is None:
                possible.append((letter, delivery))
            else:
                count(letter, Outcome.REFUSED, why)
        return possible


class _Count:
    """What became of how many; and the teller is told."""

    def __init__(self, tell: Tell | None) -> None:
        self._tell = tell
        self.counts = dict.fromkeys(Outcome, 0)
        self.chosen = 0

    def __call__(self, letter: Parked, outcome: Outcome, why: str = "") -> None:
        self.counts[outcome] += 1
        if self._tell is not None:
            self._tell(letter, outcome, why)

    def each(self, became: Iterable[tuple[Parked, Outcome, str]]) -> None:
        """Of several with which it has happened already: where telling of one fails, it is told of the others all the same."""
        failure: Exception | None = None
        for letter, outcome, why in became:
            try:
                self(letter, outcome, why)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def reached(self, limit: int | None) -> bool:
        return limit is not None and self.chosen >= limit


class _Sending:
    """Letters on their way to their queues, in their order; of each key one at a time."""

    def __init__(self, broker: Broker, pace: Pace) -> None:
        self._broker = broker
        self._pace = pace
        self._held_back: set[str] = set()
        """Keys of which a letter was not confirmed: those after it may not overtake it."""

    async def send(self, look: Look, chosen: Sequence[tuple[Parked, Incoming]], count: _Count) -> None:
        for group in _batches(chosen, self._pace.batch):
            batch = [pair for pair in group if pair[0].key not in self._held_back]
            for letter, _ in group:
                if letter.key in self._held_back:
                    count(
                        letter, Outcome.FAILED, "an earlier letter of its key was not confirmed, and it may not overtake that one"
                    )
            await self._pace.wait(len(batch))
            receipts = await _published(
                self._broker, [(letter, replayed_message(delivery, letter.origin)) for letter, delivery in batch], count
            )
            became = []
            for (letter, delivery), receipt in zip(batch, receipts, strict=True):
                if receipt is Receipt.CONFIRMED:
                    look.take(delivery)
                    became.append((letter, Outcome.REPLAYED, ""))
                else:
                    became.append((letter, Outcome.FAILED, _why(receipt, letter.origin)))
                    if letter.key is not None:
                        self._held_back.add(letter.key)
            count.each(became)
            _stop_at_unknown(receipts)


async def _published(broker: Broker, batch: Sequence[tuple[Parked, Outgoing]], count: _Count) -> Sequence[Receipt]:
    """A receipt each. Interrupted, it tells of all as failed first: they may be in their queues all the same."""
    try:
        with anyio.fail_after(PUBLISH_S):
            return await broker.publish([message for _, message in batch])
    except TimeoutError as error:
        why = f"the broker did not confirm within {PUBLISH_S:g} s; it may be blocked by an alarm"
        count.each((letter, Outcome.FAILED, why) for letter, _ in batch)
        raise UnavailableError(why) from error
    except BaseException as error:  # cancelled, too
        why = (
            str(error)
            if isinstance(error, UnavailableError)
            else "interrupted before the confirm: it may be in its queue as well"
        )
        count.each((letter, Outcome.FAILED, why) for letter, _ in batch)
        raise


def _chosen(
    deliveries: Sequence[Incoming], wanted: Wanted, limit: int | None, count: _Count
) -> Sequence[tuple[Parked, Incoming]]:
    found = [(letter, delivery) for delivery in deliveries if wanted.matches(letter := read_parked(delivery))]
    if limit is not None:
        found = found[: limit - count.chosen]
    count.chosen += len(found)
    return found


async def _purge(look: Look, chosen: Sequence[tuple[Parked, Incoming]], count: _Count) -> None:
    for _, delivery in chosen:
        look.take(delivery)
    try:
        await look.flush()
    except BaseException:  # cancelled, too: the acknowledgements may be on their way
        why = "interrupted before the broker had taken the acknowledgement: it may be here again"
        count.each((letter, Outcome.FAILED, why) for letter, _ in chosen)
        raise
    count.each((letter, Outcome.PURGED, "") for letter, _ in chosen)


def _batches(chosen: Sequence[tuple[Parked, Incoming]], most: int) -> Iterator[Sequence[tuple[Parked, Incoming]]]:
    """In their order, at most so many, and no key twice: were the first of two refused, the second would have overtaken it."""
    batch: list[tuple[Parked, Incoming]] = []
    keys: set[str | None] = set()
    for letter, delivery in chosen:
        if len(batch) == most or (letter.key is not None and letter.key in keys):
            yield batch
            batch, keys = [], set()
        batch.append((letter, delivery))
        keys.add(letter.key)
    if batch:
        yield batch


def _is_same(delivery: Incoming, seen: Parked) -> bool:
    letter = read_parked(delivery)
    return (letter.event_id, letter.body) == (seen.event_id, seen.body)


def _why(receipt: Receipt, queue: str) -> str:
    return {
        Receipt.UNROUTABLE: f"there is no queue {queue!r}: start its consumer, which declares it, and do it again",
        Receipt.REFUSED: f"the broker refused it for {queue!r}",
    }.get(receipt, _UNKNOWN)


def _stop_at_unknown(receipts: Sequence[Receipt]) -> None:
    """What ended this batch would end each one after it, a connection for each."""
    if Receipt.UNKNOWN in receipts:
        raise UnavailableError(f"{_UNKNOWN}; stopped here")


_UNKNOWN = (
    "the broker closed the connection or the channel before the confirm (it went away, or the user has no permission to write to "
    "amq.default): it may be in its queue as well; do it again"
)
