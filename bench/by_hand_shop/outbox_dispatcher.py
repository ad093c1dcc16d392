"""Outbox dispatcher: polls, publishes a page concurrently with confirms, and deletes what was confirmed."""

from __future__ import annotations

import asyncio
import logging

from bench.by_hand_shop.service import Service
from bench.by_hand_shop.topology import EVENTS, declare_all

PAGE = 200
LOOPS = 2
"""One publishes while the other reads: rows that are locked are skipped."""
IDLE_S = 0.02
CONFIRM_S = 10
FORGET_EVERY_S = 10

service = Service("outbox-dispatcher")
log = logging.getLogger("shop")


async def dispatch() -> int:
    """One page; how many were sent. What was not confirmed stays, and may be sent twice: the inbox of its consumers knows it."""
    async with service.pool.connection() as connection, connection.transaction():
        rows = await (await connection.execute(_TAKE, (PAGE,))).fetchall()
        outcomes = await asyncio.gather(*(_publish(*row[1:]) for row in rows), return_exceptions=True)
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failed:
            log.warning("%d of %d events were not sent: %r", len(failed), len(rows), failed[0])
        sent = [row[0] for row, outcome in zip(rows, outcomes, strict=True) if not isinstance(outcome, BaseException)]
        if sent:
            await connection.execute(_DELETE, (sent,))
        return len(sent)


async def dispatch_always() -> None:
    while True:
        try:
            sent = await dispatch()
        except Exception:
            log.exception("the outbox could not be read")
            sent = 0
        if not sent:
            await asyncio.sleep(IDLE_S)


async def forget_old() -> None:
    """A day is longer than any message or repeated request takes."""
    while True:
        await asyncio.sleep(FORGET_EVERY_S)
        try:
            async with service.pool.connection() as connection:
                await connection.execute("delete from inbox where handled_at < now() - interval '1 day'")
                await connection.execute("delete from idempotency_key where created_at < now() - interval '1 day'")
        except Exception:
            log.exception("old rows were not deleted")


async def _publish(event_id: object, topic: str, body: bytes) -> None:
    await service.broker.publish(
        body,
        exchange=EVENTS,
        routing_key=topic,
        persist=True,
        message_id=str(event_id),
        content_type="application/json",
        timeout=CONFIRM_S,
    )


_TAKE = "select id, event_id, topic, body from outbox order by id limit %s for update skip locked"
_DELETE = "delete from outbox where id = any(%s)"


if __name__ == "__main__":
    service.run(*[dispatch_always] * LOOPS, forget_old, before=declare_all)
