"""`orderbus check`: each thing that is wrong, with its fix, and nothing changed."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import aiormq
import anyio
import psycopg
import pytest

from orderbus._core.topology import QueueNeed, topology_for
from orderbus.adapters.postgres.rights import BUS, RELAY
from orderbus.adapters.rabbitmq import open_broker
from orderbus.cli.check_servers import _judged
from tests.cli.conftest import ROOT, Project, stranger
from tests.servers import Rabbit

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed"):
        n: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None: ...
"""


@pytest.fixture
def group() -> str:
    return f"shop-{secrets.token_hex(4)}"


def found(project: Project, *targets: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and what was found by the first word of what was looked at."""
    result = project.run("check", *targets, "--json")
    assert "Traceback" not in result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, {line["what"].partition(" ")[0]: line for line in lines}


def declare(url: str, name: str, arguments: dict[str, Any]) -> None:
    async def run() -> None:
        connection = await aiormq.connect(url)
        await (await connection.channel()).queue_declare(name, durable=True, arguments=arguments)
        await connection.close()

    anyio.run(run)


def apply(url: str, group: str) -> None:
    """Declare what the shop needs."""

    async def run() -> None:
        async with open_broker(url, name="tests") as broker:
            await broker.apply(topology_for([QueueNeed(f"{group}.orders.placed", ("orders.placed",))]))

    anyio.run(run)


class User:
    """A user of a vhost who may configure all, and nothing else yet."""

    def __init__(self, rabbit: Rabbit, url: str) -> None:
        parts = urlsplit(url)
        self.name = f"user-{secrets.token_hex(4)}"
        self.url = urlunsplit(parts._replace(netloc=f"{self.name}:secret@{parts.hostname}:{parts.port or 5672}"))
        self._vhost = unquote(parts.path[1:])
        self._ctl = rabbit.ctl
        self._ctl("add_user", self.name, "secret")

    def may(self, write: str, read: str) -> None:
        self._ctl("set_permissions", "-p", self._vhost, self.name, ".*", write, read)


def test_all_is_well_in_one_process(project: Project) -> None:
    project.write(SHOP.format(group="shop"))
    code, what = found(project, project.bus)
    assert code == 0
    assert {one["status"] for one in what.values()} == {"ok"}


@pytest.mark.parametrize(
    ("source", "code"),
    [
        (SHOP, "OB403"),
        (SHOP.replace(", tx: Tx", ""), "OB404"),
        (SHOP.replace("@bus.on(Placed)", '@bus.on(Placed, guard="none")'), "OB403"),
        (SHOP.replace("@bus.on(Placed)", "@bus.every(60)").replace("order: Placed, tx: Tx", "till: 'Till'"), "OB305"),
    ],
    ids=["no-database", "no-guard", "no-transaction", "unknown-name"],
)
def test_what_a_start_would_refuse_is_a_finding(project: Project, source: str, code: str) -> None:
    project.write(source.format(group="shop"))
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    ended, what = found(project, project.bus)
    assert ended == 1
    assert what["handlers"]["status"] == "finding"
    assert code in what["handlers"]["text"]


def test_each_wrong_setting_is_a_finding(project: Project) -> None:
    project.environment |= {"ORDERBUS_GRACE": "1", "ORDERBUS_BROKER_URL": "http://x"}
    result = project.run("check", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [line["status"] for line in lines] == ["finding", "finding"]
    assert "did you mean ORDERBUS_GRACE_S?" in lines[0]["text"]


def test_servers_that_are_away_are_told_without_their_passwords(project: Project) -> None:
    project.environment |= {
        "ORDERBUS_BROKER_URL": "amqp://someone:secret@127.0.0.1:1/",
        "ORDERBUS_DATABASE_URL": "postgresql://someone:secret@127.0.0.1:1/shop",
        "ORDERBUS_REDIS_URL": "redis://someone:secret@127.0.0.1:1/0",
    }
    code, what = found(project)
    assert code == 4
    assert {name: what[name]["status"] for name in ("broker", "database", "redis")} == dict.fromkeys(
        ("broker", "database", "redis"), "unavailable"
    )
    assert "secret" not in json.dumps(what)


@pytest.mark.servers
def test_servers_tell_their_versions(project: Project, vhost_url: str, database_url: str, redis_url: str) -> None:
    project.environment |= {
        "ORDERBUS_BROKER_URL": vhost_url,
        "ORDERBUS_DATABASE_URL": database_url,
        "ORDERBUS_REDIS_URL": redis_url,
    }
    project.run("schema", "apply")
    code, what = found(project)
    assert code == 0, what
    assert what["broker"]["text"].startswith("RabbitMQ ")
    assert what["database"]["text"].startswith("PostgreSQL ")
    assert what["redis"]["text"].startswith("Redis ")
    assert what["schema"]["status"] == "ok"


@pytest.mark.servers
def test_clocks_and_rights_are_looked_at_too(project: Project, database_url: str, redis_url: str) -> None:
    project.environment |= {"ORDERBUS_DATABASE_URL": database_url, "ORDERBUS_REDIS_URL": redis_url}
    project.run("schema", "apply")
    result = project.run("check", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    clocks = [line for line in lines if line["what"].startswith("clock of ")]
    assert [line["what"].split()[2] for line in clocks] == ["database", "redis"]
    assert all(re.fullmatch(r"0\.\d s (ahead of|behind) this machine's, give or take 0\.\d s", line["text"]) for line in clocks)
    [rights] = [line for line in lines if line["what"].startswith("rights in ")]
    assert rights["text"] == "enough for a bus and its relay"


@pytest.mark.servers
def test_the_rights_of_a_relay_are_looked_at_where_any_of_the_buses_runs_one(project: Project, database_url: str) -> None:
    project.write("""
        from orderbus import Bus, Settings
        first = Bus("first", settings=Settings(relay=False))
        bus = Bus("second")
    """)
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    project.run("schema", "apply")
    _, what = found(project, f"{project.module}:first", project.bus)
    assert what["rights"]["text"] == "enough for a bus and its relay"


@pytest.mark.servers
@pytest.mark.parametrize(("name", "word"), [("postgres", "behind"), ("redis", "ahead of")])
def test_a_clock_that_is_wrong_is_a_finding(
    project: Project, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, name: str, word: str
) -> None:
    shift_s = 100 if word == "behind" else -100
    shifted = SimpleNamespace(time=lambda: time.time() + shift_s)
    monkeypatch.setattr(f"orderbus.adapters.{name}.clock.time", shifted)
    if name == "postgres":
        project.environment["ORDERBUS_DATABASE_URL"] = database_url
    else:
        project.environment["ORDERBUS_REDIS_URL"] = redis_url
    code, what = found(project)
    assert (code, what["clock"]["status"]) == (1, "finding")
    assert re.match(rf"(100\.\d|99\.9) s {word} this machine's", what["clock"]["text"])
    assert "set both by NTP" in what["clock"]["text"]


@pytest.mark.parametrize(
    ("ahead_s", "unsure_s", "status"), [(2.0, 0.0, "ok"), (-2.1, 0.0, "finding"), (-4.0, 2.5, "ok"), (4.6, 2.5, "finding")]
)
def test_a_slow_answer_is_no_wrong_clock(ahead_s: float, unsure_s: float, status: str) -> None:
    assert _judged(ahead_s, unsure_s)[0] == status


@pytest.mark.servers
def test_a_role_that_lacks_rights_is_told_which(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    project.run("schema", "apply")
    with stranger(database_url) as (name, url), psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(f"grant usage on schema orderbus to {name}")  # type: ignore[arg-type]
        connection.execute(f"grant select on all tables in schema orderbus to {name}")  # type: ignore[arg-type]
        connection.execute(f"grant insert, delete on orderbus.inbox to {name}")  # type: ignore[arg-type]
        project.environment |= {"ORDERBUS_DATABASE_URL": url, "ORDERBUS_RELAY": "false"}
        code, what = found(project)
    lacking = (
        "insert on orderbus.consumer, update (window_s, seen_at) on orderbus.consumer, insert on orderbus.outbox, "
        "usage on orderbus.outbox_id_seq, insert on orderbus.scheduled"
    )
    assert (code, what["rights"]["text"].partition(";")[0]) == (1, f"the role lacks {lacking}")


@pytest.mark.servers
def test_a_role_without_any_right_is_a_finding(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    project.run("schema", "apply")
    with stranger(database_url) as (_, url):
        project.environment["ORDERBUS_DATABASE_URL"] = url
        code, what = found(project)
    assert (code, what["schema"]["status"]) == (1, "finding")
    assert "permission denied for schema orderbus; the role needs usage on schema orderbus" in what["schema"]["text"]


@pytest.mark.parametrize(("kind", "wanted"), [("service", BUS), ("relay", RELAY)])
def test_the_rights_are_those_that_the_roles_get(kind: str, wanted: dict[str, str]) -> None:
    granted = re.findall(rf"\('{kind}', '(.*?)', '(.*?)'\)", (ROOT / "compose" / "roles" / "postgres.sql").read_text())
    assert {name.replace("sequence", "outbox_id_seq"): rights for rights, name in granted} == wanted


@pytest.mark.servers
def test_a_missing_schema_names_its_command(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    code, what = found(project)
    assert code == 1
    assert "orderbus schema apply" in what["schema"]["text"]


@pytest.mark.servers
def test_missing_queues_are_a_note_and_are_not_declared(project: Project, vhost_url: str, group: str) -> None:
    project.write(SHOP.format(group=group))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}
    for _ in range(2):
        code, what = found(project, project.bus)
        assert code == 0
        assert what["topology"]["status"] == "note"
        assert f"{group}.orders.placed" in what["topology"]["text"]


@pytest.mark.servers
def test_a_queue_with_other_arguments_is_a_finding_with_its_fix(project: Project, vhost_url: str, group: str) -> None:
    project.write(SHOP.format(group=group))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}
    declare(vhost_url, f"{group}.orders.placed", {"x-queue-type": "classic"})
    code, what = found(project, project.bus)
    assert code == 1
    assert what["topology"]["status"] == "finding"
    assert f"queue '{group}.orders.placed'" in what["topology"]["text"]
    assert "drain and delete it" in what["topology"]["text"]


@pytest.mark.servers
def test_a_topology_as_it_should_be(project: Project, vhost_url: str, group: str) -> None:
    project.write(SHOP.format(group=group))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}

    apply(vhost_url, group)
    code, what = found(project, project.bus)
    assert (code, what["topology"]["status"]) == (0, "ok")


def test_a_bus_that_does_not_exist(project: Project) -> None:
    project.write(SHOP.format(group="shop"))
    result = project.run("check", f"{project.module}:nobus")
    assert result.exit_code == 2
    assert f"did you mean {project.module}:bus?" in result.stderr


class TestPermissions:
    """Each that a bus needs at run time, taken away from a user who has all others."""

    @pytest.fixture
    def user(self, rabbit: Rabbit, vhost_url: str) -> Iterator[User]:
        user = User(rabbit, vhost_url)
        yield user
        rabbit.ctl("delete_user", user.name)

    @pytest.mark.servers
    @pytest.mark.parametrize(
        ("write", "read", "told"),
        [
            (".*", ".*", None),
            ("^(?!ob\\.events).*$", ".*", "write to exchange 'ob.events'"),
            ("^(?!amq\\.default).*$", ".*", "write to exchange 'amq.default'"),
            ("^(?!ob\\.retry\\.60000ms).*$", ".*", "write to exchange 'ob.retry.60000ms'"),
            (".*", "^(?!{group}).*$", "read queue '{group}.orders.placed'"),
        ],
    )
    def test_one_that_is_missing_is_told(
        self, project: Project, user: User, vhost_url: str, group: str, write: str, read: str, told: str | None
    ) -> None:
        project.write(SHOP.format(group=group))
        apply(vhost_url, group)
        user.may(write, read.replace("{group}", group))
        project.environment |= {"ORDERBUS_BROKER_URL": user.url, "ORDERBUS_DATABASE_URL": "memory://"}

        code, what = found(project, project.bus)

        if told is None:
            assert (code, what["permissions"]["text"]) == (0, "enough to consume and to relay")
        else:
            fix = "have its permissions set (compose/roles/rabbitmq.sh gives those that suffice)"
            assert code == 1
            assert what["permissions"]["text"] == f"the user may not {told.replace('{group}', group)}; {fix}"

    @pytest.mark.servers
    def test_what_is_not_needed_is_not_asked_for(self, project: Project, user: User, vhost_url: str, group: str) -> None:
        project.write(SHOP.format(group=group))
        apply(vhost_url, group)
        user.may("^(?!ob\\.events).*$", ".*")
        project.environment |= {"ORDERBUS_BROKER_URL": user.url, "ORDERBUS_DATABASE_URL": "memory://", "ORDERBUS_RELAY": "false"}

        code, what = found(project, project.bus)

        assert (code, what["permissions"]["text"]) == (0, "enough to consume")

    @pytest.mark.servers
    def test_nothing_is_taken_and_nothing_is_left(self, project: Project, vhost_url: str, group: str) -> None:
        project.write(SHOP.format(group=group))
        apply(vhost_url, group)
        queue = f"{group}.orders.placed"
        project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}

        async def put() -> None:
            connection = await aiormq.connect(vhost_url)
            channel = await connection.channel()
            await channel.queue_bind(queue, "ob.events", "#")  # what a check would publish to it, too
            await channel.basic_publish(b"{}", exchange="", routing_key=queue)
            await connection.close()

        async def take() -> tuple[Any, Any]:
            connection = await aiormq.connect(vhost_url)
            channel = await connection.channel()
            declared = await channel.queue_declare(queue, passive=True)
            message = await channel.basic_get(queue, no_ack=True)
            await channel.queue_delete(queue)
            await connection.close()
            return declared, message

        anyio.run(put)
        assert found(project, project.bus)[0] == 0
        declared, message = anyio.run(take)
        assert (declared.message_count, declared.consumer_count) == (1, 0)
        assert message.header.properties.headers == {"x-delivery-count": 0}
