"""Consuming one queue: probing first, settlements coalesced, no settlement for a channel that is gone."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import anyio
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelClosed

from orderbus._core.message import Incoming, Settlement
from orderbus._core.parked import is_dead_letter_queue
from orderbus.adapters.rabbitmq.connection import CALL_S, CLOSE_S, Connection, describe
from orderbus.adapters.rabbitmq.content import DeliverySink
from orderbus.adapters.rabbitmq.encoder import MAX_BODY
from orderbus.adapters.rabbitmq.fields import decode_properties
from orderbus.adapters.rabbitmq.settlements import Settlements
from orderbus.errors import MessageError, UnavailableError, UsageError

log = logging.getLogger("orderbus.rabbitmq")

DOUBTED_AFTER = 20
"""Crash loops and flapping connections reach it, a few crashes in a row do not. Less than half of the delivery limit."""
LARGEST_LETTER = 128 * 1024 * 1024
"""A person shall see what no consumer takes: all that RabbitMQ before 4.0 holds by default."""


class Subscription:
    """A live consumer of one queue.

    It hands over one delivery at first, and as many as the prefetch once it has met one that was never delivered before: a
    quorum queue redelivers first, so a message that kills its process is alone when it does. While it meets only
    redeliveries, the window doubles each time that all of it has been settled (docs/adr/14).

    A plain queue is also asked for no more than the window, so that a crash counts against nothing else. Prefetch belongs to a
    consumer, so growing means consuming anew. What is settled before the killer is met is gone at the next start, so its
    neighbours meet it a few times at most, far below the delivery limit of 50.

    Where order counts, the queue is asked for the whole prefetch at once, and the rest waits here: what is returned goes behind
    whatever else was returned, so a consumer that is lost with the first of several redeliveries would get it back as the last of
    them. The price is that a crash counts against all of them; so if the first has been delivered `DOUBTED_AFTER` times, the
    queue is asked for one at a time until a fresh one comes, and order may give way to the safety of the others.
    """

    def __init__(
        self,
        connection: Connection,
        queue: str,
        prefetch: int,
        *,
        keeps_order: bool,
        epochs: Iterator[int],
        doubtful: set[str],
    ) -> None:
        self._connection = connection
        self._queue = queue
        self._prefetch = prefetch
        self._keeps_order = keeps_order
        self._epochs = epochs
        self._doubtful = doubtful
        """Queues, of this broker, where order counts and which are asked for one at a time all the same."""
        self._window = prefetch if is_dead_letter_queue(queue) else 1
        """No handler reads dead letters, and whoever looks at them holds them: after the first look none is fresh."""
        self._proved = 0
        """Deliveries settled since the window last changed."""
        self._is_paused = False
        self._held = 0
        """Deliveries of this life that were handed over, and are neither settled nor tried."""
        self._life: _Life | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._write: asyncio.Handle | None = None
        self._one_step = asyncio.Lock()
        self._steps: set[asyncio.Task[None]] = set()
        self._growth: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start consuming. Raises UnavailableError, naming the queue, where it does not exist."""
        await self._step(self._begin_life)

    async def receive(self) -> Sequence[Incoming]:
        """At least one delivery; what has arrived, up to the prefetch. Raises UnavailableError when the consumer is gone."""
        while True:
            if self._growth is not None:
                await asyncio.shield(self._growth)  # again, where an earlier call was cancelled while it grew
                self._growth = None
            life = self._alive()
            arrived = life.sink.arrived
            room = self._window - self._held
            if not arrived or room <= 0 or self._is_paused:
                await self._wait()
            elif self._is_in_doubt(life, arrived):
                self._growth = self._begin(self._doubt)
            elif self._window < self._prefetch and (target := self._grown(arrived)) > self._window:
                self._growth = self._begin(functools.partial(self._grow, target))
            else:
                life.is_untouched = False
                life.sink.arrived = arrived[room:]
                del arrived[room:]
                self._held += len(arrived)
                return arrived

    def settle(self, delivery: Incoming, how: Settlement) -> None:
        """Say what became of a delivery; sent with its neighbours when the event loop comes round. Never blocks.

        Raises InvariantError for a delivery that was settled before.
        """
        life = self._life
        if life is None or delivery.epoch != life.epoch or life.sink.failure is not None:
            return
        life.settlements.add(delivery.tag, how)
        if delivery.tag in life.tried:
            life.tried.discard(delivery.tag)
        else:
            self._makes_room()
        if self._write is None:
            self._write = asyncio.get_running_loop().call_soon(self._send)

    def tried(self, delivery: Incoming) -> None:
        """It has come through its first try: what waits behind the window need not wait for it any more.

        Only where order counts: a plain queue was asked for no more than the window, and gives another when this one is settled.
        """
        life = self._life
        if life is None or delivery.epoch != life.epoch or self._wanted <= self._window or delivery.tag in life.tried:
            return
        if life.settlements.is_open(delivery.tag):
            life.tried.add(delivery.tag)
            self._makes_room()

    def _makes_room(self) -> None:
        if self._held >= self._window:
            self._notify()
        self._held -= 1
        self._proved += 1

    async def pause(self) -> None:
        """Take no new deliveries. What arrived and was not handed over goes back, but where order counts it stays here.

        There, cancelling would let the next consumer begin while we still hold earlier messages (seen on RabbitMQ 3.10):
        finish, settle, and leave the subscription.
        """
        self._is_paused = True
        if not self._keeps_order:
            await self._step(self._stop_consuming)

    async def flush(self) -> None:
        """Wait until every settlement so far has reached the broker. Raises UnavailableError when it can't any more."""
        await self._step(self._round_trip)

    async def close(self) -> None:
        """Send what is settled, give back the rest, and wait for the broker's word that the channel is closed."""
        with anyio.CancelScope(shield=True):
            if self._steps:
                _, stuck = await asyncio.wait(self._steps, timeout=CALL_S)
                if stuck:
                    self._connection.abort("it did not answer in time")
            try:
                await self._end_life()
            except UnavailableError as failure:
                log.info("leaving queue %r: %s", self._queue, failure)  # The broker takes everything back by itself.

    async def _step(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a conversation with the broker to its end, though the caller be cancelled: aiormq would close the channel.

        One at a time; `close` waits for them.
        """

        await asyncio.shield(self._begin(step))

    def _begin(self, step: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        async def alone() -> None:
            async with self._one_step:
                await step()

        task = asyncio.get_running_loop().create_task(alone())
        self._steps.add(task)
        task.add_done_callback(self._steps.discard)
        return task

    async def _begin_life(self) -> None:
        epoch = next(self._epochs)
        max_body = LARGEST_LETTER if is_dead_letter_queue(self._queue) else MAX_BODY
        sink = DeliverySink(self._queue, epoch, decode_properties, self._notify, max_body)
        channel = await self._connection.open_channel(lambda _: sink)
        self._life = life = _Life(channel, sink, Settlements(channel.number), epoch)
        self._held = 0
        await self._consume(life)

    async def _end_life(self) -> None:
        life = self._life
        if life is None:
            return
        self._send()
        # From here on nothing is written to the channel: a late frame would end the connection.
        life.sink.fail("the subscription was left")
        life.sink.arrived = []
        if life.sink.is_closed or self._connection.lost is not None:
            return
        try:
            await self._connection.call(
                life.channel.close(), "closing a channel", limit_s=CLOSE_S, on_giving_up=self._connection.abort
            )
        except ChannelClosed as failure:
            raise UnavailableError(f"queue {self._queue!r}: {describe(failure)}") from failure
        if not life.sink.is_closed and not life.is_untouched:
            # So that what was handed over comes back. Where nothing was, the broker closes it in its own time: the queue may have lost its
            # majority, and all others of this connection are well.
            self._connection.abort("a channel could not be closed")

    async def _consume(self, life: _Life) -> None:
        """Consume on the channel, from now on with the prefetch of the hour."""
        life.consumer_tag = f"{life.epoch}.{self._window}"
        await self._ask(life, life.channel.basic_qos(prefetch_count=self._wanted), "setting the prefetch")
        consume = life.channel.basic_consume(self._queue, _unused_callback, consumer_tag=life.consumer_tag)
        await self._ask(life, consume, "consuming")

    @property
    def _wanted(self) -> int:
        """How many unsettled deliveries the broker is asked for."""
        return self._prefetch if self._keeps_order and self._queue not in self._doubtful else self._window

    def _grown(self, arrived: Sequence[Incoming]) -> int:
        """The window that is right now: all of the prefetch at a fresh delivery, twice the window once it has proved itself.

        It stays while a delivery may be under way: one that crosses with the cancel comes back, counted twice (3.10).
        """
        if self._held + len(arrived) < self._window:
            return self._window
        if _is_fresh(arrived[0]):
            return self._prefetch
        if self._proved >= self._window and self._queue not in self._doubtful:
            return min(2 * self._window, self._prefetch)
        return self._window

    async def _grow(self, window: int) -> None:
        """Widen the window. Between the consumers, what was delivered for the probe must neither get lost nor overtaken.

        On the same channel it stays with the consumer that is cancelled: until it is settled, the broker counts one more than
        the prefetch, and `receive` holds that one back.

        Where order counts (a single active consumer), there is nothing to ask for, unless the queue was in doubt: then the channel
        is closed and so its delivery, the only one that was ever returned, goes back unseen by anyone; that counts as one delivery
        of it. Cancelling instead would make another consumer active beside that delivery.
        """
        if window <= self._window or self._is_paused:
            return
        self._window = window
        self._proved = 0
        if self._keeps_order:
            if self._queue in self._doubtful:
                self._doubtful.discard(self._queue)
                await self._end_life()
                await self._begin_life()
            return
        life = self._alive()
        await self._ask(life, life.channel.basic_cancel(life.consumer_tag), "ending the probe")
        await self._consume(life)

    def _is_in_doubt(self, life: _Life, arrived: Sequence[Incoming]) -> bool:
        """Whether the first delivery of this life has been delivered suspiciously often."""
        if not life.is_untouched or self._wanted <= self._window:
            return False
        try:
            return arrived[0].redelivered and arrived[0].delivery_count >= DOUBTED_AFTER  # a sender may claim any count
        except MessageError:
            return False

    async def _doubt(self) -> None:
        """Give back all, in its order, and consume one at a time."""
        if self._is_paused:
            return
        log.warning(
            "queue %r: its first message was delivered %d times and more without being settled; from here one at a time, "
            "so a message that ends its process is parked alone, but what follows it in its key may overtake it",
            self._queue,
            DOUBTED_AFTER,
        )
        self._doubtful.add(self._queue)
        self._window = 1
        self._proved = 0
        await self._end_life()
        await self._begin_life()

    async def _stop_consuming(self) -> None:
        life = self._alive()
        await self._ask(life, life.channel.basic_cancel(life.consumer_tag), "pausing")
        for delivery in life.sink.arrived:
            life.settlements.add(delivery.tag, Settlement.RELEASE)
        life.sink.arrived = []
        self._send()

    async def _round_trip(self) -> None:
        self._send()
        life = self._life
        if life is None or life.sink.failure is not None:
            raise UnavailableError(f"queue {self._queue!r}: {life.sink.failure if life else 'not open'}")
        # Any call would do: the broker answers in order, after it has taken what was written before.
        await self._ask(life, life.channel.basic_qos(prefetch_count=self._wanted), "flushing")

    async def _ask(self, life: _Life, call: Coroutine[Any, Any, Any], what: str) -> None:
        try:
            await self._connection.call(call, f"{what}, queue {self._queue!r}", on_giving_up=life.sink.fail)
        except ChannelClosed as failure:
            raise UnavailableError(f"{what}, queue {self._queue!r}: {describe(failure)}") from failure

    def _alive(self) -> _Life:
        life = self._life
        assert life is not None
        if reason := life.sink.failure or life.sink.cancelled:
            raise UnavailableError(f"queue {self._queue!r}, {self._connection.address.shown}: {reason}")
        return life

    def _send(self) -> None:
        if self._write is not None:
            self._write.cancel()
            self._write = None
        life = self._life
        if life is not None and life.sink.failure is None and (frames := life.settlements.take()):
            self._connection.write(frames)

    async def _wait(self) -> None:
        """Until a delivery arrives where there was none, room appears where there was none, or the consumer is gone."""
        if self._waiter is not None:
            raise UsageError(
                f"two tasks receive from one subscription of {self._queue!r}; let one task receive and hand on", code="OB508"
            )
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Life:
    """A channel that consumes. Its tags mean nothing on any other."""

    def __init__(self, channel: AbstractChannel, sink: DeliverySink, settlements: Settlements, epoch: int) -> None:
        self.channel = channel
        self.sink = sink
        self.settlements = settlements
        self.epoch = epoch
        self.consumer_tag = ""
        self.tried: set[int] = set()
        """Tags of deliveries that are not settled and kill nobody."""
        self.is_untouched = True
        """Nothing has been handed over yet."""


def _is_fresh(delivery: Incoming) -> bool:
    """Whether the broker delivers it for the first time.

    From RabbitMQ 4 on a message that was given back politely is marked as redelivered while its count is still 0.
    """
    if not delivery.redelivered:
        return True
    try:
        return delivery.properties.headers.get("x-delivery-count") == 0
    except MessageError:
        return False


async def _unused_callback(_: Any) -> None:
    """aiormq asks for one; the deliveries never reach it."""
