"""The relay with a backlog: while a full page is published, the next one is read and the one before deleted; order stays."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import pytest

from orderbus import UnavailableError
from orderbus._core.message import Outgoing, Receipt
from tests.runtime.relaying import emit, heard, listen, numbers, relay
from tests.runtime.world import Placed, World, until

pytestmark = pytest.mark.anyio

PAGE = 10
PAGES = 5


async def fill(world: World) -> None:
    """Five full pages, two rows of each key to a page."""
    await listen(world)
    await emit(world, *(Placed(order=f"key-{n % 5}", n=n) for n in range(PAGE * PAGES)))


def before_each(world: World, name: str, hook: Callable[[], Awaitable[None]]) -> None:
    target: Any = world.broker if name == "publish" else world.store.outbox
    original = getattr(target, name)

    async def hooked(*arguments: Any, **named: Any) -> Any:
        await hook()
        return await original(*arguments, **named)

    setattr(target, name, hooked)


def assert_all_in_order(world: World) -> None:
    for key in range(5):
        assert numbers(world, f"key-{key}") == list(range(key, PAGE * PAGES, 5))


async def test_the_next_page_is_read_and_the_one_before_deleted_while_one_is_published(world: World) -> None:
    await fill(world)
    under_way, beside = [False], []

    async def publishing() -> None:
        under_way[0] = True
        await anyio.sleep(0.01)
        under_way[0] = False

    def noting(name: str) -> Callable[[], Awaitable[None]]:
        async def note() -> None:
            beside.append((name, under_way[0]))

        return note

    for name in ("read", "delete"):
        before_each(world, name, noting(name))
    before_each(world, "publish", publishing)
    async with relay(world, relay_batch=PAGE):
        await until(lambda: not world.store.outbox.rows())

    assert_all_in_order(world)
    # The first page says how far the others may be read ahead; the last one ends there.
    assert beside.count(("read", True)) == PAGES - 2
    assert beside.count(("delete", True)) == PAGES - 3
    assert beside.count(("read", False)) >= 2


async def test_a_page_that_was_read_ahead_waits_where_a_row_before_it_did_not_get_out(world: World) -> None:
    await fill(world)
    publish = world.broker.publish
    tried: list[str] = []

    async def refusing_once(batch: Sequence[Outgoing]) -> Sequence[Receipt]:
        first = not tried
        tried.extend(str(message.body) for message in batch)
        rest = await publish(batch[1:] if first else batch)
        return [Receipt.REFUSED, *rest] if first else rest

    world.broker.publish = refusing_once
    async with relay(world, relay_batch=PAGE):
        await until(lambda: len(heard(world)) == PAGE * PAGES)
        await until(lambda: not world.store.outbox.rows() and not world.store.outbox.stuck())

    assert_all_in_order(world)


@pytest.mark.parametrize("name", ["read", "delete"])
async def test_a_database_that_fails_beside_a_publish_loses_nothing_and_reorders_nothing(world: World, name: str) -> None:
    await fill(world)
    chance = random.Random(3)

    async def failing() -> None:
        if chance.random() < 0.4:
            raise UnavailableError("the database is away")

    before_each(world, name, failing)
    async with relay(world, relay_batch=PAGE):
        await until(lambda: not world.store.outbox.rows(), within_s=1000)

    for key in range(5):
        firsts = list(dict.fromkeys(numbers(world, f"key-{key}")))
        assert firsts == list(range(key, PAGE * PAGES, 5))


async def test_a_row_that_appears_below_the_page_read_ahead_is_published_too(world: World) -> None:
    """PostgreSQL gives ids before commits: the row of a slow transaction appears below others that were read already."""
    await fill(world)
    read = world.store.outbox.read
    late: list[Any] = []
    reads: list[int | None] = []

    async def reading(buckets: Sequence[int], floor: int, limit: int, limit_bytes: int, up_to: int | None = None) -> Any:
        page = await read(buckets, floor, limit, limit_bytes, up_to)
        reads.append(up_to)
        if len(reads) == 2:  # the first one is not read on from
            late.append(world.store.outbox._waiting[page.rows[3].bucket].pop(page.rows[3].id))
        elif late and late[0] is not None and up_to is not None:
            world.store.outbox._waiting[late[0].bucket][late[0].id] = late[0]
            late[0] = None
        rows = [row for row in page.rows if not late or row is not late[0]]
        return type(page)(rows=rows, xmin=page.xmin, last_id=page.last_id)

    world.store.outbox.read = reading
    async with relay(world, relay_batch=PAGE):
        await until(lambda: not world.store.outbox.rows())

    assert late == [None]
    assert sorted(n for key in range(5) for n in numbers(world, f"key-{key}")) == list(range(PAGE * PAGES))
