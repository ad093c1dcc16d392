"""The relay: outbox rows to confirmed messages, then deleted. Several relays share the buckets among themselves.

A row is deleted only after its confirm, so a relay that dies leaves its rows to the next; what was confirmed and not yet
deleted is published again, and the inbox absorbs it. A lease can't fence a publish, so a relay stops publishing by its own
clock well before its lease ends.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio

from orderbus._core.ids import uuid_text
from orderbus._core.message import KEY, HeaderValue, Outgoing, Receipt
from orderbus._core.outbox import Floor, first_per_key, idle_wait_s, stuck_retry_s
from orderbus._core.policy import backoff_s
from orderbus._core.settings import Settings
from orderbus._core.topology import EVENTS_EXCHANGE, routing_key
from orderbus._core.trace_context import trace_headers
from orderbus._runtime.stats import Stats
from orderbus._runtime.tracing import Tracing, sends, trace_ids
from orderbus.abc import Backlog, Broker, OutboxRow, OutboxStore, Stuck
from orderbus.errors import UnavailableError

if TYPE_CHECKING:
    from orderbus._runtime.metrics import Metrics

log = logging.getLogger("orderbus.relay")

DUE_EVERY_S = 0.5
PACE = 2.0
SHORTEST_PACE_S, LONGEST_PACE_S = 0.005, 0.05
"""A busy relay whose page was not full waits `PACE` times as long as it took before it reads the next, within these bounds:
fewer, fuller round trips the more loaded the machine is."""
READ_BYTES = 8 * 1024 * 1024
PUBLISHING_SHARE = 0.75
"""A lease can't fence a publish: the rest of it is for what is on its way when a relay is stopped and goes on later."""
RENEWALS_IN_A_LEASE, MOST_LONGER = 4, 10
"""A lease has time for so many renewals, but for that it is made no more than ten times as long as it was set."""


