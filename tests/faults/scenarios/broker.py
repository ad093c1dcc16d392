"""RabbitMQ killed, stopped, frozen, out of memory or disk; its queues, bindings and connections changed by an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tests.faults.ledger import APPLIED, PLACED
from tests.faults.scenario import scenario
from tests.faults.world import Broken, World

BOUND = {"exchange": "ob.events", "routing_key": "faults.applied.*"}
"""How the queue APPLIED gets its events."""
UNDERWAY = """\
select (select count(*) filter (where which = 'placed') - count(*) filter (where which = 'applied') from effect)
    - (select count(*) from orderbus.outbox where topic = 'faults.applied')
    - (select count(*) from orderbus.stuck where topic = 'faults.applied')"""
"""Follow-ups that have left the outbox and are not applied yet."""
STUCK = "select count(*) from orderbus.stuck"
GROWTH_MIB = 24.0
"""What a blocked process may grow by: some batches that it holds, and the allocator's mood."""
ALARM_S = (6.0, 9.0)
HEARTBEAT_S = 5
KILLER = 2005
PREFETCH = 400
"""What the service may hold unacknowledged: twice its concurrency times its fuse."""


@scenario("broker-killed-and-restarted", quick=True)
def killed(world: World) -> None:
    """SIGKILL under load: what was confirmed is on its disk."""
    world.begin()
    world.servers.rabbit.kill()
    world.pause(0.1, 2.0)
    world.servers.rabbit.start()
    world.mended()


@scenario("broker-stopped-and-started")
def stopped(world: World) -> None:
    world.begin()
    world.servers.rabbit.stop()
    world.pause(0.1, 2.0)
    world.servers.rabbit.start()
    world.mended()


@scenario("broker-frozen-beyond-the-heartbeats")
def frozen(world: World) -> None:
    """Connections that nobody answers on are given up; then it wakes up and answers."""
    world.environment["ORDERBUS_BROKER_URL"] += f"?heartbeat={HEARTBEAT_S}"
    world.begin()
    world.servers.rabbit.freeze()
    service = world.role("service")
    world.until(lambda: "coming back" in service.log(), "the service to give its broker up", 6 * HEARTBEAT_S)
    world.servers.rabbit.thaw()
    world.mended()


def alarm(world: World, raise_it: Callable[[], object], end_it: Callable[[], object]) -> None:
    """Publishers are blocked, and hold no more than before; the outbox grows instead. Then all of it flows."""
    world.begin()
    before = {role.name: role.rss_mib() for role in world.roles}
    raise_it()
    try:
        applied = -1
        while applied != (applied := world.applied()):
            world.pause(1.0, 1.0)
        world.pause(*ALARM_S)
        if world.applied() != applied:
            raise Broken("the alarm has blocked nobody")
        grown = {role.name: role.rss_mib() - before[role.name] for role in world.roles}
        if max(grown.values()) > GROWTH_MIB:
            raise Broken(f"memory grew while the broker was blocked: {grown}")
    finally:
        end_it()
    world.mended()


@scenario("memory-alarm")
def memory_alarm(world: World) -> None:
    ctl = world.servers.rabbit.ctl
    alarm(
        world,
        lambda: ctl("set_vm_memory_high_watermark", "absolute", "1MB"),
        lambda: ctl("set_vm_memory_high_watermark", "0.6"),
    )


@scenario("disk-alarm")
def disk_alarm(world: World) -> None:
    ctl = world.servers.rabbit.ctl
    alarm(world, lambda: ctl("set_disk_free_limit", "mem_relative", "1000"), lambda: ctl("set_disk_free_limit", "50MB"))


@contextmanager
def relay_stopped(world: World) -> Iterator[None]:
    """The operator's way to change queues under load: nothing is published meanwhile, and the queues are empty."""
    world.role("relay").stop()
    world.until(lambda: not any(count for queue, count in world.ready().items() if not queue.endswith(".dlq")), "empty queues")
    yield
    world.start("relay")


@scenario("queue-deleted-while-it-is-consumed")
def queue_deleted(world: World) -> None:
    """Unbound and drained first, for what lies in a queue goes with it. The relay publishes on: that has no queue to go to, and waits.

    Its consumer declares it again, with its binding.
    """
    world.begin()
    world.on_channel(lambda channel: channel.queue_unbind(APPLIED, **BOUND))
    world.until(lambda: world.number(STUCK) > 500, "events to be stuck")
    world.until(lambda: not world.number(UNDERWAY) and not world.ready()[APPLIED], "the queue to be empty")
    world.servers.rabbit.ctl("delete_queue", APPLIED, "-p", world.vhost)
    world.mended()


@scenario("exchange-deleted-and-declared-again")
def exchange_deleted(world: World) -> None:
    """All bindings go with it; restarting the consumers brings them back, before anything is published."""
    world.begin()
    with relay_stopped(world):
        world.on_channel(lambda channel: channel.exchange_delete("ob.events"))
        for name in ("service", "trail"):
            world.role(name).stop()
            world.start(name)
    world.mended()


