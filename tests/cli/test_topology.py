"""`orderbus topology`: the plan says what is so, and apply does what the plan says and no more."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import aiormq
import anyio
import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from orderbus import UnavailableError
from orderbus.adapters.rabbitmq.drift import Drift
from tests.cli.conftest import Project
from tests.cli.test_dlq_changing import at_a_terminal
from tests.servers import Missing, free_port, start_rabbit

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed"):
        n: int

    class Paid(Event, topic="orders.paid"):
        n: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None: ...
"""
FOLLOWED = """
    @bus.on({event}, name="{name}")
    async def follow_{name}(order: {event}, tx: Tx) -> None: ...
"""


class Managed:
    """A RabbitMQ with its management API: a vhost of its own for each test."""

    def __init__(self, url: str, api: str) -> None:
        self.api = api
        self.vhost = f"v-{secrets.token_hex(4)}"
        self.url = f"{url}{self.vhost}"
        self.http = httpx.Client(base_url=f"{api}/api", auth=("guest", "guest"))
        self.http.put(f"/vhosts/{self.vhost}").raise_for_status()

    def queues(self) -> set[str]:
        return {one["name"] for one in self.http.get(f"/queues/{self.vhost}").raise_for_status().json()}

    def keys(self, queue: str) -> set[str]:
        bindings = self.http.get(f"/queues/{self.vhost}/{queue}/bindings").raise_for_status().json()
        return {one["routing_key"] for one in bindings if one["source"] == "ob.events"}

    def bindings(self, queue: str) -> int:
        return len(self.http.get(f"/queues/{self.vhost}/{queue}/bindings").raise_for_status().json())

    def declare(self, queue: str, **arguments: Any) -> None:
        body = {"durable": True, "arguments": {"x-queue-type": "quorum", **arguments}}
        self.http.put(f"/queues/{self.vhost}/{queue}", json=body).raise_for_status()

    def bind(self, exchange: str, queue: str, key: str) -> None:
        self.http.post(f"/bindings/{self.vhost}/e/{exchange}/q/{queue}", json={"routing_key": key}).raise_for_status()

    def publish(self, queue: str) -> None:
        body = {"properties": {}, "routing_key": queue, "payload": "x", "payload_encoding": "string"}
        answer = self.http.post(f"/exchanges/{self.vhost}/amq.default/publish", json=body).raise_for_status()
        assert answer.json() == {"routed": True}

    def until_counted(self, unacknowledged: dict[str, int]) -> None:
        """The management API counts a little later than things happen."""
        deadline = time.monotonic() + 30
        for queue, count in unacknowledged.items():
            while self.http.get(f"/queues/{self.vhost}/{queue}").json().get("messages_unacknowledged") != count:
                assert time.monotonic() < deadline, queue


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[str, str]]:
    port = free_port()
    settings = f"management.tcp.port = {port}\nmanagement.tcp.ip = 127.0.0.1\ncollect_statistics_interval = 200\n"
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-rabbit quorum_tick_interval 100")  # counts soon
            rabbit = start_rabbit(stack, plugins="rabbitmq_management", settings=settings)
        except Missing as error:
            if os.environ.get("CI"):
                pytest.fail(f"a server is missing, and CI may not skip: {error}", pytrace=False)
            pytest.skip(f"SERVER MISSING: {error}")
        yield rabbit.url, f"http://127.0.0.1:{port}"


@pytest.fixture
def managed(node: tuple[str, str], project: Project) -> Iterator[Managed]:
    managed = Managed(*node)
    project.environment |= {
        "ORDERBUS_BROKER_URL": managed.url,
        "ORDERBUS_DATABASE_URL": "memory://",
        "ORDERBUS_MANAGEMENT_URL": managed.api,
    }
    project.write(SHOP.format(group="shop"))
    yield managed
    managed.http.close()


def planned(project: Project, *arguments: str) -> tuple[int, dict[str, list[str]]]:
    """The exit code, and the names by action."""
    result = project.run("topology", *(arguments or ("plan", project.bus)), "--json")
    assert "Traceback" not in result.output, result.output
    found: dict[str, list[str]] = {}
    for line in map(json.loads, result.stdout.splitlines()):
        if line["event"] == "topology-change":
            found.setdefault(line["action"], []).append(line["name"])
    return result.exit_code, found


