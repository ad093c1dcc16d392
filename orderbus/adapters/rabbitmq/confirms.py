"""Which publishes of a channel were confirmed, refused or returned: arithmetic on sequence numbers. No I/O.

A publish is confirmed if and only if it was acked and no return bore its number. The broker sends a return before the
ack of the same message (20,000 of 20,000 on RabbitMQ 3.10.8).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from orderbus._core.message import Receipt


class SentBatch:
    """Consecutive sequence numbers that one caller waits for. `receipts` holds None where the answer is still to come."""

    __slots__ = ("_resolved_below", "first", "is_whole", "on_done", "open", "receipts")

    def __init__(self, first: int, on_done: Callable[[], None]) -> None:
        self.first = first
        self.receipts: list[Receipt | None] = []
        self.open = 0
        self.is_whole = False
        """Nothing more will be added to it."""
        self.on_done = on_done
        self._resolved_below = 0

    def resolve(self, low: int, high: int, receipt: Receipt, returned: set[int]) -> None:
        """Answer the numbers from `low` up to and including `high` that have no answer yet."""
        receipts = self.receipts
        start = max(low - self.first, self._resolved_below)
        stop = min(high - self.first + 1, len(receipts))
        for index in range(start, stop):
            if receipts[index] is None:
                receipts[index] = receipt
                self.open -= 1
                if returned and index + self.first in returned:
                    returned.discard(index + self.first)
                    receipts[index] = Receipt.UNROUTABLE
        if start == self._resolved_below:
            self._resolved_below = max(start, stop)

    def is_waiting_for(self, sequence: int) -> bool:
        index = sequence - self.first
        return 0 <= index < len(self.receipts) and self.receipts[index] is None

    @property
    def is_done(self) -> bool:
        return self.is_whole and self.open == 0


class Confirms:
    """The open publishes of one channel, oldest first."""

    def __init__(self) -> None:
        self.next_sequence = 1
        self.open = 0
        """How many publishes wait for an answer, those that nobody asks about any more included."""
        self.is_lost = False
        self._batches: list[SentBatch] = []
        self._firsts: list[int] = []
        self._returned: set[int] = set()

    def begin(self, on_done: Callable[[], None]) -> SentBatch:
        """A new batch, to which `sent` adds until `finish`. There is one at a time."""
        batch = SentBatch(self.next_sequence, on_done)
        self._batches.append(batch)
        self._firsts.append(batch.first)
        return batch

    def sent(self, batch: SentBatch, count: int) -> None:
        """The next `count` sequence numbers were used for it."""
        batch.receipts += [None] * count
        batch.open += count
        self.open += count
        self.next_sequence += count

    def finish(self, batch: SentBatch) -> None:
        """All of it was sent, or will never be."""
        batch.is_whole = True
        if batch.open == 0:
            batch.on_done()
            self._forget_done()

    def answer(self, tag: int, *, multiple: bool, accepted: bool) -> None:
        receipt = Receipt.CONFIRMED if accepted else Receipt.REFUSED
        last = bisect_right(self._firsts, tag) - 1
        if last < 0:
            return
        is_any_done = False
        for batch in self._batches[0 if multiple else last : last + 1]:
            before = batch.open
            batch.resolve(batch.first if multiple else tag, tag, receipt, self._returned)
            self.open -= before - batch.open
            if before and batch.is_done:
                is_any_done = True
                batch.on_done()
        if is_any_done:
            self._forget_done()

    def returned(self, sequence: int) -> bool:
        """Note a return, which comes before its answer. False where nothing with that number waits for one."""
        if self.is_lost:
            return True
        last = bisect_right(self._firsts, sequence) - 1
        if last < 0 or not self._batches[last].is_waiting_for(sequence):
            return False
        self._returned.add(sequence)
        return True

    def lose(self) -> None:
        """The channel is gone: no answer will come any more."""
        self.is_lost = True
        batches = self._batches
        self._batches, self._firsts, self.open = [], [], 0
        self._returned.clear()
        for batch in batches:
            batch.on_done()

    def _forget_done(self) -> None:
        self._batches = [batch for batch in self._batches if not batch.is_done]
        self._firsts = [batch.first for batch in self._batches]
