"""The six services of the demo, a process each, each with a role and a user of its own that can do no more than it needs."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import anyio
import httpx
import psycopg
import pytest
from psycopg import sql

from services.demo.processes import Child, wait_until_ready, wait_until_said
from services.shared import database
from tests.security.test_roles import DENIED, ROLES, Database, Users
from tests.servers import Rabbit, free_port

pytestmark = pytest.mark.servers

LIMIT_S = 60.0
GROUPS = {
    "orders-api": "nothing",
    "payment": r"orders\.(placed|cancelled)",
    "inventory": r"orders\.(placed|cancelled)",
    "aggregator": r"(payments|inventory)\..*",
    "notification": r"orders\.(confirmed|cancelled)",
}
"""With the topics that each may bind to."""
WITH_TABLES = ("orders-api", "payment", "inventory", "aggregator")
ORDERS = [(1, 1_000, "confirmed"), (2, 900_000, "cancelled")]


@pytest.fixture(scope="module")
def roles(postgres_url: str) -> Iterator[Database]:
    if shutil.which("psql") is None:
        pytest.skip("SERVER MISSING: psql is not installed")
    suffix = secrets.token_hex(4)
    name = sql.Identifier(f"orderbus_test_demo_{suffix}")
    found = Database(urlunsplit(urlsplit(postgres_url)._replace(path=f"/orderbus_test_demo_{suffix}")), suffix)
    found.names |= {group: f"{group.replace('-', '_')}_{suffix}" for group in WITH_TABLES}
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(sql.SQL("create database {}").format(name))
    try:
        found.apply("payment")
        anyio.run(database.prepare, found.url, database.Stock(articles=5, pieces=100))
        for group in WITH_TABLES:
            found.apply(group)
        given = [("-v", f"{group.replace('-', '_')}={found.names[group]}") for group in WITH_TABLES]
        arguments = [argument for pair in given for argument in pair]
        subprocess.run(["psql", "-X", "-q", "-d", found.url, *arguments, "-f", str(ROLES / "demo.sql")], check=True)
        yield found
    finally:
        found.drop_roles()
        with psycopg.connect(postgres_url, autocommit=True) as server:
            server.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture
def accounts(rabbit: Rabbit) -> Iterator[Users]:
    suffix = secrets.token_hex(4)
    with rabbit.vhost(f"orderbus-demo-roles-{suffix}") as url:
        users = Users(rabbit, url, suffix)
        users.names = {kind: f"{kind}-{suffix}" for kind in ("relay", *GROUPS)}
        users.apply("relay")
        for group, topics in GROUPS.items():
            users.apply("service", group, topics)
        try:
            yield users
        finally:
            users.drop()


def test_the_demo_runs_with_least_privilege(roles: Database, accounts: Users, redis_url: str, tmp_path: Path) -> None:
    port = free_port()
    common = {
        "ORDERBUS_RELAY": "false",
        "ORDERBUS_REDIS_URL": redis_url,
        "ORDERBUS_REDIS_PREFIX": f"orderbus-test:{secrets.token_hex(6)}:",
        "ORDERS_API_PORT": str(port),
        "ORDERBUS_DATABASE_URL": "",
    }
    with ExitStack() as stack:
        children = []
        for group in ("outbox-dispatcher", *GROUPS):
            module = f"services.{group.replace('-', '_')}"
            arguments = ["-m", module] if group == "orders-api" else ["-m", "orderbus", "run", f"{module}:bus"]
            account = "relay" if group == "outbox-dispatcher" else group
            environment = {**common, "ORDERBUS_BROKER_URL": accounts.url_of(account)}
            if account in roles.names:
                environment["ORDERBUS_DATABASE_URL"] = roles.url_of(account)
            child = Child(group, arguments, environment, tmp_path)
            child.start()
            stack.callback(child.stop)
            children.append(child)
        wait_until_said("running: ", [child for child in children if child.name != "orders-api"])
        wait_until_ready(f"http://127.0.0.1:{port}/ready", children)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for customer, cents, status in ORDERS:
                order = {
                    "customer_id": f"00000000-0000-0000-0000-{customer:012x}",
                    "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": cents}],
                }
                placed = client.post("/orders", json=order, headers={"idempotency-key": f'"{customer}"'})
                assert placed.status_code == 201, placed.text
                assert _finished(client, placed.json()["order_id"]) == status
        for child in children:
            assert child.stop() == 0, child.log.read_text()
    logs = "".join(child.log.read_text() + child.out.read_text() for child in children)
    assert "permission denied" not in logs
    assert "ACCESS_REFUSED" not in logs


def _finished(client: httpx.Client, order_id: str) -> str:
    deadline = time.monotonic() + LIMIT_S
    while (order := client.get(f"/orders/{order_id}").json())["status"] == "pending":
        assert time.monotonic() < deadline, order
        time.sleep(0.1)
    return str(order["status"])


@pytest.mark.parametrize(
    ("group", "query"),
    [
        ("payment", "select * from orders"),
        ("payment", "update stock set available = 1000"),
        ("inventory", "select * from payment"),
        ("aggregator", "delete from orders"),
        ("orders-api", "update orders set status = 'confirmed'"),
        ("orders-api", "insert into payment (order_id, state) values (gen_random_uuid(), 'authorized')"),
    ],
)
def test_a_service_reaches_no_other_s_tables(roles: Database, group: str, query: str) -> None:
    with pytest.raises(DENIED):
        roles.query(group, query)