@pytest.mark.servers
def test_what_is_missing_is_planned_then_made_and_then_all_is_as_it_should_be(project: Project, managed: Managed) -> None:
    code, found = planned(project)
    assert (code, set(found)) == (1, {"create"})
    assert {"ob.events", "shop.orders.placed", "shop.orders.placed.dlq"} <= set(found["create"])
    assert managed.queues() == set()

    result = project.run("topology", "apply", project.bus, "--yes")
    assert result.exit_code == 0, result.output
    assert "  + queue shop.orders.placed\n" in result.stdout
    outcomes = [json.loads(line) for line in result.stderr.splitlines()]
    assert {line["outcome"] for line in outcomes} == {"created"}
    assert "queue shop.orders.placed" in {line["name"] for line in outcomes}
    assert managed.keys("shop.orders.placed") == {"orders.placed.*"}
    assert planned(project) == (0, {})
    again = project.run("topology", "apply", project.bus, "--yes", "--json")
    assert json.loads(again.stdout) == {"event": "topology-applied", "created": 0, "removed": 0, "left": 0}
    assert "Everything is as it should be." in project.run("topology", "plan", project.bus).stdout


@pytest.mark.servers
@pytest.mark.parametrize(("answer", "code"), [("n", 1), ("y", 0)])
def test_at_a_terminal_it_asks_first(project: Project, managed: Managed, answer: str, code: int) -> None:
    ended, shown = at_a_terminal(project, answer, "topology", "apply", project.bus)
    assert f"Change {managed.url.replace('guest:guest', 'guest:***')}? [y/N]" in shown
    assert ended == code, shown
    assert ("shop.orders.placed" in managed.queues()) is (code == 0)


@pytest.mark.servers
def test_what_differs_is_shown_with_both_values_and_never_changed(project: Project, managed: Managed) -> None:
    managed.declare("shop.orders.placed", **{"x-delivery-limit": 20, "x-max-length": 5})
    text = project.run("topology", "plan", project.bus).stdout
    assert "  ~ queue shop.orders.placed\n" in text
    assert "      x-delivery-limit: 20 → 50\n" in text
    assert "      x-max-length: 5 → not set\n" in text
    assert '      x-dead-letter-strategy: not set → "at-least-once"\n' in text
    assert "drain and delete it" in text

    result = project.run("topology", "apply", project.bus, "--yes")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "orderbus: left as it was: queue shop.orders.placed"
    assert planned(project) == (1, {"differs": ["shop.orders.placed"]})


@pytest.mark.servers
def test_what_is_left_over_goes_only_when_told_and_only_where_it_is_empty_and_unused(project: Project, managed: Managed) -> None:
    names = ["empty", "ready", "held", "read"]
    project.write(SHOP.format(group="shop") + "".join(FOLLOWED.format(event="Paid", name=name) for name in names), "before")
    assert project.run("topology", "apply", "before:bus", "--yes").exit_code == 0
    managed.declare("shop.by-hand")
    managed.bind("ob.events", "shop.orders.placed", "orders.changed.*")
    managed.bind("amq.topic", "shop.orders.placed", "by.hand")
    text = project.run("topology", "plan", project.bus).stdout
    for name in names:
        assert f"  - queue shop.{name}\n  - queue shop.{name}.dlq\n" in text
    assert "  - binding ob.events → shop.orders.placed by orders.changed.*\n" in text
    assert "by-hand" not in text
    assert "--prune" in text
    assert project.run("topology", "apply", project.bus, "--yes").exit_code == 1
    before = managed.queues()
    assert {f"shop.{name}" for name in names} <= before

    with start_blocking_portal() as portal:
        connection = portal.call(aiormq.connect, managed.url)
        channel = portal.call(connection.channel)
        managed.publish("shop.ready")
        managed.publish("shop.held")
        assert portal.call(channel.basic_get, "shop.held").delivery_tag == 1
        portal.call(channel.basic_consume, "shop.read", _ignored)
        managed.until_counted({"shop.empty": 0, "shop.empty.dlq": 0, "shop.held": 1})
        result = project.run("topology", "apply", project.bus, "--yes", "--prune")
        portal.call(connection.close)
    assert result.exit_code == 1
    assert "queue shop.ready is kept: messages ready: 1, unacknowledged: 0, consumers: 0" in result.stderr
    assert "queue shop.held is kept: messages ready: 0, unacknowledged: 1, consumers: 1" in result.stderr
    assert "queue shop.read is kept: messages ready: 0, unacknowledged: 0, consumers: 1" in result.stderr
    assert before - managed.queues() == {"shop.empty", "shop.empty.dlq"}
    assert managed.keys("shop.ready") == {"orders.paid.*"}
    assert managed.keys("shop.orders.placed") == {"orders.placed.*"}


