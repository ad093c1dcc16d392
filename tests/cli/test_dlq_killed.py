"""The command line killed at exact and at random moments, on a real RabbitMQ and PostgreSQL; then a count of what there is."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psycopg
import pytest

from orderbus import Bus, Event, Park, Retry, Settings, Tx, new_id
from orderbus._core.leaving import PARKED_AT, QUEUE, REASON
from orderbus._core.message import Outgoing, Receipt, Settlement
from orderbus._core.topology import Queue, Topology
from orderbus.abc import Broker
from orderbus.adapters.postgres import open_store
from orderbus.adapters.rabbitmq import open_broker
from tests.cli.conftest import LIMIT_S, ROOT, delete_queues
from tests.cli.killed import POINTS

pytestmark = [pytest.mark.anyio, pytest.mark.servers, pytest.mark.crash]

LETTERS = 60
KEYS = 5


class Placed(Event, topic="killed.placed", key="key"):
    key: str
    n: int


class Shop:
    """Two groups bound to one topic: the one parks what it gets until it is mended, the other handles it at once."""

    def __init__(self, broker: Broker, broker_url: str, database_url: str) -> None:
        self.broker = broker
        self.broker_url = broker_url
        self.database_url = database_url
        settings = Settings(broker_url=broker_url, database_url=database_url, relay=False, pool_size=2)
        name = secrets.token_hex(4)
        self.payment, self.counting = Bus(f"payment-{name}", settings=settings), Bus(f"counting-{name}", settings=settings)
        self.queue = f"payment-{name}.ordered"
        self.dlq = f"{self.queue}.dlq"
        self.is_mended = False

        @self.payment.on(Placed, ordered=True, retry=Retry.none())
        async def pay(event: Placed, tx: Tx) -> None:
            if not self.is_mended or event.n < 0:
                raise Park("not-mended")
            await tx.execute("insert into effect (key, n) values (%s, %s)", (event.key, event.n))

        @self.counting.on(Placed, retry=Retry.none())
        async def count(event: Placed, tx: Tx) -> None:
            await tx.execute("insert into counted (n) values (%s)", (event.n,))

    async def park(self, events: Sequence[Placed]) -> None:
        await self.payment.publish_many(events)
        while await self.broker.depth(self.dlq) != len(events) or self.counting.stats.handled != len(events):
            pass
        self.is_mended = True

    async def drained(self) -> None:
        while await self.broker.depth(self.queue):
            pass

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url) as connection:
            return connection.execute(statement).fetchall()  # type: ignore[arg-type]

    async def orderbus(self, *arguments: str, killed: tuple[str, int] | None = None) -> tuple[int, str]:
        """Run the command line to its end: its exit code, and what it said on stderr."""
        program = ["tests.cli.killed", killed[0], str(killed[1])] if killed else ["orderbus"]
        done = await anyio.to_thread.run_sync(
            partial(
                subprocess.run,
                [sys.executable, "-m", *program, *arguments],
                env={**environment(), "ORDERBUS_BROKER_URL": self.broker_url, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        )
        return done.returncode, done.stderr


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("ORDERBUS_")}


@pytest.fixture
async def broker(vhost_url: str) -> AsyncIterator[Broker]:
    async with open_broker(vhost_url, name="tests") as broker:
        yield broker


@pytest.fixture
async def shop(broker: Broker, vhost_url: str, database_url: str) -> AsyncIterator[Shop]:
    async with open_store(database_url, name="tests") as store:
        await store.apply_schema()
    with psycopg.connect(database_url) as connection:
        connection.execute("create table effect (at bigserial, key text, n int); create table counted (n int)")
    shop = Shop(broker, vhost_url, database_url)
    yield shop
    counting = f"{shop.counting.group}.killed.placed"
    await delete_queues(broker, shop.queue, shop.dlq, counting, f"{counting}.dlq")


@pytest.mark.parametrize(
    ("point", "nth"),
    [
        ("after-receive", 1),
        ("before-publish", 3),
        ("published-unconfirmed", 1),
        ("published-unconfirmed", 4),
        ("confirmed-before-ack", 4),
        ("between-acks", 13),
        ("acked-before-flush", 1),
        ("after-flush", 1),
    ],
)
async def test_a_replay_killed_at_any_moment_and_run_again_loses_and_doubles_nothing(shop: Shop, point: str, nth: int) -> None:
    """Nor does it reach the other group, nor change the order of a key."""
    events = [Placed(key=f"k{n % KEYS}", n=n) for n in range(LETTERS)]
    with anyio.fail_after(LIMIT_S):
        async with shop.payment, shop.counting:
            await shop.park(events)
            code, _ = await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes", killed=(point, nth))
            assert code == -signal.SIGKILL
            # Run again in any case: what it had not acked comes back, also where all of it was handled meanwhile.
            assert (await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes"))[0] == 0
            while shop.query("select count(distinct n) from effect") != [(LETTERS,)]:
                assert (await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes"))[0] == 0
            await shop.drained()
        assert await shop.broker.depth(shop.dlq) == 0
    assert shop.query("select key, array_agg(n order by at) from effect group by key order by key") == [
        (f"k{key}", list(range(key, LETTERS, KEYS))) for key in range(KEYS)
    ]
    assert shop.query("select count(*), count(distinct n) from counted") == [(LETTERS, LETTERS)]
    assert shop.counting.receipt is not None
    assert shop.counting.receipt.stats.received == LETTERS


async def test_replays_killed_at_random_moments_lose_and_double_nothing(shop: Shop) -> None:
    seed = int(os.environ.get("SEED", "20261125"))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    with anyio.fail_after(2 * LIMIT_S):
        async with shop.payment, shop.counting:
            await shop.park([Placed(key=f"k{n % KEYS}", n=n) for n in range(LETTERS)])
            for _ in range(8):
                point = rng.choice(list(POINTS))
                await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes", killed=(point, rng.randint(1, 6)))
            # Run again in any case: what it had not acked comes back, also where all of it was handled meanwhile.
            assert (await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes"))[0] == 0
            while shop.query("select count(distinct n) from effect") != [(LETTERS,)]:
                assert (await shop.orderbus("dlq", "replay", shop.dlq, "--all", "--yes"))[0] == 0
            await shop.drained()
    assert shop.query("select key, array_agg(n order by at) from effect group by key order by key") == [
        (f"k{key}", list(range(key, LETTERS, KEYS))) for key in range(KEYS)
    ]


@pytest.mark.parametrize("point", ["published-unconfirmed", "confirmed-before-ack", "acked-before-flush"])
@pytest.mark.parametrize("second", [7, 8])
async def test_an_edit_killed_and_repeated_is_one_effect_also_with_another_body(
    shop: Shop, tmp_path: Path, point: str, second: int
) -> None:
    body, again = Path(tmp_path, "7.json"), Path(tmp_path, f"{second}.json")
    for file in (body, again):
        file.write_text(f'{{"key":"k","n":{file.stem}}}')
    with anyio.fail_after(LIMIT_S):
        async with shop.payment, shop.counting:
            await shop.park([Placed(key="k", n=-1)])
            [event_id] = await ids_in(shop, shop.dlq)
            code, _ = await shop.orderbus("dlq", "edit", event_id, shop.dlq, "--yes", "--body", str(body), killed=(point, 1))
            assert code == -signal.SIGKILL
            while shop.payment.stats.handled < 1:
                await shop.broker.depth(shop.dlq)
            await shop.orderbus("dlq", "edit", event_id, shop.dlq, "--yes", "--body", str(again))
            while shop.payment.stats.duplicates + shop.payment.stats.parked < 2 and point != "acked-before-flush":
                await shop.broker.depth(shop.dlq)
            await shop.drained()
            left = await shop.orderbus("dlq", "list", shop.dlq, "--reason", "id-reused", "--json")
    assert left[0] == 0
    assert shop.query("select key, n from effect") == [("k", 7)]
    assert shop.query("select n from counted") == [(-1,)]


async def ids_in(shop: Shop, queue: str) -> list[str]:
    done = await anyio.to_thread.run_sync(
        partial(
            subprocess.run,
            [sys.executable, "-m", "orderbus", "dlq", "list", queue, "--json"],
            env={**environment(), "ORDERBUS_BROKER_URL": shop.broker_url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        )
    )
    return [json.loads(line)["id"] for line in done.stdout.splitlines()]


# Without a consumer: what is in the queue, and on file


@pytest.fixture
async def letters(broker: Broker, vhost_url: str) -> AsyncIterator[Letters]:
    found = Letters(broker, vhost_url)
    await broker.apply(Topology(queues=(Queue(found.dlq, delivery_limit=2147483647),)))
    await found.park(100)
    yield found
    await delete_queues(broker, found.dlq)


class Letters:
    """A dead letter queue that nobody else uses."""

    orderbus = Shop.orderbus

    def __init__(self, broker: Broker, broker_url: str) -> None:
        self.broker = broker
        self.broker_url = broker_url
        self.dlq = f"looked-at-{secrets.token_hex(4)}.dlq"
        self.parked: list[tuple[str | None, bytes]] = []

    async def park(self, count: int) -> None:
        headers = {REASON: "broken", QUEUE: self.dlq.removesuffix(".dlq"), PARKED_AT: 1_700_000_000.0}
        letters = [Outgoing("", self.dlq, b'{"n":%d}' % n, str(new_id()), "t", headers=headers) for n in range(count)]
        assert set(await self.broker.publish(letters)) == {Receipt.CONFIRMED}
        self.parked = [(letter.message_id, letter.body) for letter in letters]

    async def taken(self, count: int) -> list[tuple[str | None, bytes]]:
        while await self.broker.depth(self.dlq) < count:
            pass
        found: list[tuple[str | None, bytes]] = []
        async with self.broker.subscribe(self.dlq, prefetch=1000) as subscription:
            while len(found) < count:
                for delivery in await subscription.receive():
                    found.append((delivery.properties.message_id, delivery.body))
                    subscription.settle(delivery, Settlement.ACK)
            await subscription.flush()
        assert await self.broker.depth(self.dlq) == 0
        return found


@pytest.mark.parametrize("verb", ["list", "export"])
async def test_a_lister_killed_in_the_middle_leaves_the_queue_as_it_was(letters: Letters, verb: str) -> None:
    seed = int(os.environ.get("SEED", "20261125"))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    with anyio.fail_after(LIMIT_S):
        for nth in (1, 2, rng.randint(1, 5)):
            code, _ = await letters.orderbus("dlq", verb, letters.dlq, "--limit", "50", killed=("after-receive", nth))
            assert code in (-signal.SIGKILL, 0, 1)  # it may have seen all in fewer steps
            while await letters.broker.depth(letters.dlq) < 100:
                pass
        assert await letters.taken(100) == letters.parked


@pytest.mark.parametrize(("point", "nth"), [("after-receive", 1), ("between-acks", 40), ("acked-before-flush", 1)])
async def test_a_purge_killed_in_the_middle_has_stored_all_that_is_gone(
    letters: Letters, tmp_path: Path, point: str, nth: int
) -> None:
    file = Path(tmp_path, "gone.jsonl")
    with anyio.fail_after(LIMIT_S):
        code, _ = await letters.orderbus(
            "dlq", "purge", letters.dlq, "--all", "--yes", "--export", str(file), killed=(point, nth)
        )
        assert code == -signal.SIGKILL
        await letters.orderbus("dlq", "import", str(file), "--yes")
        left = await letters.taken(100)
    assert sorted(left, key=str) == sorted(letters.parked, key=str)


@pytest.mark.parametrize(("point", "nth"), [("before-publish", 3), ("published-unconfirmed", 3), ("confirmed-before-ack", 3)])
async def test_an_import_killed_in_the_middle_is_repeated_without_doubling(
    letters: Letters, tmp_path: Path, point: str, nth: int
) -> None:
    file = str(Path(tmp_path, "gone.jsonl"))
    with anyio.fail_after(LIMIT_S):
        assert (await letters.orderbus("dlq", "purge", letters.dlq, "--all", "--yes", "--export", file))[0] == 0
        code, _ = await letters.orderbus("dlq", "import", file, "--yes", "--rate", "200/s", killed=(point, nth))
        assert code == -signal.SIGKILL
        code, said = await letters.orderbus("dlq", "import", file, "--yes")
        assert code == 0
        assert '"outcome":"present"' in said
        assert await letters.taken(100) == letters.parked
