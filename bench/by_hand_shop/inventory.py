"""Inventory: holds goods for orders, as a whole or not at all, and puts them back when an order is cancelled.

Both handlers lock the reservation first and then the articles by name, so that they never deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bench.by_hand_shop.database import FRESH, OUTBOX, Connection
from bench.by_hand_shop.events import OrderCancelled, OrderPlaced, StockRejected, StockReserved, encode
from bench.by_hand_shop.service import Service

service = Service("inventory")


@service.on(OrderPlaced)
async def reserve(order: OrderPlaced) -> None:
    pieces: Counter[str] = Counter()
    for line in order.lines:
        pieces[line.sku] += line.quantity
    async with service.pool.connection() as connection, connection.transaction():
        claim = (service.name, order.event_id, order.order_id, encode(pieces).decode())
        row = await (await connection.execute(_CLAIM, claim)).fetchone()
        if row != ("held",):
            return  # handled before, or cancelled before it came here
        available = await _lock(connection, pieces)
        for sku, count in pieces.items():
            if available.get(sku, -1) < count:
                reason = "out-of-stock" if sku in available else "unknown-article"
                no = StockRejected(order_id=order.order_id, sku=sku, reason=reason)
                await connection.execute(_REJECT, (sku, reason, order.order_id, no.event_id, no.topic, encode(no)))
                return
        yes = StockReserved(order_id=order.order_id)
        taken = (list(pieces), [-count for count in pieces.values()])
        await connection.execute(_TAKE, (*taken, yes.event_id, yes.topic, encode(yes)))


@service.on(OrderCancelled)
async def release(order: OrderCancelled) -> None:
    """Where nothing is there yet, a tombstone is left that `reserve` will find."""
    async with service.pool.connection() as connection, connection.transaction():
        cursor = await connection.execute(_RELEASE, (service.name, order.event_id, order.order_id))
        row = await cursor.fetchone()
        if row is not None and row[:2] == ("released", 1):
            pieces = row[2]
            await _lock(connection, pieces)
            await connection.execute(_MOVE, (list(pieces), list(pieces.values())))


async def _lock(connection: Connection, pieces: Mapping[str, int]) -> dict[str, int]:
    """How many of each article there are."""
    return dict(await (await connection.execute(_LOCK, (list(pieces),))).fetchall())


_CLAIM = f"""\
{FRESH} insert into reservation (order_id, state, pieces) select %s, 'held', %s::jsonb from fresh
on conflict (order_id) do update set times = reservation.times + 1
returning state"""

_LOCK = "select sku, available from stock where sku = any(%s) order by sku for update"

_MOVE = """\
update stock set available = available + pieces
from unnest(%s::text[], %s::integer[]) as moved (sku, pieces)
where stock.sku = moved.sku"""

_TAKE = f"with moved as ({_MOVE}) {OUTBOX} values (%s, %s, %s)"

_REJECT = f"""\
with rejected as (update reservation set state = 'rejected', pieces = '{{}}', sku = %s, reason = %s where order_id = %s)
{OUTBOX} values (%s, %s, %s)"""

_RELEASE = f"""\
{FRESH} insert into reservation (order_id, state, times, reversals) select %s, 'void', 0, 1 from fresh
on conflict (order_id) do update set
    state = case reservation.state when 'held' then 'released' else reservation.state end,
    reversals = reservation.reversals + 1
returning state, reversals, pieces"""


if __name__ == "__main__":
    service.run()
