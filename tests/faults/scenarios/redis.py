"""Redis down, killed, flushed, slow, full and read-only. Only handlers guarded by it alone wait; all others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis import Redis

from tests.faults.scenario import scenario
from tests.faults.servers import free_port
from tests.faults.world import Broken, World

ROLES = ("service", "relay", "notify")
PREFETCH = 400
"""What notify may hold unacknowledged: twice its concurrency times its fuse."""
LATENCY_S = 0.2
BEHIND_S = 2.0
CALL_S = 5
"""The time limit of the library for one call."""


def refused(world: World, word: str) -> None:
    """Until notify has been told so, and no more is noted, while everything else flows."""
    world.until(lambda: word in world.role("notify").log(), f"notify to meet {word!r}")
    settled = -1
    while settled != (settled := len(world.noted())):
        world.pause(0.5, 0.5)
    world.flow()
    if len(world.noted()) != settled:
        raise Broken("notify goes on without its guard")


@contextmanager
def commands(world: World) -> Iterator[Redis]:
    with Redis(port=world.servers.redis.port, socket_timeout=60) as redis:  # DEBUG SLEEP takes longer than its own limit
        yield redis


def noting(world: World, count: int = 500) -> None:
    """Until so many more have been noted."""
    target = len(world.noted()) + count
    world.until(lambda: len(world.noted()) >= target, f"{count} more to be noted")


@scenario("redis-down-from-the-start")
def down(world: World) -> None:
    """Whoever needs it starts without it, and waits; nobody else notices."""
    world.most_repeated = 0
    world.servers.redis.kill()
    world.begin(*ROLES)
    refused(world, "Redis at ")
    world.servers.redis.start()
    world.mended()
    noting(world)


@scenario("redis-killed-and-restarted", quick=True)
def killed(world: World) -> None:
    """SIGKILL: a claim whose answer nobody got is held by nobody until its lease is over, and then handled."""
    world.most_repeated = 0
    world.begin(*ROLES)
    noting(world)
    for _ in range(3):
        world.servers.redis.kill()
        world.pause(0.1, 1.0)
        world.servers.redis.start()
        noting(world, 100)
    world.servers.redis.kill()
    refused(world, "Redis at ")
    world.servers.redis.start()
    world.mended()


@scenario("redis-flushed")
def flushed(world: World) -> None:
    """All claims are forgotten, those in use too: what was done is acknowledged all the same, and not done again."""
    world.most_repeated = 0
    world.begin(*ROLES)
    with commands(world) as redis:
        world.until(lambda: redis.dbsize() > 0, "a claim")
        for _ in range(10):
            redis.flushall()
            noting(world, 300)
    world.mended()


@scenario("redis-flushed-and-notify-killed")
def flushed_and_killed(world: World) -> None:
    """What notify had in its hands comes again, and nothing knows of it any more: so much may be noted twice, and no more."""
    world.most_repeated = PREFETCH
    world.begin(*ROLES)
    noting(world)
    world.role("notify").kill()
    with commands(world) as redis:
        redis.flushall()
    world.start("notify")
    world.mended()
    noting(world)


@scenario("redis-slow")
def slow(world: World) -> None:
    """200 ms each way: fewer are noted than come, and nobody else is slower."""
    world.most_repeated = 0
    proxy = world.proxy("redis")
    world.begin(*ROLES)
    noting(world)
    proxy.latency_s = LATENCY_S
    world.until(lambda: world.committed() - len(world.noted()) > BEHIND_S * world.rate, "notify to fall behind")
    if world.lag() > BEHIND_S * world.rate:
        raise Broken(f"{world.lag()} events wait at handlers that have nothing to do with Redis")
    noting(world, 100)
    proxy.latency_s = 0.0
    world.mended()


@scenario("redis-silent-beyond-the-time-limit")
def silent(world: World) -> None:
    """Calls are given up that it carries out later, all the same."""
    world.most_repeated = 0
    world.begin(*ROLES)
    noting(world)
    with commands(world) as redis:
        redis.execute_command("DEBUG", "SLEEP", CALL_S + world.rng.uniform(1, 3))
    world.until(lambda: f"no answer within {CALL_S} s" in world.role("notify").log(), "a call to be given up")
    world.mended()
    noting(world)


def refusing(world: World, word: str, refuse: Callable[[Redis], object], mend: Callable[[Redis], object]) -> None:
    """It answers and takes no writes for a while."""
    world.most_repeated = 0
    world.begin(*ROLES)
    noting(world)
    with commands(world) as redis:
        try:
            refuse(redis)
            refused(world, word)
        finally:
            mend(redis)
    world.mended()
    noting(world)


@scenario("redis-read-only")
def read_only(world: World) -> None:
    """A replica, as after a failover, whose primary is away."""
    refusing(world, "read only", lambda redis: redis.slaveof("127.0.0.1", free_port()), lambda redis: redis.slaveof())


@scenario("redis-without-its-replicas")
def without_replicas(world: World) -> None:
    """It has to have one that is up to date, and has none."""
    refusing(
        world,
        "NOREPLICAS",
        lambda redis: redis.config_set("min-replicas-to-write", 1),
        lambda redis: redis.config_set("min-replicas-to-write", 0),
    )


@scenario("redis-out-of-memory")
def out_of_memory(world: World) -> None:
    """Its limit is reached, and it evicts nothing: it refuses whatever could make it grow, the completion of claims too."""
    refusing(
        world,
        "maxmemory",  # the client cuts off the OOM before it
        lambda redis: redis.config_set("maxmemory", "1mb"),
        lambda redis: redis.config_set("maxmemory", 0),
    )
