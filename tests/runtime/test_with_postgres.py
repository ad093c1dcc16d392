"""The runtime on a real PostgreSQL, in real time: on asyncio with and without uvloop, and on trio through the portal."""

from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import anyio
import psycopg
import pytest

from orderbus import Batch, Bus, HandlerTimeout, Park, Retry, Tx, UnavailableError, UsageError, new_id
from tests.databases import prepared_database
from tests.runtime.world import Log, Paid, Placed, World, open_world, receipt_of, until

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

GROUP = "shop"
SCHEMA = """\
create table effect (n int not null, what text not null default '');
create table strict (n int primary key check (n >= 0));
"""


@pytest.fixture(scope="module")
def module_url(postgres_url: str) -> Iterator[str]:
    """A database with the schema of orderbus and tables for effects, shared by the tests of this module."""
    with prepared_database(postgres_url, "runtime", SCHEMA) as url:
        yield url


@pytest.fixture
def db(module_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to look at what is there; everything is empty at first."""
    with psycopg.connect(module_url, autocommit=True) as connection:
        connection.execute(
            "truncate effect, strict, orderbus.inbox, orderbus.outbox, orderbus.stuck, orderbus.scheduled, orderbus.lease"
        )
        yield connection


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        pytest.param(("trio", {}), id="trio"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
async def world(anyio_backend: Any) -> AsyncIterator[World]:
    async with open_world() as world:
        yield world


class Effects:
    """What the handlers of a test have written."""

    def __init__(self, db: psycopg.Connection[Any], url: str) -> None:
        self.db = db
        self.url = url

    def all(self, query: str) -> list[Any]:
        return [row[0] if len(row) == 1 else row for row in self.db.execute(query).fetchall()]

    @property
    def effects(self) -> list[int]:
        return self.all("select n from effect order by n")

    def backends(self, where: str = "") -> int:
        """How many connections of the bus there are on the server, or of those that are as `where` says."""
        return self.all(
            f"select count(*) from (select * from pg_stat_activity where datname = current_database()"
            f" and backend_type = 'client backend' and pid <> pg_backend_pid()) mine {where}"
        )[0]


@pytest.fixture
def effects(db: psycopg.Connection[Any], module_url: str) -> Effects:
    return Effects(db, module_url)


def bus_on(world: World, effects: Effects, **settings: Any) -> Bus:
    return world.bus(GROUP, **{"database_url": effects.url, "pool_size": 4, "grace_s": 5, **settings})


async def together(world: World, *events: Placed) -> None:
    await world.broker.publish([world.message(event, new_id()) for event in events])


async def test_effect_inbox_and_events_commit_together_and_the_events_arrive(world: World, effects: Effects) -> None:
    bus, log = bus_on(world, effects), Log()

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> Paid:
        await tx.execute("insert into effect (n) values (%s)", (event.n,))
        return Paid(order=event.order, n=event.n)

    @bus.on(Paid)
    async def paid(event: Paid, tx: Tx) -> None:
        log((event.n, await tx.fetch_one("select n from effect where n = %s", (event.n,))))

    async with bus:
        event_id = await world.send(Placed(order="a", n=5))
        await world.send(Placed(order="a", n=5), event_id=event_id)
        await log.reached(1)
        await until(lambda: bus.stats.duplicates == 1)

    assert log.lines == [(5, (5,))]
    assert effects.effects == [5]
    assert effects.all("select count(*) from orderbus.inbox") == [2]
    assert effects.all("select count(*) from orderbus.outbox") == [0]


@pytest.mark.parametrize(("timeout", "limit"), [(5, "70s"), (600, "610s")])
async def test_the_database_gives_up_an_idle_transaction_only_after_the_handlers_own_time_limit(
    world: World, effects: Effects, timeout: float, limit: str
) -> None:
    bus = bus_on(world, effects)

    @bus.on(Placed, timeout=timeout)
    async def handle(event: Placed) -> None: ...

    async with bus, bus.transaction() as tx:
        assert await tx.fetch_one("show idle_in_transaction_session_timeout") == (limit,)
    async with bus_on(world, effects) as without_handlers, without_handlers.transaction() as tx:
        assert await tx.fetch_one("show idle_in_transaction_session_timeout") == ("70s",)


async def test_a_handler_that_raises_leaves_no_effect_no_inbox_row_and_no_event(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False)

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed, tx: Tx) -> None:
        await tx.execute("insert into effect (n) values (1)")
        tx.defer("insert into effect (n) values (%s)", (2,))
        tx.emit(Paid(order="ghost"))
        raise Park("no")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: world.parked())

    assert effects.effects == []
    assert effects.all("select count(*) from orderbus.inbox") == [0]
    assert effects.all("select count(*) from orderbus.outbox") == [0]


async def test_one_failing_statement_of_a_fused_unit_fails_its_own_message_only(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False)

    @bus.on(Placed, fuse=10, concurrency=1, retry=Retry.none())
    async def handle(event: Placed, tx: Tx) -> None:
        await tx.execute("insert into strict values (%s)", (event.n,))

    async with bus:
        await together(world, *(Placed(order="a", n=n) for n in (0, 1, -1, 1, 2)))
        await until(lambda: len(world.parked()) == 2)
        await until(lambda: bus.stats.handled == 3)

    assert effects.all("select n from strict order by n") == [0, 1, 2]
    assert sorted(letter.properties.headers["ob-error"] for letter in world.parked()) == ["CheckViolation", "UniqueViolation"]


async def test_deferred_writes_run_at_commit_grouped_by_their_text(world: World, effects: Effects) -> None:
    bus, log = bus_on(world, effects, relay=False), Log()

    @bus.on(Placed, fuse=10, concurrency=1)
    async def handle(event: Placed, tx: Tx) -> None:
        tx.defer("insert into effect (n, what) values (%s, 'first')", (event.n,))
        tx.defer("insert into effect (n, what) values (%s, 'second')", (event.n,))
        log(await tx.fetch_one("select count(*) from effect"))

    async with bus:
        await together(world, *(Placed(order="a", n=n) for n in range(3)))
        await until(lambda: bus.stats.handled == 3)

    assert log.lines == [(0,)] * 3
    assert effects.all("select what, n from effect order by ctid") == [
        (what, n) for what in ("first", "second") for n in range(3)
    ]


async def test_a_failing_deferred_write_fails_its_own_message_only(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False)

    @bus.on(Placed, fuse=10, concurrency=1, retry=Retry.none())
    async def handle(event: Placed, tx: Tx) -> None:
        tx.defer("insert into strict values (%s)", (event.n,))

    async with bus:
        await together(world, *(Placed(order="a", n=n) for n in (0, -1, 2)))
        await until(lambda: world.parked() and bus.stats.handled == 2)

    assert effects.all("select n from strict order by n") == [0, 2]


async def test_items_of_a_batch_that_come_again_are_forgotten_by_the_inbox_and_handled_later(
    world: World, effects: Effects
) -> None:
    bus = bus_on(world, effects, relay=False)

    @bus.on_batch(Placed)
    async def handle(batch: Batch[Placed], tx: Tx) -> None:
        for item in batch:
            if item.event.n == 1 and item.delivery.attempt == 1:
                item.retry(0.05)
            elif item.event.n == 2:
                item.park("no")
            else:
                await tx.execute("insert into effect (n) values (%s)", (item.event.n,))

    async with bus:
        await together(world, *(Placed(order="a", n=n) for n in range(4)))
        await until(lambda: bus.stats.handled == 3)

    assert effects.effects == [0, 1, 3]
    assert effects.all("select count(*) from orderbus.inbox") == [3]


async def test_a_timeout_inside_a_statement_rolls_back_and_gives_the_connection_back(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False, pool_size=1)

    @bus.on(Placed, timeout=2, retry=Retry.none().never(HandlerTimeout))
    async def handle(event: Placed, tx: Tx) -> None:
        await tx.execute("insert into effect (n) values (%s)", (event.n,))
        if event.n == 0:
            await tx.execute("select pg_sleep(60)")

    async with bus:
        await world.send(Placed(order="a", n=0))
        await until(lambda: world.parked())
        await until(lambda: effects.backends("where state = 'active' or state like 'idle in%'") == 0, within_s=20)
        await world.send(Placed(order="a", n=1))
        await until(lambda: bus.stats.handled == 1)

    assert effects.effects == [1]
    assert world.parked()[0].properties.headers["ob-error"] == "HandlerTimeout"


async def test_transactions_cancelled_at_any_moment_leave_no_connection_behind(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False, pool_size=2)

    async with bus:
        for n in range(60):
            with anyio.move_on_after(n * 0.0002):
                async with bus.transaction() as tx:
                    await tx.execute("insert into effect (n) values (%s)", (n,))
                    await tx.fetch_all("select * from effect")
                    await tx.execute("select pg_sleep(0.01)")
        await until(lambda: effects.backends("where state <> 'idle'") == 0, within_s=20)
        with anyio.fail_after(5):
            for _ in range(4):
                async with bus.transaction() as tx:
                    await tx.fetch_one("select 1")
        assert effects.backends("where state <> 'idle'") == 0


async def test_a_drain_cancels_a_statement_rolls_back_and_gives_the_message_back(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False, grace_s=0.2)

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> None:
        await tx.execute("insert into effect (n) values (1)")
        await tx.execute("select pg_sleep(60)")

    async with bus:
        await world.send(Placed(order="a"))
        await until(lambda: effects.backends("where state = 'active' and query = 'select pg_sleep(60)'") == 1)

    receipt = receipt_of(bus)
    assert (receipt.cancelled, receipt.released, receipt.clean) == (1, 1, False)
    assert receipt.seconds < 10
    await until(lambda: effects.backends() == 0, within_s=20)
    assert effects.effects == []
    assert world.ready() == 1


async def test_a_connection_that_the_server_ended_is_replaced_and_the_message_waits_uncounted(
    world: World, effects: Effects
) -> None:
    bus, log = bus_on(world, effects, relay=False), Log()

    @bus.on(Placed, retry=Retry.none())
    async def handle(event: Placed, tx: Tx) -> None:
        (pid,) = await tx.fetch_one("select pg_backend_pid()")
        log(pid)
        if len(log.lines) == 1:
            effects.all(f"select pg_terminate_backend({pid})")
        await tx.execute("insert into effect (n) values (%s)", (event.n,))

    async with bus:
        await world.send(Placed(order="a", n=3))
        await until(lambda: bus.stats.handled == 1)

    assert len(set(log.lines)) == 2
    assert effects.effects == [3]
    assert receipt_of(bus).stats.waited == 1


async def test_callers_of_group_commit_share_a_transaction_and_fail_alone(world: World, effects: Effects) -> None:
    bus, outcomes = bus_on(world, effects, relay=False), {}

    async def insert(n: int) -> None:
        async def work(tx: Tx) -> int:
            return await tx.execute("insert into strict values (%s)", (n,))

        try:
            outcomes[n] = await bus.group_commit(work)
        except psycopg.errors.CheckViolation:
            outcomes[n] = "refused"

    async with bus, anyio.create_task_group() as callers:
        for n in range(-1, 20):
            callers.start_soon(insert, n)

    assert outcomes == {-1: "refused", **dict.fromkeys(range(20), 1)}
    assert effects.all("select count(*) from strict") == [20]


async def test_a_database_that_can_not_be_reached_stops_the_start(world: World) -> None:
    bus = world.bus(database_url="postgresql://nobody@127.0.0.1:1/nothing")

    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1"):
        await bus.__aenter__()


async def test_a_database_without_the_schema_stops_the_start_and_names_the_command(world: World, database_url: str) -> None:
    bus = world.bus(database_url=database_url)

    with pytest.raises(UsageError, match="orderbus schema apply"):
        await bus.__aenter__()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_trio_says_what_only_asyncio_can_do(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False)

    async with bus:
        async with bus.transaction() as tx:
            with pytest.raises(UsageError, match=r"tx\.connection works under asyncio only.*use tx\.execute"):
                tx.connection  # noqa: B018
        with pytest.raises(UsageError, match=r"bus\.enlist\(\) works under asyncio only.*use bus\.transaction"):
            await bus.enlist(None).__aenter__()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_enlisting_makes_the_outbox_part_of_ones_own_transaction(world: World, effects: Effects) -> None:
    bus, log = bus_on(world, effects), Log()

    @bus.on(Placed)
    async def handle(event: Placed) -> None:
        log(event.n)

    async with bus, await psycopg.AsyncConnection.connect(effects.url) as connection:
        async with connection.transaction():
            await connection.execute("insert into effect (n) values (1)")
            async with bus.enlist(connection) as tx:
                tx.emit(Placed(order="a", n=1))
                tx.defer("insert into effect (n) values (%s)", (2,))
                assert await tx.fetch_one("select count(*) from effect") == (1,)
                assert tx.connection is connection
            assert effects.all("select count(*) from orderbus.outbox") == [0]
        with pytest.raises(UsageError, match="this tx has ended"):
            tx.emit(Placed(order="a"))
        await log.reached(1)
        await until(lambda: effects.all("select count(*) from orderbus.outbox") == [0])

    assert log.lines == [1]
    assert effects.effects == [1, 2]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("where", ["inside", "outside"])
async def test_an_enlisted_transaction_that_rolls_back_sends_nothing(world: World, effects: Effects, where: str) -> None:
    bus = bus_on(world, effects, relay=False)

    async def fail(connection: psycopg.AsyncConnection[Any]) -> None:
        async with connection.transaction():
            await connection.execute("insert into effect (n) values (1)")
            async with bus.enlist(connection) as tx:
                tx.emit(Placed(order="ghost"))
                if where == "inside":
                    raise KeyError
            raise KeyError

    async with bus, await psycopg.AsyncConnection.connect(effects.url) as connection:
        with pytest.raises(KeyError):
            await fail(connection)

    assert effects.effects == []
    assert effects.all("select count(*) from orderbus.outbox") == [0]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_is_no_transaction_of_psycopg_can_not_be_enlisted(world: World, effects: Effects) -> None:
    bus = bus_on(world, effects, relay=False)

    async with bus:
        with pytest.raises(UsageError, match=r"enlist takes a psycopg\.AsyncConnection, not NoneType"):
            await bus.enlist(None).__aenter__()
        async with await psycopg.AsyncConnection.connect(effects.url, autocommit=True) as connection:
            with pytest.raises(UsageError, match=r"put `async with connection\.transaction\(\):` around it"):
                await bus.enlist(connection).__aenter__()


async def until_published(bus: Bus, event: Placed) -> None:
    """The consumer declares its queue again in a moment."""
    with anyio.fail_after(20):
        while True:
            try:
                await bus.publish(event)
            except UnavailableError:
                await anyio.sleep(0.05)
            else:
                return


@pytest.fixture
def own_vhost_url(rabbit: Any) -> Iterator[str]:
    """Of the test's own: where queues of others are bound to its topic, a publish is confirmed while its own queue is away."""
    with rabbit.vhost(f"orderbus-test-{new_id().hex[-8:]}") as url:
        yield url


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_on_trio_a_broker_behind_the_portal_is_consumed_lost_and_found_again(
    own_vhost_url: str, rabbit: Any, effects: Effects
) -> None:
    from orderbus import Settings

    group = "g" + new_id().hex[-8:]
    bus, log = Bus(group, settings=Settings(broker_url=own_vhost_url, database_url=effects.url)), Log()
    queue = f"{group}.orders.placed"

    @bus.on(Placed)
    async def handle(event: Placed, tx: Tx) -> None:
        await tx.execute("insert into effect (n) values (%s)", (event.n,))
        log(event.n)

    with anyio.fail_after(90):
        async with bus:
            for n in range(50):
                async with bus.transaction() as tx:
                    tx.emit(Placed(order=str(n), n=n))
            await log.reached(50)
            rabbit.ctl("delete_queue", "-p", urlsplit(own_vhost_url).path[1:], queue)
            await until(lambda: bus.stats.reconnects >= 1)
            await until_published(bus, Placed(order="last", n=50))
            await log.reached(51)

    assert sorted(log.lines) == list(range(51))
    assert effects.effects == list(range(51))
    assert receipt_of(bus).clean


async def test_a_server_that_hands_out_lower_ids_than_the_one_before_is_relayed_from_the_beginning(
    world: World, effects: Effects
) -> None:
    """A replica that was promoted before it had all that the old one had."""
    bus, log = bus_on(world, effects), Log()

    @bus.on(Paid)
    async def paid(event: Paid) -> None:
        log(event.n)

    async def pay(n: int) -> None:
        async with bus.transaction() as tx:
            tx.emit(Paid(order="a", n=n))

    async with bus:
        for n in range(50):
            await pay(n)
        await log.reached(50)
        last = effects.all("select last_value from orderbus.outbox_id_seq")[0]
        await until(lambda: bus._engine._relay._floor.value == last)
        effects.db.execute("select setval('orderbus.outbox_id_seq', %s)", (last - 40,))
        await pay(50)
        await log.reached(51)