class Relay:
    """Publishes the outbox's rows of the buckets that it leases, in the order of each key."""

    def __init__(
        self,
        outbox: OutboxStore,
        broker: Broker,
        settings: Settings,
        stats: Stats,
        owner: str,
        rng: random.Random,
        tracing: Tracing | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._outbox = outbox
        self._broker = broker
        self._batch = settings.relay_batch
        self._lease_s = settings.relay_lease_s
        self._stats = stats
        self._owner = owner
        self._tracing = tracing
        self._metrics = metrics
        self._rng = rng
        self._buckets: frozenset[int] = frozenset()
        self._renew_at = 0.0
        self._renewing_s = 0.0
        self._publish_until = 0.0
        self._due_at = 0.0
        self._floor = Floor()
        self._empty_reads = 0
        self._wake = anyio.Event()
        self._stopping = False
        self._stopped = anyio.Event()

    def wake(self) -> None:
        """Something was committed in this process: look now. Cheap, and harmless when there is nothing."""
        self._wake.set()

    @property
    def buckets(self) -> int:
        """How many it holds."""
        return len(self._buckets)

    async def measure(self) -> Backlog:
        """What waits in its buckets. Raises UnavailableError."""
        return await self._outbox.backlog(sorted(self._buckets), self._floor.value)

    def stop(self) -> None:
        """Finish the batch under way, give the buckets back, end."""
        self._stopping = True
        self._stopped.set()
        self._wake.set()

    async def run(self) -> None:
        """Relay until stopped. A missing server is waited for, with back-off."""
        failures = 0
        while not self._stopping:
            began = anyio.current_time()
            self._wake = anyio.Event()  # before the read: what is committed while it is under way asks for another
            try:
                found = await self._cycle()
                failures = 0
            except UnavailableError as error:
                failures += 1
                self._floor = Floor()  # what comes back may be another server, which hands out lower ids
                log.warning("the outbox waits: %s", error)
                await self._pause(backoff_s(failures, jitter=self._rng.random()))
                continue
            self._empty_reads = 0 if found else self._empty_reads + 1
            if found >= self._batch // 2:
                continue
            if found:
                took_s = anyio.current_time() - began
                await self._pause(min(max(PACE * took_s, SHORTEST_PACE_S), LONGEST_PACE_S))
            else:
                await self._sleep(idle_wait_s(self._empty_reads))
        if self._buckets:
            try:
                await self._outbox.lease(self._owner, self._lease_s, [])
            except UnavailableError as error:
                log.warning("the buckets can't be given back, their lease runs out in %g s: %s", self._lease_s, error)

    async def _pause(self, seconds: float) -> None:
        """Wait whatever is committed meanwhile; only a stop ends it early."""
        if seconds > 0:
            with anyio.move_on_after(seconds):
                await self._stopped.wait()

    async def _sleep(self, seconds: float) -> None:
        if seconds <= 0 or self._stopping:
            return
        with anyio.move_on_after(min(seconds, max(self._renew_at - anyio.current_time(), 0.0))):
            await self._wake.wait()

    async def _cycle(self) -> int:
        """One round; how many rows it published."""
        now = anyio.current_time()
        if now >= self._renew_at:
            await self._renew(now)
        if not self._buckets:
            return 0
        buckets = sorted(self._buckets)
        found = await self._relay_due(buckets) if now >= self._due_at else 0
        known = self._floor.mark()
        page = await self._outbox.read(buckets, self._floor.value, self._batch, READ_BYTES)
        self._floor.read(xmin=page.xmin, last_id=page.last_id, lowest_id=page.rows[0].id if page.rows else None)
        return found + await self._relay(page.rows, buckets, known)

    async def _relay_due(self, buckets: Sequence[int]) -> int:
        """Publish stuck rows whose time has come, and those that waited behind them as long as all get out.

        For half of the time at most, since all other keys wait meanwhile.
        """
        began, count = anyio.current_time(), 0
        self._due_at = began + DUE_EVERY_S
        while due := await self._outbox.due(buckets, self._batch, READ_BYTES):
            sent = await self._publish(due)
            await self._settle(sent, sent.gone)
            count += len(sent.gone) + len(sent.stuck)
            if not sent.is_whole or self._stopping or anyio.current_time() >= began + DUE_EVERY_S / 2:
                break
        return count

    async def _relay(self, rows: Sequence[OutboxRow], buckets: Sequence[int], known: int) -> int:
        """Publish a page and what follows it, as long as pages are full; how many rows that was.

        While a full page is published, the one before is deleted and the next one is read: above the page under way, and no higher
        than `known`, an id that was handed out before the first page was read. A row may still appear below the page under way, and
        the next row of its key above; but that one gets its id once the first is committed, which was not when the first page was
        read, so its id is above `known`: the next cycle finds both. The next page is of use only where the whole page got out.
        """
        count = 0
        gone: list[OutboxRow] = []
        sent = _Sent()
        while rows:
            if len(rows) < self._batch // 2 or rows[-1].id >= known:
                sent, rows = await self._publish(rows), ()
            else:
                sent, rows, gone = await self._publish_and_read_on(rows, gone, buckets, known)
            gone += sent.gone
            count += len(sent.gone) + len(sent.stuck)
            if not sent.is_whole or self._stopping or anyio.current_time() >= min(self._due_at, self._renew_at):
                break
        await self._settle(sent, gone)
        return count

    async def _settle(self, sent: _Sent, gone: Sequence[OutboxRow]) -> None:
        if sent.stuck:
            await self._outbox.set_aside(sent.stuck)
        if gone:
            await self._delete(gone)
        if sent.failure is not None:
            raise sent.failure

    async def _publish_and_read_on(
        self, rows: Sequence[OutboxRow], gone: Sequence[OutboxRow], buckets: Sequence[int], known: int
    ) -> tuple[_Sent, Sequence[OutboxRow], list[OutboxRow]]:
        """What became of `rows`; the page after them; and those of `gone` that could not be deleted."""
        ahead: Sequence[OutboxRow] = ()
        left = list(gone)
        failure: UnavailableError | None = None

        async def read_on() -> None:
            nonlocal ahead, left, failure
            try:
                if left:
                    await self._delete(left)
                    left = []
                ahead = (await self._outbox.read(buckets, rows[-1].id, self._batch, READ_BYTES, up_to=known)).rows
            except UnavailableError as error:  # raised outside of the task group, which would wrap it in a group
                failure = error

        async with anyio.create_task_group() as beside:
            beside.start_soon(read_on)
            sent = await self._publish(rows)
        sent.failure = sent.failure or failure
        return sent, ahead, left

    async def _delete(self, rows: Sequence[OutboxRow]) -> None:
        mark = self._floor.mark()
        self._floor.deleted(mark, await self._outbox.delete(rows))

    async def _renew(self, now: float) -> None:
        """Counted from before the call: the database's lease ends no earlier than ours.

        A database that takes long to answer would give a lease whose time to publish is over when it arrives, and the next one again.
        So the lease is longer for as long as renewing it takes longer than a quarter of it.
        """
        lease_s = min(max(self._lease_s, RENEWALS_IN_A_LEASE * self._renewing_s), MOST_LONGER * self._lease_s)
        held = await self._outbox.lease(self._owner, lease_s, None)
        self._renewing_s = anyio.current_time() - now
        if self._renewing_s >= PUBLISHING_SHARE * lease_s:
            log.warning(
                "the lease of %g s took %.1f s to renew, so nothing could be published under it; the next one is longer",
                lease_s,
                self._renewing_s,
            )
        self._renew_at = now + lease_s / 3
        self._publish_until = now + lease_s * PUBLISHING_SHARE
        if held - self._buckets:
            self._floor = Floor()
        if held != self._buckets:
            log.info("relay %s holds %d buckets", self._owner, len(held))
        self._buckets = held

    async def _publish(self, rows: Sequence[OutboxRow]) -> _Sent:
        """Publish rows in rounds of one a key, each round once the one before is confirmed.

        Rounds, because a key with many rows would else cost a read and a delete for each, and fill the pages of all other keys.
        """
        sent = _Sent()
        left = list(rows)
        waiting: set[str] = set()  # keys whose row did not get out: their later rows stay behind it
        while sent.failure is None and (now := first_per_key(left, waiting)):
            if anyio.current_time() >= self._publish_until:
                self._renew_at = 0.0
                break
            try:
                receipts = await publish_rows(self._broker, now, self._tracing, self._metrics)
            except UnavailableError as error:
                sent.failure = error
                break
            unanswered = sum(receipt is Receipt.UNKNOWN for receipt in receipts)
            if unanswered:
                sent.failure = UnavailableError(f"{unanswered} events were published without an answer")
            for row, receipt in zip(now, receipts, strict=True):
                if self._is_out(row, receipt, sent.stuck):
                    sent.gone.append(row)
                elif row.key is not None:
                    waiting.add(row.key)
            done = {row.id for row in now}
            left = [row for row in left if row.id not in done]
            if self._stopping:
                break
        sent.is_whole = len(sent.gone) == len(rows)
        _tell(sent.stuck)
        return sent

    def _is_out(self, row: OutboxRow, receipt: Receipt, stuck: list[Stuck]) -> bool:
        """Whether a row is done with; one that the broker would not take joins the stuck."""
        if receipt is Receipt.CONFIRMED:
            self._stats.relayed += 1
            return True
        if receipt is Receipt.UNROUTABLE and row.unrouted == "drop":
            self._stats.dropped += 1
            return True
        if receipt is not Receipt.UNKNOWN:
            self._stats.stuck += 1
            stuck.append(Stuck(row, receipt.value, stuck_retry_s(row.attempts + 1, self._rng.random())))
        return False


def _tell(stuck: Sequence[Stuck]) -> None:
    """A line for each topic and reason: a queue that is gone makes thousands stuck for one."""
    alike: dict[tuple[str, str], list[OutboxRow]] = {}
    for one in stuck:
        alike.setdefault((one.row.topic, one.reason), []).append(one.row)
    for (topic, reason), rows in alike.items():
        others = f" and {len(rows) - 1} more are" if len(rows) > 1 else " is"
        first = rows[0]
        about = {"event.id": str(first.event_id), "event.reason": reason, **trace_ids(trace_headers(first.headers))}
        log.error("event %s (%s)%s stuck: %s; tried again", first.event_id, topic, others, reason, extra=about)


class _Sent:
    """What became of a page: the rows that are out, and those that the broker would not take."""

    __slots__ = ("failure", "gone", "is_whole", "stuck")

    def __init__(self) -> None:
        self.gone: list[OutboxRow] = []
        self.stuck: list[Stuck] = []
        self.is_whole = False
        """Whether all rows are out, so that what follows them may go."""
        self.failure: UnavailableError | None = None


async def publish_rows(
    broker: Broker, rows: Sequence[OutboxRow], tracing: Tracing | None, metrics: Metrics | None
) -> Sequence[Receipt]:
    """Publish the messages of outbox rows; one receipt each, in order."""
    messages = [outgoing_of(row) for row in rows]
    if (tracing is None or not tracing.records) and (metrics is None or not metrics.records):
        return await broker.publish(messages)
    began = anyio.current_time()
    receipts: Sequence[Receipt] | None = None
    begun = tracing.sending(rows, messages) if tracing is not None else ()
    failed: dict[str, str] = {}
    try:
        receipts = await broker.publish(messages)
    except BaseException as error:
        failed = {"error.type": type(error).__name__}
        raise
    finally:
        if begun and tracing is not None:
            tracing.sent(begun, receipts)
        if tracing is not None and metrics is not None and metrics.records:
            metrics.operation_duration.record(anyio.current_time() - began, sends(tracing.system) | failed)
    return receipts


def outgoing_of(row: OutboxRow) -> Outgoing:
    """The message of an outbox row."""
    headers: dict[str, HeaderValue] = dict(row.headers)
    if row.key is not None:
        headers[KEY] = row.key
    return Outgoing(
        exchange=EVENTS_EXCHANGE,
        routing_key=routing_key(row.topic, row.bucket),
        body=row.body,
        message_id=uuid_text(row.event_id),
        type=row.topic,
        content_type=row.content_type,
        timestamp_s=(row.event_id.int >> 80) // 1000,
        headers=headers,
    )
