"""Processes killed, frozen and stopped at exact and at random moments."""

from __future__ import annotations

from functools import partial

from tests.faults.failpoints import NOTIFY, PRODUCER, RELAY, SERVICE
from tests.faults.scenario import scenario
from tests.faults.world import World

RANDOM_KILLS = 20
QUICK = {"after-commit-before-ack", "relay-confirmed-before-delete"}


def killed_at(world: World, role: str, failpoint: str) -> None:
    """One that dies at that point under load takes the place of one that does not; then one that does not takes its place."""
    world.begin(*(("service", "trail", "relay") if role != "notify" else ("service", "relay", "notify")))
    world.role(role).kill()
    world.start(role, failpoint=failpoint, is_awaited=False).wait_killed()
    world.start(role)
    world.mended()


for _role, _points in (("producer", PRODUCER), ("service", SERVICE), ("relay", RELAY), ("notify", NOTIFY)):
    for _point in _points:
        _name = _point if _point.startswith(_role) else f"{_role}-{_point}"
        scenario(f"{_name}-killed", quick=_point in QUICK)(partial(killed_at, role=_role, failpoint=_point))


def killed_at_random(world: World, role: str) -> None:
    """Two of them, one of which is killed again and again: the other one goes on with what it leaves behind."""
    world.begin("service", "trail", "relay", f"{role}-b")
    for n in range(RANDOM_KILLS):
        world.pause(0.05, 0.5)
        world.restart((role, f"{role}-b")[n % 2])
    world.mended()


for _role in ("service", "trail", "relay"):
    scenario(f"{_role}-killed-at-{RANDOM_KILLS}-random-times")(partial(killed_at_random, role=_role))


HEARTBEAT_S = 5


@scenario("relay-frozen-beyond-its-lease-then-thawed")
def frozen_relay(world: World) -> None:
    """Another one owns its buckets when it wakes up in the middle of what it did: it must not publish or delete behind the other's back."""
    world.begin("service", "trail", "relay", "relay-b")
    for n in range(6):
        frozen = world.role(("relay", "relay-b")[n % 2])
        world.pause(0.0, 0.3)
        frozen.freeze()
        world.flow(2000)  # half of the buckets are the frozen one's: they flow again when its lease of 1 s is over
        frozen.thaw()
    world.mended()


@scenario("service-frozen-beyond-its-heartbeat-then-thawed")
def frozen_service(world: World) -> None:
    """The broker gives its messages to the other; it wakes up with them in its hands, and transactions open."""
    world.environment["ORDERBUS_BROKER_URL"] += f"?heartbeat={HEARTBEAT_S}"
    world.begin("service", "service-b", "trail", "relay")
    frozen = world.role("service")
    frozen.freeze()
    connections = len(world.connections())
    world.until(lambda: len(world.connections()) < connections, "the broker to give the frozen one up", 6 * HEARTBEAT_S)
    world.flow()
    frozen.thaw()
    world.mended()


@scenario("services-stopped-under-load-and-started-again")
def stopped(world: World) -> None:
    """SIGTERM: each must end with 0, and what it had in hand goes on elsewhere."""
    world.begin("service", "service-b", "trail", "trail-b", "relay", "relay-b")
    for n in range(9):
        name = ("service", "trail", "relay")[n % 3]
        world.role(name).stop()
        world.flow()
        world.start(name)
    world.mended()


@scenario("three-relays-fight-for-buckets")
def fighting(world: World) -> None:
    """Frozen for about as long as a lease lasts, in turn and at random, so that buckets change hands in the middle of everything."""
    names = ["relay", "relay-b", "relay-c"]
    world.begin("service", "trail", *names)
    for _ in range(12):
        frozen = world.role(world.rng.choice(names))
        frozen.freeze()
        world.pause(0.5, 1.6)
        frozen.thaw()
    world.mended()


@scenario("service-out-of-memory")
def out_of_memory(world: World) -> None:
    """The limit of its address space is reached in the middle of the load; the supervisor ends it a while later."""
    world.begin("service", "trail", "relay")
    world.role("service").kill()
    starved = world.start("service", failpoint="out-of-memory", is_awaited=False)
    world.until(lambda: "MemoryError" in starved.log() or not starved.runs, "the memory to be used up")
    world.pause(1.0, 3.0)
    world.may_end_badly.add("service")
    world.restart("service")
    world.mended()
