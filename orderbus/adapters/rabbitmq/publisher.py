"""Publishing with confirms: many messages to one write, one future for each batch."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Sequence
from contextlib import suppress

from aiormq.exceptions import ChannelClosed

from orderbus._core.message import Outgoing, Receipt
from orderbus.adapters.rabbitmq.confirms import Confirms, SentBatch
from orderbus.adapters.rabbitmq.connection import Connection, describe
from orderbus.adapters.rabbitmq.content import ConfirmSink
from orderbus.adapters.rabbitmq.encoder import PublishEncoder
from orderbus.adapters.rabbitmq.fields import Unsendable
from orderbus.errors import UnavailableError

CONFIRM_S = 30.0
RENEW_S = 1.0
"""A channel that was refused something is replaced before the next publish, but no more often.

One that was opened in the moment in which a queue's leader died may go on refusing for as long as that node is away, though the
queue has a new leader (RabbitMQ 3.10: rabbit_fifo_client asks the dead node before its first enqueue).
"""
MAX_UNANSWERED = 100_000
"""More open publishes than this, and the connection is given up: a broker that never answers must not fill the memory."""

_WRITE_BYTES, _WRITE_MESSAGES = 256 * 1024, 64
"""What is written at once, whichever is reached first: the broker begins with the first messages while the last are still being encoded."""
_NO_EXCHANGE = re.compile(r"NOT_FOUND - no exchange '(.*)' in vhost")
_TOO_LARGE = re.compile(
    r"closed the channel: PRECONDITION_FAILED - message size \d+ is larger than (?:configured )?max size (\d+)"
)

log = logging.getLogger("orderbus.rabbitmq")


class SizeLimit:
    """The broker's own `max_message_size`. It says so only by closing a channel, with all that is unanswered on it.

    What is larger is therefore not even sent for a minute; then one may close a channel again, for the operator may have raised it.
    """

    KNOWN_S = 60.0

    def __init__(self) -> None:
        self._bytes = 0
        self._until = -math.inf

    def learn(self, limit_bytes: int) -> None:
        self._bytes, self._until = limit_bytes, asyncio.get_running_loop().time() + self.KNOWN_S

    @property
    def bytes(self) -> float:
        return self._bytes if asyncio.get_running_loop().time() < self._until else math.inf


class Publisher:
    """One confirming channel. Of no use once `failure` is set: make another."""

    def __init__(self, connection: Connection, confirm_s: float, size_limit: SizeLimit) -> None:
        self._connection = connection
        self._confirm_s = confirm_s
        self._size_limit = size_limit
        self._confirms = Confirms()
        self._sink = ConfirmSink(self._confirms)
        self._turn = asyncio.Lock()
        self._was_refused = False

    @property
    def failure(self) -> str | None:
        return self._sink.failure

    @property
    def wants_renewal(self) -> bool:
        """Nobody uses it now, and the broker has refused something on it."""
        is_idle = not self._turn.locked() and not self._confirms.open
        return self._was_refused and is_idle and asyncio.get_running_loop().time() >= self._opened_at + RENEW_S

    async def open(self) -> None:
        """Raises UnavailableError."""
        self._channel = channel = await self._connection.open_channel(lambda _: self._sink)
        self._opened_at = asyncio.get_running_loop().time()
        self._encoder = PublishEncoder(channel.number, self._connection.frame_max)
        try:
            await self._connection.call(channel.confirm_delivery(), "asking for confirms", on_giving_up=self._sink.fail)
        except ChannelClosed as failure:
            raise UnavailableError(f"asking for confirms at {self._connection.address.shown}: {describe(failure)}") from failure

    async def close(self) -> None:
        """Raises UnavailableError."""
        with suppress(ChannelClosed):
            await self._connection.call(self._channel.close(), "closing a channel", on_giving_up=self._sink.fail)

    async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        """One receipt for each message. Raises UnavailableError only where nothing was sent."""
        receipts: list[Receipt | None] = [None] * len(batch)
        answered = asyncio.Event()
        async with self._turn:  # The numbers of a batch are consecutive, and one batch at most waits in the write buffer.
            await self._connection.unblocked()
            if self.failure is not None:
                raise UnavailableError(f"{self._connection.address.shown}: {self.failure}")
            if self._confirms.open > MAX_UNANSWERED:
                self._connection.abort(f"{self._confirms.open} publishes have no answer")
                raise UnavailableError(f"{self._connection.address.shown}: {self.failure}")
            sent = self._confirms.begin(answered.set)
            try:
                await self._send(batch, sent, receipts)
            finally:
                self._confirms.finish(sent)
        await self._answers(answered)
        self._was_refused = self._was_refused or Receipt.REFUSED in sent.receipts
        return self._receipts(batch, sent, receipts)

    async def _send(self, batch: Sequence[Outgoing], sent: SentBatch, receipts: list[Receipt | None]) -> None:
        """Write all of it; `receipts` is filled where a message is refused before sending."""
        encode, limit_bytes = self._encoder.encode, self._size_limit.bytes
        frames: list[bytes] = []
        size, sequence = 0, self._confirms.next_sequence
        for index, message in enumerate(batch):
            try:
                if len(message.body) > limit_bytes:
                    raise Unsendable(_larger(message, limit_bytes))
                frame = encode(message, sequence)
            except Unsendable as failure:
                receipts[index] = Receipt.REFUSED
                _tell_refused(message, "not sent", str(failure))
                continue
            frames.append(frame)
            sequence += 1
            size += len(frame)
            if size >= _WRITE_BYTES or len(frames) >= _WRITE_MESSAGES:
                if not await self._write(frames, sent):
                    return
                frames, size = [], 0
        if frames:
            await self._write(frames, sent)

    async def _write(self, frames: list[bytes], sent: SentBatch) -> bool:
        """False once the channel is gone. After a cancellation the sequence numbers go on: what was written may arrive."""
        if self.failure is not None:
            return False
        self._confirms.sent(sent, len(frames))
        self._connection.write(b"".join(frames))
        try:
            await self._connection.drain()
        except UnavailableError as failure:
            log.debug("while publishing: %s", failure)  # The receipts tell it: unknown.
            return False
        return self.failure is None

    async def _answers(self, answered: asyncio.Event) -> None:
        """Until all are there, the channel is gone, or the time limit; the clock stands while the broker is blocked."""
        while True:
            try:
                async with asyncio.timeout(self._confirm_s):
                    await answered.wait()
                return
            except TimeoutError:
                if self._connection.blocked is None or self._connection.lost is not None:
                    log.warning("%s: confirms did not come within %g s", self._connection.address.shown, self._confirm_s)
                    return

    def _receipts(self, batch: Sequence[Outgoing], sent: SentBatch, receipts: list[Receipt | None]) -> list[Receipt]:
        missing = _NO_EXCHANGE.search(self.failure or "")
        too_large = _TOO_LARGE.search(self.failure or "")
        limit_bytes = int(too_large[1]) if too_large else math.inf
        if too_large:
            self._size_limit.learn(int(too_large[1]))
        if len(sent.receipts) == len(batch) and sent.open == 0:
            return [receipt for receipt in sent.receipts if receipt is not None]
        answers = iter(sent.receipts)
        result: list[Receipt] = []
        for message, refused in zip(batch, receipts, strict=True):
            receipt = refused or next(answers, None) or Receipt.UNKNOWN
            if receipt is Receipt.UNKNOWN and missing and message.exchange == missing[1]:
                receipt = Receipt.UNROUTABLE  # The broker keeps nothing for an exchange that it does not have.
            elif receipt is Receipt.UNKNOWN and len(message.body) > limit_bytes:
                receipt = Receipt.REFUSED  # Nor a message that is larger than it takes, whether it came to it or not.
                _tell_refused(message, "refused", _larger(message, limit_bytes))
            result.append(receipt)
        return result


def _larger(message: Outgoing, limit_bytes: float) -> str:
    return f"the body takes {len(message.body)} bytes; the broker's max_message_size is {limit_bytes:.0f}"


def _tell_refused(message: Outgoing, what: str, why: str) -> None:
    name = message.message_id[:64]
    log.warning("message %r for exchange %.64r is %s: %s", name, message.exchange, what, why, extra={"event.id": name})
