"""`orderbus publish`: what is sent is what the event's class reads, and what is wrong sends nothing."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from typer.testing import CliRunner, Result

from orderbus._core.message import Incoming, Settlement
from orderbus._core.topology import QueueNeed, topology_for
from orderbus.abc import Broker
from orderbus.adapters.rabbitmq import open_broker
from orderbus.cli.app import app
from orderbus.cli.publish import EXAMPLE
from tests.cli.conftest import Project, delete_queues

SHOP = """
    from msgspec import Struct
    from orderbus import Bus, Event, Tx

    class Place(Struct, frozen=True):
        town: str = ""

    class Placed(Event, topic="{topic}", key="order", version=2):
        order: int
        note: str = ""

    class Paid(Event, topic="{topic}.paid"):
        order: int
        place: Place = Place()

    class Heard(Event, topic="{topic}.heard", unrouted="drop"):
        order: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(placed: Placed, tx: Tx) -> Paid | None: ...

    @bus.every(60)
    async def hear() -> Heard | None: ...
"""


class Shop:
    """A bus whose one queue is there."""

    def __init__(self, project: Project, url: str) -> None:
        self.project = project
        self.url = url
        self.topic = f"orders-{secrets.token_hex(4)}.placed"
        self.group = f"shop-{secrets.token_hex(4)}"
        self.queue = f"{self.group}.{self.topic}"
        project.write(SHOP.format(topic=self.topic, group=self.group))
        project.environment |= {"ORDERBUS_BROKER_URL": url, "ORDERBUS_DATABASE_URL": "memory://", "COLUMNS": "300"}

    def publish(self, *arguments: str, stdin: str = "") -> Result:
        command = ["publish", self.project.bus, *arguments]
        result = CliRunner().invoke(app, command, input=stdin, env=self.project.environment)
        assert "Traceback" not in result.output
        return result

    def taken(self, most: int = 1000) -> list[Incoming]:
        """All that is in the queue, taken out of it."""

        async def take() -> list[Incoming]:
            found: list[Incoming] = []
            async with open_broker(self.url, name="tests") as broker:
                count = await broker.depth(self.queue)
                async with broker.subscribe(self.queue, prefetch=100) as subscription:
                    while len(found) < count:
                        for delivery in await subscription.receive():
                            found.append(delivery)
                            subscription.settle(delivery, Settlement.ACK)
                    await subscription.flush()
            return found

        return anyio.run(take)


@pytest.fixture
def shop(project: Project, vhost_url: str) -> Iterator[Shop]:
    shop = Shop(project, vhost_url)

    async def declare(broker: Broker) -> None:
        await broker.apply(topology_for([QueueNeed(shop.queue, (shop.topic,))]))

    async def run(work: Any) -> None:
        async with open_broker(vhost_url, name="tests") as broker:
            await work(broker)

    anyio.run(run, declare)
    yield shop
    anyio.run(run, lambda broker: delete_queues(broker, shop.queue, f"{shop.queue}.dlq"))


@pytest.mark.servers
def test_an_event_arrives_as_a_bus_would_have_sent_it(shop: Shop) -> None:
    result = shop.publish(shop.topic, '{"order": 7, "note": "by hand"}')
    assert result.exit_code == 0, result.output
    [message] = shop.taken()
    assert message.body == b'{"order":7,"note":"by hand"}'
    assert message.properties.type == shop.topic
    assert message.properties.headers == {"ob-key": "7", "ob-version": "2"}
    assert result.stdout == f"published: {message.properties.message_id} {shop.topic}\n"
    audit = json.loads(result.stderr)
    assert (audit["audit"], audit["outcome"], audit["key"], audit["id"]) == (
        "publish",
        "published",
        "7",
        message.properties.message_id,
    )


@pytest.mark.servers
def test_every_line_of_stdin_is_an_event_and_they_arrive_in_their_order(shop: Shop) -> None:
    lines = "\n\n".join(f'{{"order": {n}}}' for n in range(600)) + "\n"
    result = shop.publish(shop.topic, "-", "--json", stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert [json.loads(message.body)["order"] for message in shop.taken()] == list(range(600))
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["key"] for line in printed] == [str(n) for n in range(600)]
    assert {line["event"] for line in printed} == {"published"}


@pytest.mark.servers
def test_one_wrong_line_among_others_sends_nothing(shop: Shop) -> None:
    result = shop.publish(shop.topic, "-", stdin='{"order": 1}\n\n{"order": "x"}\n')
    assert result.exit_code == 2
    wrong = "orderbus: line 3: the body is not a Placed: Expected `int`, got `str` - at `$.order`; nothing was sent [OB615: "
    assert result.stderr.startswith(wrong)
    assert shop.taken() == []


@pytest.mark.servers
def test_a_dry_run_sends_nothing(shop: Shop) -> None:
    result = shop.publish(shop.topic, '{"order": 7}', "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("would-publish: ")
    assert shop.taken() == []


@pytest.mark.servers
def test_an_event_that_nobody_is_bound_to_is_a_finding_unless_its_class_lets_it_go(shop: Shop) -> None:
    result = shop.publish(f"{shop.topic}.paid", '{"order": 7}')
    assert result.exit_code == 1
    assert result.stdout.startswith("unroutable: ")
    assert f"no queue is bound to '{shop.topic}.paid'" in result.stderr
    assert shop.publish(f"{shop.topic}.heard", '{"order": 7}').exit_code == 0


@pytest.mark.servers
def test_it_is_signed_where_the_bus_signs(shop: Shop) -> None:
    shop.project.environment["ORDERBUS_SIGNING_KEYS"] = "k1:MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
    assert shop.publish(shop.topic, '{"order": 7}').exit_code == 0
    [message] = shop.taken()
    assert str(message.properties.headers["ob-signature"]).startswith("k1:")


def test_the_example_of_the_help_works_as_it_is(project: Project) -> None:
    arguments = shlex.split(EXAMPLE.partition("orderbus ")[2])
    result = project.run(*arguments, "--dry-run")
    assert result.exit_code == 0, result.stderr


@pytest.mark.servers
def test_what_was_under_way_when_somebody_interrupted_it_is_said_to_be_unknown(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orderbus.cli.publish.publish_rows", interrupted)
    result = shop.publish(shop.topic, '{"order": 1}', "--json", "--audit", "audit")
    assert result.exit_code != 0
    assert json.loads(result.stdout)["event"] == "unknown"
    assert json.loads(Path("audit").read_text())["outcome"] == "unknown"


# Bad input


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["shop.place", "{}"], "", "neither consumes nor returns an event of the topic 'shop.place'; did you mean shop.placed?"),
        (["xxx", "{}"], "", "of the topic 'xxx'; there are shop.placed, shop.placed.heard, shop.placed.paid"),
        (["shop.placed", "{}"], "", "the body is not a Placed: Object missing required field `order`"),
        (["shop.placed", "[]"], "", "the body is not a Placed: Expected `object`, got `array`"),
        (["shop.placed", "order=7"], "", "the body can't be read as application/json: JSON is malformed"),
        (["shop.placed", '{"order": 1, "notes": ""}'], "", "Placed has no field 'notes'; did you mean note?"),
        (["shop.placed", '{"order": 1, "xxxxx": ""}'], "", "Placed has no field 'xxxxx'; there are order, note"),
        (
            ["shop.placed.paid", '{"order": 1, "place": {"twon": ""}}'],
            "",
            "Paid has no field for $.place.twon, which readers would ignore",
        ),
        (["shop.placed", '{"order": 1, "note": "' + "x" * 2000 + '"}'], "", "the limit is 1024"),
        (["shop.placed", "-"], '{"order": 1}\n' + "x" * 2000, "line 2: the body is 1026 bytes; the limit is 1024"),
        (["shop.placed", "-"], "\n \n", "stdin has no line with an event"),
        (["shop.placed", '{"order": 1}'], "", "its queues live inside the process that runs the bus"),
        (["shop.placed", '{"order":' + "[" * 900], "", "the body is not a Placed: Expected `int`, got `array`"),
        (["shop.placed"], "", "Missing argument 'BODY'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_can_not_be_published(project: Project, arguments: list[str], stdin: str, says: str) -> None:
    project.write(SHOP.format(topic="shop.placed", group="shop"))
    project.environment |= {"COLUMNS": "300", "ORDERBUS_MAX_BODY_BYTES": "1024"}
    result = CliRunner().invoke(app, ["publish", project.bus, *arguments], input=stdin, env=project.environment)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_more_events_than_are_held_in_memory_are_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderbus.cli.publish.MOST_EVENTS", 2)
    project.write(SHOP.format(topic="shop.placed", group="shop"))
    result = CliRunner().invoke(
        app, ["publish", project.bus, "shop.placed", "-"], input='{"order": 1}\n' * 3, env=project.environment
    )
    assert (result.exit_code, result.stdout) == (2, "")
    assert "stdin has more than 2 events" in result.stderr


def test_a_broker_that_is_away(project: Project) -> None:
    project.write(SHOP.format(topic="shop.placed", group="shop"))
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    result = project.run("publish", project.bus, "shop.placed", '{"order": 1}')
    assert (result.exit_code, result.stdout) == (4, "")
    assert "can't connect to RabbitMQ at" in result.stderr
    assert "secret" not in result.output


@pytest.mark.servers
def test_a_vhost_where_nothing_was_declared(project: Project, rabbit: Any) -> None:
    project.write(SHOP.format(topic="shop.placed", group="shop"))
    with rabbit.vhost(f"orderbus-test-{secrets.token_hex(4)}") as url:
        project.environment["ORDERBUS_BROKER_URL"] = url
        result = project.run("publish", project.bus, "shop.placed", '{"order": 1}')
    assert result.exit_code == 1, result.output
    assert "no queue is bound to 'shop.placed'" in result.stderr
    assert "Traceback" not in result.output
