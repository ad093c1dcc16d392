"""Inventory: holds goods for orders without ever promising a piece twice, and puts them back when an order is cancelled.

Both handlers lock in the same order, reservations first and then articles by name, so that they never deadlock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from uuid import UUID

import msgspec
from opentelemetry.metrics import get_meter

from orderbus import Batch, Bus, Column, Tx, columns
from services.shared.events import OrderCancelled, OrderPlaced, StockRejected, StockReserved

bus = Bus("inventory")

STOCK = get_meter("orders").create_gauge("orders.stock", "{piece}", "Pieces on the shelves; and of the scarcest article.")


@bus.on_batch(OrderPlaced, most=200)
async def reserve(batch: Batch[OrderPlaced], tx: Tx) -> list[StockReserved | StockRejected]:
    """Give the batch's orders what there is, first come, first served. An order is held as a whole or not at all."""
    wanted = {order.order_id: _pieces(order) for order in batch.events}
    answers: list[StockReserved | StockRejected] = []
    fresh: list[UUID] = []
    for order_id, state, times, sku, reason in await tx.fetch_all(
        _CLAIM, columns((order.order_id, _json(wanted[order.order_id])) for order in batch.events)
    ):
        if state == "held" and times == 1:
            fresh.append(order_id)
        elif state == "held":
            answers.append(StockReserved(order_id=order_id))
        elif state == "rejected":
            answers.append(StockRejected(order_id=order_id, sku=sku, reason=reason))

    available = await _lock(tx, (sku for order_id in fresh for sku in wanted[order_id]))
    taken: Counter[str] = Counter()
    rejected: list[StockRejected] = []
    for order_id in fresh:
        refusal = _refusal(order_id, wanted[order_id], available, taken)
        if refusal is None:
            taken.update(wanted[order_id])
            answers.append(StockReserved(order_id=order_id))
        else:
            rejected.append(refusal)
    if taken:
        await tx.execute(_MOVE, columns((sku, -pieces) for sku, pieces in taken.items()))
    if rejected:
        await tx.execute(_REJECT, columns((no.order_id, no.sku, no.reason) for no in rejected))
    return answers + rejected


@bus.every(10.0)
async def count_stock(tx: Tx) -> None:
    """How much there is, for the metrics."""
    row = await tx.fetch_one("select coalesce(sum(available), 0), coalesce(min(available), 0) from stock")
    assert row is not None
    STOCK.set(int(row[0]), {"stock.of": "all"})
    STOCK.set(int(row[1]), {"stock.of": "scarcest"})


@bus.on_batch(OrderCancelled, most=200)
async def release(batch: Batch[OrderCancelled], tx: Tx) -> None:
    """Put back what was held; where nothing is there yet, leave a tombstone that `reserve` will find."""
    returned: Counter[str] = Counter()
    for state, reversals, pieces in await tx.fetch_all(_RELEASE, [Column(order.order_id for order in batch.events)]):
        if state == "released" and reversals == 1:
            returned.update(pieces)
    if returned:
        await _lock(tx, returned)
        await tx.execute(_MOVE, columns(returned.items()))


def _pieces(order: OrderPlaced) -> dict[str, int]:
    """How many pieces of each article, which may stand in several lines."""
    pieces: Counter[str] = Counter()
    for line in order.lines:
        pieces[line.sku] += line.quantity
    return dict(pieces)


def _refusal(
    order_id: UUID, pieces: Mapping[str, int], available: Mapping[str, int], taken: Mapping[str, int]
) -> StockRejected | None:
    for sku, count in pieces.items():
        if sku not in available:
            return StockRejected(order_id=order_id, sku=sku, reason="unknown-article")
        if count < 1 or available[sku] - taken[sku] < count:
            return StockRejected(order_id=order_id, sku=sku, reason="out-of-stock" if count > 0 else "no-quantity")
    return None


async def _lock(tx: Tx, skus: Iterable[str]) -> dict[str, int]:
    """Lock the articles; how many pieces each has left."""
    return dict(await tx.fetch_all(_LOCK, [Column(sorted(set(skus)))]))


def _json(pieces: Mapping[str, int]) -> str:
    return msgspec.json.encode(pieces).decode()


_CLAIM = """\
insert into reservation (order_id, state, pieces)
select order_id, 'held', pieces::jsonb from unnest(%s::uuid[], %s::text[]) as placed (order_id, pieces)
on conflict (order_id) do update set times = reservation.times + 1
returning order_id, state, times, sku, reason"""

_LOCK = "select sku, available from stock where sku = any(%s::text[]) order by sku for update"

_MOVE = """\
update stock set available = available + pieces
from unnest(%s::text[], %s::integer[]) as moved (sku, pieces)
where stock.sku = moved.sku"""

_REJECT = """\
update reservation set state = 'rejected', pieces = '{}', sku = refusal.sku, reason = refusal.reason
from unnest(%s::uuid[], %s::text[], %s::text[]) as refusal (order_id, sku, reason)
where reservation.order_id = refusal.order_id"""

_RELEASE = """\
insert into reservation (order_id, state, times, reversals)
select order_id, 'void', 0, 1 from unnest(%s::uuid[]) as order_id
on conflict (order_id) do update set
    state = case reservation.state when 'held' then 'released' else reservation.state end,
    reversals = reservation.reversals + 1
returning state, reversals, pieces"""
