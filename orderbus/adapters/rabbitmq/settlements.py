"""Which deliveries of a channel are settled, and the fewest frames that say so. No I/O.

An ack with `multiple` answers for every delivery up to its tag, so it may go no further than the first one that is still
open. One that names a tag which was settled before closes the channel (406), and with it all neighbours.
"""

from __future__ import annotations

from orderbus._core.message import Settlement
from orderbus.adapters.rabbitmq.frames import ack, nack_requeue, reject
from orderbus.errors import InvariantError


class Settlements:
    """Collects settlements of one channel between two writes."""

    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._floor = 0
        """Every tag up to here is settled, and was taken."""
        self._settled: set[int] = set()
        """Settled tags above the floor."""
        self._acks: list[int] = []
        self._given_back: list[bytes] = []

    def add(self, tag: int, how: Settlement) -> None:
        if tag <= self._floor or tag in self._settled:
            raise InvariantError(f"delivery {tag} was settled twice")
        self._settled.add(tag)
        if how is Settlement.ACK:
            self._acks.append(tag)
        elif how is Settlement.RELEASE:
            self._given_back.append(nack_requeue(self._channel, tag))
        else:
            self._given_back.append(reject(self._channel, tag, requeue=how is Settlement.REJECT))

    def is_open(self, tag: int) -> bool:
        """Whether a delivery is not settled yet."""
        return tag > self._floor and tag not in self._settled

    def take(self) -> bytes:
        """The frames for everything since the last time."""
        settled = self._settled
        floor = self._floor
        while floor + 1 in settled:
            floor += 1
            settled.discard(floor)
        self._floor = floor
        # What is given back must be said first: the multiple ack would answer for it.
        frames = self._given_back
        below = 0
        for tag in self._acks:
            if tag > floor:
                frames.append(ack(self._channel, tag))
            elif tag > below:
                below = tag
        if below:
            frames.append(ack(self._channel, below, multiple=True))
        self._acks, self._given_back = [], []
        return b"".join(frames)
