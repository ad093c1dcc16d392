"""Real SIGKILLs at exact moments, then a restart, then a count."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from orderbus.adapters.postgres import apply
from tests.crash.program import EVENTS, FAILPOINTS
from tests.servers import Rabbit

pytestmark = [pytest.mark.crash, pytest.mark.servers]

WAIT_S = 60.0


class World:
    """A database and a vhost of the test's own, and the processes that use them."""

    def __init__(self, broker_url: str, database_url: str) -> None:
        self._environment = {
            **os.environ,
            "ORDERBUS_BROKER_URL": broker_url,
            "ORDERBUS_DATABASE_URL": database_url,
            "ORDERBUS_RELAY_LEASE_S": "1",
        }
        self._running: list[subprocess.Popen[bytes]] = []
        self.connection: psycopg.Connection[Any] = psycopg.connect(database_url, autocommit=True)
        self.connection.execute("create table source (n int)")
        self.connection.execute("create table effect (n int, which text)")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([sys.executable, "-m", "tests.crash.program", *arguments], env=self._environment)
        self._running.append(process)
        return process

    def produce(self) -> None:
        assert self.start("producer").wait(WAIT_S) == 0

    def counts(self) -> tuple[int, int, int]:
        """Rows in the source, effects, and orders with both effects."""
        row = self.connection.execute(
            """select (select count(*) from source), (select count(*) from effect),
                (select count(*) from (select n from effect group by n having count(distinct which) = 2) done)"""
        ).fetchone()
        assert row is not None
        return row[0], row[1], row[2]

    def wait_until_all_applied(self) -> None:
        deadline = time.monotonic() + WAIT_S
        while True:
            source, _, done = self.counts()
            waiting = self.connection.execute("select count(*) from orderbus.outbox").fetchone()
            if source == done and waiting == (0,):
                return
            assert time.monotonic() < deadline, f"{done} of {source} orders applied after {WAIT_S:g} s"
            select_pause()

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(WAIT_S)
        self.connection.close()


def select_pause() -> None:
    """The one place where these tests look again: another process changes the database, and nothing tells this one."""
    time.sleep(0.02)


@pytest.fixture
def world(rabbit: Rabbit, database_url: str) -> Iterator[World]:
    async def prepare() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await apply(connection)

    asyncio.run(prepare())
    with rabbit.vhost(f"orderbus-crash-{secrets.token_hex(4)}") as broker_url:
        world = World(broker_url, database_url)
        yield world
        world.close()


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_a_service_killed_at_any_point_loses_nothing_and_doubles_nothing(world: World, failpoint: str) -> None:
    declaring = world.start("service")
    wait_for_queues(world)
    declaring.send_signal(signal.SIGTERM)
    assert declaring.wait(WAIT_S) == 0
    world.produce()

    assert world.start("service", failpoint).wait(WAIT_S) == -signal.SIGKILL
    world.start("service")
    world.wait_until_all_applied()

    assert world.counts() == (EVENTS, 2 * EVENTS, EVENTS)


def test_a_producer_killed_before_its_commit_leaves_no_ghost(world: World) -> None:
    world.start("service")
    wait_for_queues(world)

    assert world.start("producer", "after-effect-before-commit").wait(WAIT_S) == -signal.SIGKILL
    world.wait_until_all_applied()

    source, effects, done = world.counts()
    assert 0 < source < EVENTS
    assert (effects, done) == (2 * source, source)


def test_services_killed_at_random_times_lose_nothing_and_double_nothing(world: World) -> None:
    seed = int(os.environ.get("SEED", "20261124"))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    world.start("service")
    wait_for_queues(world)
    world.start("producer")
    for _ in range(4):
        victim = world.start("service")
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(0.4 + rng.random())
        victim.kill()
    world.wait_until_all_applied()

    source, effects, done = world.counts()
    assert (effects, done) == (2 * source, source)


def wait_for_queues(world: World) -> None:
    """Until the service's relay holds its buckets: its queues are declared before that."""
    deadline = time.monotonic() + WAIT_S
    while world.connection.execute("select count(*) from orderbus.lease").fetchone() == (0,):
        assert time.monotonic() < deadline, "the service did not come up"
        select_pause()
