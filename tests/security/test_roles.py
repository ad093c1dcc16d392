"""The roles of compose/roles on real servers: a graph of services runs with them, and each can do no more than it needs."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import psycopg
import pytest
from psycopg import errors, sql

from orderbus import Bus, Event, Park, RetryLater, Settings, Tx, new_id
from orderbus._core.message import Outgoing, Receipt
from orderbus._core.topology import EVENTS_EXCHANGE, Binding, Queue, QueueNeed, Topology, topology_for
from orderbus.abc import InboxEntry
from orderbus.adapters.postgres import open_store
from orderbus.adapters.rabbitmq import open_broker
from orderbus.errors import OrderbusError, TopologyError, UsageError
from tests.programs import ROOT
from tests.runtime.world import Log, receipt_of
from tests.servers import Rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

ROLES = ROOT / "compose" / "roles"
PASSWORD = "of-a-test"
DENIED = errors.InsufficientPrivilege


class Ordered(Event, topic="roles.ordered", key="order"):
    order: str


class Settled(Event, topic="roles.settled", key="order"):
    order: str


class Database:
    """A database with the roles in it, by the kinds that postgres.sql knows, and two services: `shop` and `bank`."""

    def __init__(self, url: str, suffix: str) -> None:
        self.url = url
        self.names = {kind: f"{kind}_{suffix}" for kind in ("owner", "relay", "operator", "shop", "bank")}

    def url_of(self, kind: str) -> str:
        parts = urlsplit(self.url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{self.names[kind]}:{PASSWORD}@{place}"))

    def apply(self, service: str) -> None:
        """What an operator types."""
        kinds = {"owner": "owner", "service": service, "relay": "relay", "operator": "operator"}
        given = [("-v", f"{kind}={self.names[name]}", "-v", f"{kind}_password={PASSWORD}") for kind, name in kinds.items()]
        arguments = [argument for pair in given for argument in pair]
        command = ["psql", "-X", "-q", "-d", self.url, *arguments, "-f", str(ROLES / "postgres.sql")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def query(self, kind: str, query: str) -> list[Any]:
        with psycopg.connect(self.url_of(kind)) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def drop_roles(self) -> None:
        with psycopg.connect(self.url) as connection:
            present = [name for (name,) in connection.execute("select rolname from pg_roles").fetchall()]
            for name in set(self.names.values()).intersection(present):
                connection.execute(sql.SQL("drop owned by {0} cascade").format(sql.Identifier(name)))
                connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def database(postgres_url: str) -> Iterator[Database]:
    """Shared by the tests of this module: to make one takes seconds."""
    if shutil.which("psql") is None:
        pytest.skip("SERVER MISSING: psql is not installed")
    suffix = secrets.token_hex(4)
    name = sql.Identifier(f"orderbus_test_roles_{suffix}")
    database = Database(urlunsplit(urlsplit(postgres_url)._replace(path=f"/orderbus_test_roles_{suffix}")), suffix)
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {}").format(name))
    try:
        database.apply("shop")
        done = subprocess.run(
            [sys.executable, "-m", "orderbus", "schema", "apply"],
            env={**os.environ, "ORDERBUS_DATABASE_URL": database.url_of("owner")},
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        for service in ("shop", "bank", "shop"):
            database.apply(service)
        database.query("bank", "create table settled (order_id text primary key)")
        yield database
    finally:
        database.drop_roles()
        with psycopg.connect(postgres_url, autocommit=True) as server:
            server.execute(sql.SQL("drop database {} with (force)").format(name))


class Users:
    """A vhost with a user for each of two groups, the relay and the operator."""

    def __init__(self, rabbit: Rabbit, url: str, suffix: str) -> None:
        self._rabbit = rabbit
        self._url = url
        self.vhost = urlsplit(url).path[1:]
        self.names = {kind: f"{kind}-{suffix}" for kind in ("relay", "operator", "shop", "bank")}

    def url_of(self, kind: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(netloc=f"{self.names[kind]}:{PASSWORD}@{parts.netloc.rpartition('@')[2]}"))

    def apply(self, kind: str, *arguments: str) -> None:
        user = self.names[arguments[0] if kind == "service" else kind]
        home = {"HOME": self._rabbit._home} if self._rabbit._home else {}
        program = (self._rabbit._home and shutil.which("rabbitmqctl", path="/usr/lib/rabbitmq/bin")) or "rabbitmqctl"
        environment = {
            **os.environ,
            **home,
            "RABBITMQCTL": f"{program} -n {self._rabbit._node}" if self._rabbit._node else program,
        }
        done = subprocess.run(
            [str(ROLES / "rabbitmq.sh"), kind, self.vhost, user, *arguments],
            env=environment, input=f"{PASSWORD}\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def drop(self) -> None:
        for name in self.names.values():
            self._rabbit.ctl("delete_user", name)


@pytest.fixture(scope="module")
def users(rabbit: Rabbit) -> Iterator[Users]:
    suffix = secrets.token_hex(4)
    with rabbit.vhost(f"orderbus-roles-{suffix}") as url:
        users = Users(rabbit, url, suffix)
        users.apply("relay")
        users.apply("operator")
        users.apply("service", "shop", r"roles\.settled")
        users.apply("service", "bank", r"roles\.ordered")
        try:
            yield users
        finally:
            users.drop()


async def test_a_graph_of_services_runs_with_these_roles(database: Database, users: Users) -> None:
    """Through outbox, relay, inbox, the retry ladder and a dead letter, which the operator then sends back."""

    def bus(kind: str, **settings: Any) -> Bus:
        return Bus(kind, settings=Settings(broker_url=users.url_of(kind), database_url=database.url_of(kind), **settings))

    shop, bank, relay = bus("shop", relay=False), bus("bank", relay=False), bus("relay")
    settled, tries = Log(), Log()
    broken = ["c"]

    @bank.on(Ordered)
    async def settle(event: Ordered, tx: Tx) -> Settled:
        tries(event.order)
        if event.order == "b" and tries.lines.count("b") == 1:
            raise RetryLater(1)
        if event.order in broken:
            raise Park("broken")
        await tx.execute("insert into settled (order_id) values (%s)", (event.order,))
        return Settled(order=event.order)

    @shop.on(Settled, ordered=True)
    async def note(event: Settled) -> None:
        settled(event.order)

    async with bank, shop, relay:
        async with shop.transaction() as tx:
            for order in "abc":
                tx.emit(Ordered(order=order))
            tx.emit(Ordered(order="d"), due_at=datetime.now(UTC) + timedelta(seconds=1))
        await settled.reached(3)
        async with open_broker(users.url_of("bank"), name="test") as broker:
            with anyio.fail_after(60):
                while not await broker.depth("bank.roles.ordered.dlq"):
                    pass
        broken.clear()
        letters = await operator(users, database, "dlq", "list", "--queue", "bank.roles.ordered", "--json")
        await operator(users, database, "dlq", "replay", "--queue", "bank.roles.ordered", "--all", "--yes")
        await settled.reached(4)
        stats = await operator(users, database, "outbox", "stats", "--json")

    assert [json.loads(letter)["reason"] for letter in letters] == ["broken"]
    assert stats
    assert sorted(settled.lines) == ["a", "b", "c", "d"]
    assert database.query("bank", "select order_id from settled order by 1") == [("a",), ("b",), ("c",), ("d",)]
    assert receipt_of(bank).stats.retried == 1


async def operator(users: Users, database: Database, *arguments: str) -> list[str]:
    """The lines that the command line prints for the operator."""
    urls = {"ORDERBUS_BROKER_URL": users.url_of("operator"), "ORDERBUS_DATABASE_URL": database.url_of("operator")}
    command = [sys.executable, "-m", "orderbus", *arguments]
    done = await anyio.run_process(command, env={**os.environ, **urls}, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


@pytest.mark.parametrize(
    "query",
    [
        "create table orderbus.mine (n int)",
        "drop table orderbus.outbox",
        "truncate orderbus.inbox",
        "alter table orderbus.outbox add column mine int",
        "select * from orderbus.outbox",
        "delete from orderbus.outbox",
        "update orderbus.inbox set body_hash = 0",
        "update orderbus.consumer set name = 'mine'",
        "select * from orderbus.stuck",
        "delete from orderbus.lease",
        "insert into orderbus.schema_version (version) values (99)",
        "select * from {bank}.settled",
        "create table {bank}.mine (n int)",
        "create schema mine",
        "create role mine",
        "set role {owner}",
    ],
)
def test_a_service_s_role_may_not(database: Database, query: str) -> None:
    with pytest.raises(DENIED):
        database.query("shop", query.format(**database.names))


@pytest.mark.parametrize("kind", ["relay", "operator"])
@pytest.mark.parametrize(
    "query",
    ["create table orderbus.mine (n int)", "drop table orderbus.stuck", "insert into orderbus.inbox values (gen_random_uuid(), 1, 1)",
     "select * from {bank}.settled", "set role {owner}"],
)  # fmt: skip
def test_nor_may_the_relay_s_and_the_operator_s(database: Database, kind: str, query: str) -> None:
    with pytest.raises(DENIED):
        database.query(kind, query.format(**database.names))


async def test_the_upkeep_is_the_owner_s(database: Database) -> None:
    for kind in ("shop", "bank", "relay", "operator"):
        async with open_store(database.url_of(kind), name="test") as store:
            with pytest.raises(UsageError, match=f"{database.names[kind]} does not own orderbus.inbox; .*orderbus schema upkeep"):
                await store.maintain(3600)
    with psycopg.connect(database.url) as connection:
        (name,) = connection.execute(
            "select max(relname) from pg_class where relname like 'inbox_2%%' and relkind = 'r'"
        ).fetchone() or ("",)
        connection.execute(sql.SQL("drop table orderbus.{}").format(sql.Identifier(name)))
    command = [sys.executable, "-m", "orderbus", "schema", "upkeep"]
    done = await anyio.run_process(command, env={**os.environ, "ORDERBUS_DATABASE_URL": database.url_of("owner")}, cwd=ROOT)
    assert b"kept up" in done.stdout
    assert database.query("owner", f"select to_regclass('orderbus.{name}') is not null") == [(True,)]


async def test_a_service_tells_the_owner_s_upkeep_its_window(database: Database) -> None:
    async with open_store(database.url_of("bank"), name="test", dedupe_window_s=30 * 86_400) as store:
        transaction = await store.begin([InboxEntry(new_id(), "bank.windows", 1)])
        await transaction.commit([], [])
        with psycopg.connect(database.url) as connection:
            connection.execute("update orderbus.consumer set window_s = null, seen_at = 'epoch'")
        with pytest.raises(UsageError, match="does not own"):
            await store.maintain(30 * 86_400)
    kept = "select window_s, seen_at > now() - interval '1 hour' from orderbus.consumer where name = 'bank.windows'"
    assert database.query("owner", kept) == [(30 * 86_400, True)]


async def test_a_group_s_user_reaches_no_other_group_s_queue(users: Users) -> None:
    needs = [QueueNeed("bank.roles.ordered", ("roles.ordered",))]
    async with open_broker(users.url_of("bank"), name="test") as broker:
        await broker.apply(topology_for(needs))
    async with open_broker(users.url_of("shop"), name="test") as broker:
        for queue in ("bank.roles.ordered", "bank.roles.ordered.dlq"):
            with pytest.raises(OrderbusError, match="ACCESS_REFUSED"):
                async with broker.subscribe(queue, prefetch=1) as subscription:
                    await subscription.receive()
            with pytest.raises(TopologyError, match="ACCESS_REFUSED"):
                await broker.apply(Topology(queues=(Queue(queue),)))
        mine = Queue("shop.mine")
        await broker.apply(Topology(queues=(mine,)))
        await broker.apply(Topology(bindings=(Binding(EVENTS_EXCHANGE, mine.name, "roles.settled.*"),)))
        for key in ("roles.ordered.*", "#", "*.*.*"):
            with pytest.raises(TopologyError, match="ACCESS_REFUSED"):
                await broker.apply(Topology(bindings=(Binding(EVENTS_EXCHANGE, mine.name, key),)))


@pytest.mark.parametrize("kind", ["shop", "operator"])
async def test_who_only_handles_publishes_no_event(users: Users, kind: str) -> None:
    async with open_broker(users.url_of("relay"), name="test") as broker:
        await broker.apply(topology_for([]))
    async with open_broker(users.url_of(kind), name="test") as broker:
        message = Outgoing(EVENTS_EXCHANGE, "roles.ordered.01", b"{}", "m", "roles.ordered")
        assert Receipt.CONFIRMED not in await broker.publish([message])