@scenario("exchange-missing-while-the-relay-publishes")
def exchange_missing(world: World) -> None:
    """The broker says 404 and closes the channel; without its bindings nothing has a queue: all waits until the service declares them."""
    world.begin("service", "relay")
    world.on_channel(lambda channel: channel.exchange_delete("ob.events"))
    world.until(lambda: world.number(STUCK) > 100 or "the outbox waits" in world.role("relay").log(), "the relay to meet it")
    world.role("service").stop()
    world.start("service")
    world.mended()


@scenario("unroutable-until-bound-again", quick=True)
def unroutable(world: World) -> None:
    """A binding is gone: each event is returned, waits among the stuck, and goes out when there is a queue for it."""
    world.begin()
    world.on_channel(lambda channel: channel.queue_unbind(APPLIED, **BOUND))
    world.until(lambda: world.number(STUCK) > 500, "events to be stuck")
    world.on_channel(lambda channel: channel.queue_bind(APPLIED, **BOUND))
    world.mended()


@scenario("queue-full-and-rejecting")
def full(world: World) -> None:
    """A length limit with reject-publish: what one queue refuses stays in the outbox, in its order, and goes to all of them again."""
    world.begin()
    ctl = world.servers.rabbit.ctl
    ctl(
        "set_policy",
        "full",
        PLACED,
        '{"max-length": 50, "overflow": "reject-publish"}',
        "--apply-to",
        "queues",
        "-p",
        world.vhost,
    )
    service, relay = world.role("service"), world.role("relay")
    service.freeze()
    world.until(lambda: "refused" in relay.log() or world.number(STUCK) > 0, "the queue to refuse")
    service.thaw()
    world.pause(1.0, 2.0)
    ctl("clear_policy", "full", "-p", world.vhost)
    world.mended()


@scenario("policy-that-limits-and-is-taken-away")
def policy(world: World) -> None:
    """Each change of a policy is a new configuration of a queue that is in use."""
    world.begin()
    ctl = world.servers.rabbit.ctl
    for n in range(5):
        ctl("set_policy", "some", "^faults", f'{{"max-in-memory-length": {n * 100}}}', "--apply-to", "queues", "-p", world.vhost)
        ctl("clear_policy", "some", "-p", world.vhost)
    world.flow()
    world.mended()


@scenario("connections-closed-by-the-operator-again-and-again")
def closed(world: World) -> None:
    world.begin()
    for _ in range(8):
        world.servers.rabbit.ctl("close_all_connections", "--vhost", world.vhost, "a fault")
        world.pause(0.0, 0.5)
    world.mended()


@scenario("acks-of-a-closed-channel")
def stale(world: World) -> None:
    """A frozen service wakes up with deliveries in its hands whose channel is gone: no ack of theirs may settle another message."""
    world.begin("service", "service-b", "trail", "relay")
    for _ in range(4):
        frozen_one = world.role(world.rng.choice(("service", "service-b")))
        frozen_one.freeze()
        world.servers.rabbit.ctl("close_all_connections", "--vhost", world.vhost, "a fault")
        frozen_one.thaw()
        world.flow(200)
    world.mended()


@scenario("delivery-acknowledgement-timeout")
def timeout(world: World) -> None:
    """The broker closes the channel of a consumer that does not acknowledge in time, with 406: it comes back on another one."""
    world.most_repeated = PREFETCH
    rabbit = world.servers.rabbit
    limits = "application:set_env(rabbit, consumer_timeout, {}), application:set_env(rabbit, channel_tick_interval, {})."
    rabbit.ctl("eval", limits.format(5_000, 500))
    try:
        world.begin("service", "service-b", "trail", "relay")
        frozen_one = world.role("service")
        said = len(rabbit.node_log())
        frozen_one.freeze()
        world.until(lambda: "delivery acknowledgement" in rabbit.node_log()[said:], "the broker to close the channel")
        frozen_one.thaw()
        world.until(lambda: "coming back" in frozen_one.log(), "the service to notice")
        world.mended()
    finally:
        rabbit.ctl("eval", limits.format(1_800_000, 60_000))


def poison(world: World, limit: int) -> None:
    """An event kills whoever reads it, as often as the queue's delivery limit allows, and is parked by the broker for that, alone."""
    limited = f'{{"delivery-limit": {limit}}}'
    world.servers.rabbit.ctl(
        "set_policy", "limit", "^faults\\.faults\\.placed$", limited, "--apply-to", "queues", "-p", world.vhost
    )
    world.environment["FAULTS_KILLER"] = str(KILLER)
    for name in ("service", "trail", "relay"):
        world.start(name)
    world.start("producer")
    deaths = 0
    while not any(letter.n == KILLER for letter in world.letters()):
        if not world.role("service").runs:
            world.role("service").wait_killed()
            deaths += 1
            if deaths > 3 * limit:
                raise Broken(f"the service died {deaths} times, and the event is not parked")
            world.start("service", is_awaited=False)
        world.pause(0.3, 0.5)
    if not world.role("service").runs:
        world.start("service")
    world.mended()


scenario("event-that-kills-its-reader")(partial(poison, limit=8))