async def _ignored(message: Any) -> None: ...


@pytest.mark.servers
def test_a_queue_that_comes_into_use_while_it_is_removed_is_kept_with_its_bindings(
    project: Project, managed: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(SHOP.format(group="shop") + FOLLOWED.format(event="Paid", name="used"), "in_use_before")
    assert project.run("topology", "apply", "in_use_before:bus", "--yes").exit_code == 0
    look = Drift._check_idle
    looked_at: list[str] = []

    async def used_after_the_first_look(drift: Drift, queue: str) -> None:
        looked_at.append(queue)
        if len(looked_at) > 1:
            await look(drift, queue)
            return
        managed.publish(queue)
        while not (await drift._asking.call(lambda channel: channel.queue_declare(queue, passive=True))).message_count:
            pass

    monkeypatch.setattr(Drift, "_check_idle", used_after_the_first_look)
    result = project.run("topology", "apply", project.bus, "--yes", "--prune")

    assert result.exit_code == 1
    assert "queue shop.used is kept: messages ready: 1" in result.stderr
    assert managed.keys("shop.used") == {"orders.paid.*"}
    assert managed.bindings("shop.used") == 3  # and those of the default and of the return exchange


@pytest.mark.servers
def test_a_queue_that_could_not_be_removed_in_the_end_has_its_bindings(
    project: Project, managed: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(SHOP.format(group="shop") + FOLLOWED.format(event="Paid", name="used"), "in_use_before")
    assert project.run("topology", "apply", "in_use_before:bus", "--yes").exit_code == 0
    looks: list[str] = []

    async def gone_at_the_second_look(drift: Drift, queue: str) -> None:
        looks.append(queue)
        if len(looks) > 1:
            raise UnavailableError("the management API does not answer")

    monkeypatch.setattr(Drift, "_check_idle", gone_at_the_second_look)
    project.write(SHOP.format(group="shop"))
    result = project.run("topology", "apply", project.bus, "--yes", "--prune")

    assert result.exit_code == 4
    assert managed.keys("shop.used") == {"orders.paid.*"}
    assert managed.bindings("shop.used") == 3


@pytest.mark.servers
def test_a_binding_that_was_refused_is_not_said_to_be_made(project: Project, managed: Managed) -> None:
    """Without the management API nobody sees whether it is there."""
    managed.http.put("/users/deaf", json={"password": "secret", "tags": ""}).raise_for_status()
    rights = {"configure": ".*", "write": ".*", "read": "^$"}
    managed.http.put(f"/permissions/{managed.vhost}/deaf", json=rights).raise_for_status()
    project.write(SHOP.format(group="shop"))
    del project.environment["ORDERBUS_MANAGEMENT_URL"]
    project.environment["ORDERBUS_BROKER_URL"] = managed.url.replace("guest:guest", "deaf:secret")
    for n in range(2):
        result = project.run("topology", "apply", project.bus, "--yes")
        assert result.exit_code == 1
        assert "ACCESS_REFUSED" in result.stderr
        written = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
        of_bindings = {line["outcome"] for line in written if line["kind"] == "binding"}
        assert "created" not in of_bindings
        assert ("unknown" in of_bindings) == (n == 0)


@pytest.mark.servers
def test_a_user_who_may_not_configure_is_told_what_was_refused(project: Project, managed: Managed) -> None:
    managed.http.put("/users/reader", json={"password": "secret", "tags": "management"}).raise_for_status()
    rights = {"configure": "^$", "write": "^$", "read": ".*"}
    managed.http.put(f"/permissions/{managed.vhost}/reader", json=rights).raise_for_status()
    project.environment["ORDERBUS_BROKER_URL"] = managed.url.replace("guest:guest", "reader:secret")
    assert planned(project)[0] == 1
    result = project.run("topology", "apply", project.bus, "--yes")
    assert result.exit_code == 1
    assert "exchange 'ob.events': the broker says \"ACCESS_REFUSED" in result.stderr
    assert "secret" not in result.output
    assert managed.queues() == set()

    project.environment["ORDERBUS_BROKER_URL"] = managed.url
    assert project.run("topology", "apply", project.bus, "--yes").exit_code == 0
    project.environment["ORDERBUS_BROKER_URL"] = managed.url.replace("guest:guest", "reader:secret")
    code, said = checked(project)
    assert code == 1
    assert len(said) == 30
    assert {status for status, _ in said} == {"finding"}
    assert any(text.startswith("exchange 'ob.events': the broker says \"ACCESS_REFUSED") for _, text in said)


@pytest.mark.servers
def test_check_finds_what_is_missing_and_what_is_left_over(project: Project, managed: Managed) -> None:
    code, [(status, text)] = checked(project)
    assert (code, status) == (0, "note")
    assert text.startswith("30 exchanges and queues are missing (shop.orders.placed, shop.orders.placed.dlq, ob.events, ")
    assert project.run("topology", "apply", project.bus, "--yes").exit_code == 0
    assert checked(project) == (0, [("ok", "15 queues as they should be")])
    managed.bind("ob.events", "shop.orders.placed", "orders.changed.*")
    left = "binding ob.events → shop.orders.placed by orders.changed.* is left over from a handler that is gone"
    assert checked(project) == (1, [("finding", left)])


def checked(project: Project) -> tuple[int, list[tuple[str, str]]]:
    """The exit code, and what check says of the topology, up to its fix."""
    result = project.run("check", project.bus, "--json")
    assert "Traceback" not in result.output
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    [clock] = [line for line in lines if line["what"].startswith("clock of broker")]
    assert clock["status"] == "ok"
    said = [(line["status"], line["text"].partition(";")[0]) for line in lines if line["what"].startswith("topology of")]
    return result.exit_code, said


# Without the management API


@pytest.mark.servers
def test_without_the_management_api_it_says_what_can_not_be_known(project: Project, vhost_url: str) -> None:
    group = f"shop-{secrets.token_hex(4)}"
    project.write(SHOP.format(group=group) + FOLLOWED.format(event="Paid", name="paid"))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}

    async def declare() -> None:
        connection = await aiormq.connect(vhost_url)
        await (await connection.channel()).queue_declare(
            f"{group}.orders.placed", arguments={"x-queue-type": "quorum"}, durable=True
        )
        await connection.close()

    anyio.run(declare)
    code, found = planned(project)
    assert code == 1
    assert found["differs"] == [f"{group}.orders.placed"]
    assert {f"{group}.paid", f"{group}.paid.dlq"} <= set(found["create"])

    result = project.run("topology", "apply", project.bus, "--yes")
    assert result.exit_code == 1
    code, found = planned(project)
    assert (code, found) == (1, {"differs": [f"{group}.orders.placed"], "unknown": ["17 of 17"]})
    text = project.run("topology", "plan", project.bus).stdout
    assert "PRECONDITION_FAILED - inequivalent arg" in text
    assert "  ? bindings, 17 of 17\n      can't be read over AMQP; give ORDERBUS_MANAGEMENT_URL\n" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.servers
def test_what_was_begun_when_somebody_interrupted_it_is_in_the_audit_lines(
    project: Project, vhost_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write(SHOP.format(group=f"shop-{secrets.token_hex(4)}"))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}

    async def interrupted(drift: Drift, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Drift, "create", interrupted)
    result = project.run("topology", "apply", project.bus, "--yes", "--audit", "audit")
    assert result.exit_code != 0
    outcomes = {json.loads(line)["outcome"] for line in Path("audit").read_text().splitlines()}
    assert outcomes == {"unknown"}


# Bad input


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "says"),
    [
        ({}, ["plan", "{bus}"], 2, "its queues live inside the process that runs the bus"),
        ({"BROKER_URL": "amqp://a:secret@127.0.0.1:1/"}, ["plan", "{bus}"], 4, "can't connect to RabbitMQ at"),
        ({"BROKER_URL": "amqp://a:secret@127.0.0.1:1/"}, ["apply", "{bus}"], 2, "say --yes; nothing was changed"),
        ({"BROKER_URL": "amqp://a:secret@127.0.0.1:1/"}, ["apply", "{bus}", "--prune", "--yes"], 2, "--prune needs ORDERBUS_MANAGEMENT_URL"),
        ({"MANAGEMENT_URL": "amqp://x:secret@y"}, ["plan", "{bus}"], 2, "must begin with one of http://, https://"),
        ({"MANAGEMENT_URL": "http://x:secret@y:port"}, ["plan", "{bus}"], 2, "names no host or a wrong port"),
        ({"MANAGEMENT_URL": "http://"}, ["plan", "{bus}"], 2, "names no host or a wrong port"),
        ({}, ["plan", "nowhere:bus"], 2, "there is no module 'nowhere'"),
        ({}, ["plan"], 2, "Missing argument"),
        ({"BROKER_URL": "amqp://a:secret@127.0.0.1:1/"}, ["plan", "{bus}", "other:bus"], 2, "the buses are on different brokers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_can_not_be_planned(project: Project, settings: dict[str, str], arguments: list[str], code: int, says: str) -> None:
    project.write(SHOP.format(group="shop"))
    project.write(
        'from orderbus import Bus, Settings\nbus = Bus("other", settings=Settings(broker_url="amqp://b:b@127.0.0.1:1/"))', "other"
    )
    project.environment |= {f"ORDERBUS_{name}": value for name, value in settings.items()} | {"COLUMNS": "200"}
    result = project.run("topology", *(argument.format(bus=project.bus) for argument in arguments))
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "secret" not in result.output
    assert "Traceback" not in result.output


@pytest.mark.servers
@pytest.mark.parametrize(
    ("status", "body", "code", "says"),
    [
        (200, '{"cluster_name": "rabbit@elsewhere"}', 2, "is of another broker: http://127.0.0.1:"),
        (200, "<html>", 2, "is not RabbitMQ's management API: its answer is no JSON"),
        (200, "[" * 100_000, 2, "is not RabbitMQ's management API: its answer is no JSON"),
        (200, "[]", 2, "is not RabbitMQ's management API"),
        (302, "", 2, "it answers 302 Found to /api/overview"),
        (404, "", 2, "it answers 404 Not Found to /api/overview"),
        (401, '{"error":"not_authorized","reason":"Login failed"}', 2, "refuses the user 'guest': Login failed"),
        (503, "", 4, "answers 503 Service Unavailable"),
    ],
    ids=str,
)
def test_what_answers_is_not_the_management_api(
    project: Project, vhost_url: str, status: int, body: str, code: int, says: str
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    project.write(SHOP.format(group="shop"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}
        project.environment["ORDERBUS_MANAGEMENT_URL"] = f"http://127.0.0.1:{server.server_port}"
        result = project.run("topology", "plan", project.bus)
        server.shutdown()
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.servers
def test_a_management_api_that_is_away_and_one_that_refuses_the_password(project: Project, managed: Managed) -> None:
    project.environment["ORDERBUS_MANAGEMENT_URL"] = "http://a:secret@127.0.0.1:1"
    result = project.run("topology", "plan", project.bus)
    assert (result.exit_code, "secret" in result.output) == (4, False)
    assert "can't ask the management API at http://127.0.0.1:1: ConnectionRefusedError" in result.stderr
    project.environment["ORDERBUS_MANAGEMENT_URL"] = managed.api.replace("://", "://guest:secret@")
    result = project.run("topology", "plan", project.bus)
    assert (result.exit_code, "secret" in result.output) == (2, False)
    assert "refuses the user 'guest': Login failed" in result.stderr
