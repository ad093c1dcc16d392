"""Random faults of processes, networks and servers, one after the other, for a while; and processes that live through them all and must not grow."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psycopg

from tests.faults.scenario import scenario
from tests.faults.world import Broken, Process, World

SECONDS = float(os.environ.get("FAULTS_SOAK_S", "300"))
RATE = 500.0
"""Events a second: an hour is 1.8 million."""
CALM_S = (1.0, 4.0)
WARM_UP = 0.25
"""The part of the time after which the survivors are measured for the first time."""
SURVIVORS = ("service", "trail", "relay", "notify")
GROWTH = 8
"""File descriptors, tasks, connections: a pool may hold some more than it did."""
GROWTH_BLOCKS = 0.1
"""What Python holds when the load is worked off: a leak shows here."""
GROWTH_MIB = 40.0
"""Resident memory follows the worst moment: an outage's exceptions, with hundreds of deliveries in hand, leave holes behind."""


class Figures(msgspec.Struct, frozen=True):
    """What a process holds."""

    rss_mib: float
    blocks: int
    descriptors: int
    tasks: int
    connections: int


@scenario("soak")
def soak(world: World) -> None:
    """A fault every few seconds. Their order and moments are the seed's."""
    world.rate = RATE
    world.environment["FAULTS_RATE"] = str(RATE)
    broker, database, redis = world.proxy("broker"), world.proxy("database"), world.proxy("redis")
    world.begin(*SURVIVORS, *(f"{name}-b" for name in SURVIVORS))

    def killed() -> None:
        world.restart(world.rng.choice(("service-b", "trail-b", "relay-b", "notify-b", "producer")))

    def stopped() -> None:
        name = world.rng.choice(("service-b", "trail-b", "relay-b", "notify-b"))
        world.role(name).stop(may_be_unclean=True)  # the fault before this one may not be got over
        world.start(name)

    def frozen() -> None:
        role = world.role(world.rng.choice(("service-b", "trail-b", "relay-b", "notify-b")))
        role.freeze()
        world.pause(0.5, 3.0)
        role.thaw()

    def cut(what: str) -> None:
        for proxy in (broker, database, redis) if what == "all" else (world.rng.choice((broker, database, redis)),):
            proxy.reset_all()

    def slow() -> None:
        proxy = world.rng.choice((broker, database, redis))
        proxy.latency_s = world.rng.uniform(0.01, 0.2)
        world.pause(0.5, 3.0)
        proxy.pass_on()

    def refused() -> None:
        proxy = world.rng.choice((broker, database, redis))
        proxy.refuse()
        world.pause(0.1, 3.0)
        proxy.pass_on()

    def server_killed() -> None:
        server = world.rng.choice((world.servers.postgres, world.servers.redis, world.servers.rabbit))
        server.kill()
        world.pause(0.1, 1.0)
        server.start()

    def backends_ended() -> None:
        try:
            world.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            )
        except psycopg.OperationalError as error:
            raise Broken("the database was to be up") from error

    faults: list[Callable[[], None]] = [
        killed,
        killed,
        stopped,
        frozen,
        lambda: cut("one"),
        lambda: cut("all"),
        slow,
        refused,
        backends_ended,
        server_killed,
    ]
    began, first = time.monotonic(), None
    while (passed_s := time.monotonic() - began) < SECONDS:
        if first is None and passed_s > WARM_UP * SECONDS:
            world.until(lambda: world.lag() <= RATE, "the backlog to be worked off")
            first = measured(world)
        world.rng.choice(faults)()
        world.pause(*CALM_S)
    world.mended()
    world.flow()
    world.until(lambda: world.lag() <= RATE, "the backlog to be worked off")
    report(world, first or measured(world), measured(world))


def measured(world: World) -> dict[str, Figures]:
    """The survivors, as they are."""
    return {name: figures(world, world.role(name)) for name in SURVIVORS}


def figures(world: World, process: Process) -> Figures:
    folder = Path(f"/proc/{process.pid}")
    targets = [os.readlink(link) for link in (folder / "fd").iterdir()]
    said = process.log().count("HOLDS")
    process.process.send_signal(signal.SIGUSR1)
    world.until(lambda: process.log().count("HOLDS") > said, f"{process.name} to say what it holds")
    tasks, blocks = (int(word) for word in process.log().rpartition("HOLDS ")[2].split()[:2])
    connections = sum(target.startswith("socket:") for target in targets)
    return Figures(process.rss_mib(), blocks, len(targets), tasks, connections)


def report(world: World, before: dict[str, Figures], after: dict[str, Figures]) -> None:
    """To stdout; raises Broken where something grows."""
    grown = []
    for name in SURVIVORS:
        was, now = before[name], after[name]
        print(
            f"  {name}: {was.rss_mib:.0f} → {now.rss_mib:.0f} MiB, {was.blocks} → {now.blocks} blocks,"
            f" {was.descriptors} → {now.descriptors} descriptors, {was.connections} → {now.connections} connections,"
            f" {was.tasks} → {now.tasks} tasks",
            flush=True,
        )
        grown += [
            f"{name}: {what}"
            for what in ("descriptors", "tasks", "connections")
            if getattr(now, what) > getattr(was, what) + GROWTH
        ]
        if now.rss_mib > was.rss_mib + GROWTH_MIB:
            grown.append(f"{name}: resident memory")
        if now.blocks > was.blocks * (1 + GROWTH_BLOCKS):
            grown.append(f"{name}: blocks of memory")
    if grown:
        raise Broken(f"has grown: {', '.join(grown)}")
