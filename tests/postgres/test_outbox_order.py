"""Writers that commit in any order while the outbox is relayed: each key comes out in commit order, and nothing is lost."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from orderbus import Settings
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.outbox import Floor, first_per_key
from orderbus._runtime.relay import Relay
from orderbus._runtime.stats import Stats
from orderbus.abc import OutboxPage
from orderbus.adapters.memory import MemoryBroker
from orderbus.adapters.postgres import PostgresStore, open_store
from orderbus.adapters.postgres.outbox import PostgresOutbox
from tests.postgres.conftest import ALL, Sql, event_id, row

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

PLENTY = 1 << 30
WRITERS = 8
KEYS = 5
WAITING = "select (select count(*) from orderbus.outbox) + (select count(*) from orderbus.stuck)"


class Writers:
    """They serialise on a key's row, pause between statements, take their xid early or late, and sometimes roll back."""

    def __init__(self, store: PostgresStore, query: Sql, rng: random.Random, write_s: float) -> None:
        self._store = store
        self._query = query
        self._rng = rng
        query("create table keys (key text primary key, version integer not null)")
        query("insert into keys select 'k' || n, 0 from generate_series(0, %s) n", KEYS - 1)
        self.ends_at = time.monotonic() + write_s

    async def run(self) -> int:
        """How many events were committed."""
        return sum(await asyncio.gather(*(self._write(number) for number in range(WRITERS))))

    async def _write(self, number: int) -> int:
        count = 0
        while time.monotonic() < self.ends_at:
            key = f"k{self._rng.randrange(KEYS)}"
            transaction = await self._store.begin()
            if self._rng.random() < 0.3:
                await transaction.execute("select pg_current_xact_id()", ())
                await asyncio.sleep(self._rng.random() / 500)
            found, _ = await transaction.execute("update keys set version = version + 1 where key = %s returning version", (key,))
            events = [row(0, key, body=b"%d" % found[0][0], event_id=event_id(number * 10**6 + count))]
            if self._rng.random() < 0.2:
                await transaction.rollback()
                continue
            await transaction.commit([], events)
            count += 1
        return count

    def check(self, seen: dict[str, list[int]]) -> None:
        """Of each key every version from the first to the last, in order, and no row that waits."""
        assert self._query("select count(*) from orderbus.outbox") == [(0,)]
        assert self._query("select count(*) from orderbus.stuck") == [(0,)]
        assert {key: list(range(1, version + 1)) for key, version in self._query("select key, version from keys")} == seen


async def test_every_key_is_read_in_commit_order_and_nothing_is_lost(url: str, query: Sql) -> None:
    """Pages of any size, of which something stays, by the floor's arithmetic alone."""
    rng = random.Random(7)
    async with open_store(url, name="stress", pool_size=WRITERS + 2) as store:
        await store.apply_schema()
        writers = Writers(store, query, rng, write_s=4)
        seen: dict[str, list[int]] = defaultdict(list)
        floors: list[int] = []

        async def relay() -> int:
            floor, empty, count = Floor(), 0, 0
            while empty < 5 or time.monotonic() < writers.ends_at + 0.5:
                page = await store.outbox.read(ALL, floor.value, rng.choice([1, 5, 100]), PLENTY)
                floor.read(xmin=page.xmin, last_id=page.last_id, lowest_id=page.rows[0].id if page.rows else None)
                floors.append(floor.value)
                chosen = [found for found in first_per_key(page.rows) if rng.random() < 0.9]
                for found in chosen:
                    seen[found.key or ""].append(int(found.body))
                mark = floor.mark()
                if chosen:
                    floor.deleted(mark, await store.outbox.delete(chosen))
                count += len(chosen)
                empty = 0 if page.rows else empty + 1
            return count

        relaying = asyncio.create_task(relay())

        assert await writers.run() == await relaying
        writers.check(seen)
        assert floors[-1] > 0


async def test_the_relay_publishes_every_key_in_commit_order_while_it_reads_ahead(url: str, query: Sql) -> None:
    """Pages of two rows are full pages, so that it reads on beside every publish; the broker refuses some and loses some answers."""
    rng = random.Random(8)
    async with open_store(url, name="stress", pool_size=WRITERS + 2) as store:
        await store.apply_schema()
        writers = Writers(store, query, rng, write_s=1.5)
        seen: dict[str, list[int]] = defaultdict(list)

        class Broker(MemoryBroker):
            async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
                await asyncio.sleep(rng.random() / 1000)
                answers = []
                for message in batch:
                    lot = rng.random()
                    if lot > 0.002:
                        seen[str(message.headers["ob-key"])].append(int(message.body))
                    answers.append(Receipt.REFUSED if lot < 0.002 else Receipt.UNKNOWN if lot < 0.006 else Receipt.CONFIRMED)
                return answers

        relay = Relay(store.outbox, Broker(), Settings(relay_batch=4), Stats(), "relay", rng)
        running = asyncio.create_task(relay.run())
        written = await writers.run()
        async with asyncio.timeout(60):
            while sum(len(set(versions)) for versions in seen.values()) < written or query(WAITING) != [(0,)]:  # noqa: ASYNC110 - the database does not tell
                await asyncio.sleep(0.05)
        relay.stop()
        await running

        writers.check({key: list(dict.fromkeys(versions)) for key, versions in seen.items()})


async def test_what_commits_late_is_not_overtaken_by_its_key_while_the_relay_reads_ahead(url: str, query: Sql) -> None:
    """It took its id before the page under way, and commits while that is published; the next one of its key follows at once."""
    seen: list[str] = []

    class Broker(MemoryBroker):
        async def publish(self, batch: Sequence[Outgoing]) -> Sequence[Receipt]:
            seen.extend(message.body.decode() for message in batch)
            return [Receipt.CONFIRMED] * len(batch)

    async with open_store(url, name="late") as store, await psycopg.AsyncConnection.connect(url) as late:
        await store.apply_schema()
        first = row(0, "late", body=b"first", event_id=event_id(1))
        await late.execute(
            "insert into orderbus.outbox (event_id, bucket, topic, key, body, content_type, headers, unrouted)"
            " values (%s, %s, %s, %s, %s, %s, '{}', 'keep')",
            (first.event_id, first.bucket, first.topic, first.key, first.body, first.content_type),
        )
        others = [row(0, f"k{n}", body=b"other", event_id=event_id(10 + n)) for n in range(12)]
        await (await store.begin()).commit([], others)

        class Outbox(PostgresOutbox):
            async def read(self, *arguments: Any, **named: Any) -> OutboxPage:
                if named and late.info.transaction_status is TransactionStatus.INTRANS:
                    await late.commit()
                    await (await store.begin()).commit([], [row(0, "late", body=b"second", event_id=event_id(2))])
                return await super().read(*arguments, **named)

        outbox = Outbox(store.outbox._pool, limit_s=10)
        relay = Relay(outbox, Broker(), Settings(relay_batch=4), Stats(), "relay", random.Random(9))
        running = asyncio.create_task(relay.run())
        async with asyncio.timeout(30):
            while len(seen) < 14:  # noqa: ASYNC110 - the broker of this test does not tell
                await asyncio.sleep(0.01)
        relay.stop()
        await running

    assert [text for text in seen if text != "other"] == ["first", "second"]
