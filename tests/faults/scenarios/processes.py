"""Processes killed, frozen and stopped at exact and at random moments."""

from __future__ import annotations

from functools import partial

from redis import Redis

from tests.faults.failpoints import NOTIFY, PRODUCER, RELAY, SERVICE, TRAIL
from tests.faults.program import FUSE
from tests.faults.scenario import scenario
from tests.faults.world import Process, World

RANDOM_KILLS = 20
NOTED_AGAIN = {"before-claim-is-completed": (1, FUSE)}
"""How many outside calls at least and at most happen a second time; none where nothing is said."""
QUICK = {"service-after-commit-before-ack", "relay-confirmed-before-delete"}


def killed_at(world: World, role: str, failpoint: str) -> None:
    """One that dies at that point under load takes the place of one that does not; then one that does not takes its place."""
    world.begin()
    world.role(role).kill()
    world.start(role, failpoint=failpoint, is_awaited=False).wait_killed()
    world.start(role)
    world.mended()


def notify_killed_at(world: World, failpoint: str) -> None:
    """As `killed_at`; the one before is stopped, and who dies has one unit in hand: only what that one has noted may be noted again.

    Between `receive` and the claim a unit before it would still be in hand: there it takes one message at a time.
    """
    world.least_repeated, world.most_repeated = NOTED_AGAIN.get(failpoint, (0, 0))
    alone = {"FAULTS_LANES": "1"} | ({"FAULTS_PREFETCH": "1"} if failpoint == "after-receive" else {})
    world.begin("service", "relay", "notify")
    world.role("notify").stop()
    world.start("notify", failpoint=failpoint, is_awaited=False, **alone).wait_killed()
    world.start("notify")
    world.mended()


for _point in NOTIFY:
    scenario(f"notify-{_point}-killed")(partial(notify_killed_at, failpoint=_point))
for _role, _points in (("producer", PRODUCER), ("service", SERVICE), ("relay", RELAY)):
    for _point in _points:
        _name = _point if _point.startswith(_role) else f"{_role}-{_point}"
        scenario(f"{_name}-killed", quick=_name in QUICK)(partial(killed_at, role=_role, failpoint=_point))


@scenario("trail-killed-at-each-of-its-moments")
def trail_killed(world: World) -> None:
    """One after the other: each goes on where the one before has died, and keeps the order of every key."""
    world.begin()
    world.role("trail").kill()
    for point in TRAIL:
        world.start("trail", failpoint=point, is_awaited=False).wait_killed()
    world.start("trail")
    world.mended()


def killed_at_random(world: World, role: str) -> None:
    """Two of them, one of which is killed again and again: the other one goes on with what it leaves behind. Of the producer there is one."""
    names = (role,) if role == "producer" else (role, f"{role}-b")
    world.begin("service", "relay", "notify" if role == "notify" else "trail", *names[1:])
    for n in range(RANDOM_KILLS):
        world.pause(0.05, 0.5)
        world.restart(names[n % len(names)])
    world.mended()


for _role in ("service", "trail", "relay", "producer", "notify"):
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
    given_up(world)
    world.flow()
    frozen.thaw()
    world.mended()


def given_up(world: World) -> None:
    """Until the broker has ended a connection of who is frozen: one of those that are there now, for others may open more meanwhile."""
    connections = set(world.connections())
    world.until(lambda: not connections <= set(world.connections()), "the broker to give the frozen one up", 6 * HEARTBEAT_S)


@scenario("trail-frozen-beyond-its-heartbeat")
def frozen_trail(world: World) -> None:
    """The one that has the ordered queue to itself: the other takes over, and back again. The first wakes up in the middle of what it did."""
    world.environment["ORDERBUS_BROKER_URL"] += f"?heartbeat={HEARTBEAT_S}"
    # Its open transaction holds the rows of those that come first: docs/guarantees.md, "When a process is frozen".
    world.environment["ORDERBUS_DATABASE_URL"] += f"?options=-c%20idle_in_transaction_session_timeout%3D{HEARTBEAT_S}s"
    world.begin("service", "relay", "trail")
    world.start("trail-b")
    for name in ("trail", "trail-b"):
        connections = len(world.connections())
        world.pause(0.0, 0.3)
        world.role(name).freeze()
        given_up(world)
        follow(world)
        world.role(name).thaw()
        come_back(world, connections)
    world.mended()


def follow(world: World, count: int = 500) -> None:
    """Until so many more have been followed."""
    query = "select count(*) from trail"
    target = world.number(query) + count
    world.until(lambda: world.number(query) >= target, f"{count} more to be followed")


def come_back(world: World, connections: int) -> None:
    world.until(lambda: len(world.connections()) >= connections, "who was frozen to come back")


@scenario("notify-frozen-beyond-its-claims")
def frozen_notify(world: World) -> None:
    """With claims in its hands: when their lease is over, the other one handles what it held. So much may be noted twice, and no more."""
    world.environment["ORDERBUS_BROKER_URL"] += f"?heartbeat={HEARTBEAT_S}"
    world.begin("service", "relay", "notify")
    frozen = world.role("notify")
    with Redis(port=world.servers.redis.port) as redis:
        world.until(lambda: is_caught(world, frozen, redis), "it to be frozen with claims in its hands")
        held = unfinished(world, redis)
        world.most_repeated = len(held)
        world.start("notify-b")
        world.until(lambda: all(redis.hexists(name, "answer") for name in held), "the other one to do what was claimed")
    frozen.thaw()
    world.mended()


def is_caught(world: World, process: Process, redis: Redis) -> bool:
    """Frozen, and holding claims; else it goes on."""
    process.freeze()
    world.pause(0.1, 0.3)  # what it has sent has come
    if unfinished(world, redis):
        return True
    process.thaw()
    return False


def unfinished(world: World, redis: Redis) -> list[bytes]:
    """The claims of this run that are held, and not done."""
    names = list(redis.scan_iter(f"{world.environment['ORDERBUS_REDIS_PREFIX']}*", count=1000))
    pipeline = redis.pipeline(transaction=False)
    for name in names:
        pipeline.hexists(name, "answer")
    return [name for name, is_done in zip(names, pipeline.execute(), strict=True) if not is_done]


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
    world.restart("service")
    world.mended()
