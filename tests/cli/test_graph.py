"""`orderbus describe --format`: who sends what to whom, for people, for Mermaid, and as a valid AsyncAPI document."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from orderbus.cli.asyncapi import asyncapi
from orderbus.cli.loading import load_buses
from services.shared.events import Line, OrderPlaced
from tests.cli.conftest import Project

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed", key="order_id", version=2):
        '''An order that was accepted.'''

        order_id: str
        point: tuple[int, str] = (0, "")

    class Paid(Event, topic="orders.paid"):
        order_id: str

    bus = Bus("shop", format="msgpack")
    audit = Bus("audit-log")

    @bus.every(60)
    async def place() -> Placed | None: ...

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> Paid | None: ...

    @audit.on(Placed, name="log")
    async def log(order: Placed, tx: Tx) -> None: ...

    @audit.on(Placed, name="count")
    async def count(order: Placed, tx: Tx) -> None: ...
"""
SERVICES = [f"services.{name}:bus" for name in ("payment", "inventory", "aggregator", "notification")]
SCHEMA = json.loads(gzip.decompress(Path(__file__).with_name("asyncapi").joinpath("schema-3.0.0.json.gz").read_bytes()))


@pytest.fixture
def targets(project: Project) -> list[str]:
    project.write(SHOP)
    del project.environment["ORDERBUS_BROKER_URL"]
    return [project.bus, f"{project.module}:audit"]


def document(project: Project, *targets: str) -> dict[str, Any]:
    result = project.run("describe", *targets, "--format", "asyncapi")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_chart_has_each_group_each_event_and_each_way(project: Project, targets: list[str]) -> None:
    assert project.run("describe", *targets, "--format", "mermaid").stdout.splitlines() == [
        "flowchart LR",
        '    g0["shop"]',
        '    g1["audit-log"]',
        '    e0(["Paid<br>orders.paid v1"])',
        "    g0 --> e0",
        '    e1(["Placed<br>orders.placed v2"])',
        "    g0 --> e1",
        '    e1 -->|"pay"| g0',
        '    e1 -->|"log<br>count"| g1',
    ]


def test_a_name_with_signs_that_mermaid_reads_is_escaped(project: Project) -> None:
    project.write(
        """
        from orderbus import Bus, Event
        class E(Event, topic="e"):
            n: int
        bus = Bus("shop")
        def made():
            @bus.on(E, guard="none")
            async def handle(event: E) -> None: ...
        made()
        """
    )
    assert '|"made.&lt;locals&gt;.handle"|' in project.run("describe", project.bus, "--format", "mermaid").stdout


OWN = """
    from orderbus import Bus, Event, Tx

    class {name}(Event, topic="orders.placed", version={version}):
        order_id: str

    bus = Bus("{group}")

    @bus.{registered}
    async def {function}: ...
"""


def test_groups_that_each_have_a_class_of_their_own_for_an_event_are_joined_by_its_topic(project: Project) -> None:
    sends = {"registered": "every(60)", "function": "place() -> Placed | None"}
    reads = {"registered": "on(Order)", "function": "pay(order: Order, tx: Tx) -> None"}
    project.write(OWN.format(name="Placed", version=2, group="shop", **sends), "own_shop")
    project.write(OWN.format(name="Order", version=1, group="payment", **reads), "own_payment")
    buses = ["own_shop:bus", "own_payment:bus"]
    assert project.run("describe", *buses, "--format", "mermaid").stdout.splitlines()[3:] == [
        '    e0(["Order, Placed<br>orders.placed v1, v2"])',
        "    g0 --> e0",
        '    e0 -->|"pay"| g1',
    ]
    rows = [line.split() for line in project.run("describe", *buses).stdout.partition("who sends what to whom")[2].splitlines()]
    assert rows[-3:-1] == [["shop", "Order,", "Placed", "payment"], ["orders.placed", "v1,", "v2"]]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_tables_of_several_buses_end_with_who_sends_what_to_whom(project: Project, targets: list[str], columns: int) -> None:
    project.environment["COLUMNS"] = str(columns)
    text = project.run("describe", *targets).stdout
    assert max(map(len, text.splitlines())) <= columns
    rows = [line.split() for line in text.partition("who sends what to whom")[2].splitlines()]
    assert rows[-5:-1] == [
        ["shop", "Paid", "-"],
        ["orders.paid", "v1"],
        ["shop", "Placed", "shop"],
        ["orders.placed", "v2", "audit-log"],
    ]


def test_the_document_of_the_services_is_valid_by_the_official_schema(project: Project) -> None:
    found = document(project, *SERVICES)
    assert [str(error) for error in jsonschema_rs.validator_for(SCHEMA).iter_errors(found)] == []
    assert set(found["channels"]) >= {"orders.placed", "payments.authorized", "orders.cancelled"}
    assert found["operations"]["payment.orders.placed.receive.orders.placed"]["action"] == "receive"
    assert found["operations"]["payment.send.payments.declined"]["action"] == "send"


def test_the_document_says_topic_key_version_format_and_queue(project: Project, targets: list[str]) -> None:
    found = document(project, *targets)
    assert [str(error) for error in jsonschema_rs.validator_for(SCHEMA).iter_errors(found)] == []
    assert set(found["channels"]) == {"orders.placed", "orders.paid"}
    channel = found["channels"]["orders.placed"]
    assert channel["address"] == "orders.placed.{bucket}"
    assert channel["bindings"]["amqp"]["exchange"]["name"] == "ob.events"
    message = found["components"]["messages"]["Placed"]
    assert message["bindings"]["amqp"]["messageType"] == "orders.placed"
    assert message["contentType"] == "application/msgpack"
    assert set(message["headers"]["properties"]) == {"ob-key", "ob-version"}
    assert message["headers"]["properties"]["ob-version"]["const"] == "2"
    assert found["components"]["schemas"]["Placed"]["description"] == "An order that was accepted."
    assert set(found["operations"]) == {
        "shop.send.orders.placed",
        "shop.send.orders.paid",
        "shop.orders.placed.receive.orders.placed",
        "audit-log.log.receive.orders.placed",
        "audit-log.count.receive.orders.placed",
    }
    assert found["operations"]["audit-log.log.receive.orders.placed"]["summary"] == "log, from the queue audit-log.log"


def test_every_reference_in_the_document_is_there(project: Project) -> None:
    found = document(project, *SERVICES)

    def check(part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                there: Any = found
                for name in part["$ref"].removeprefix("#/").split("/"):
                    there = there[name]
            part = list(part.values())
        for one in part if isinstance(part, list) else []:
            check(one)

    check(found)


def test_a_real_message_is_valid_by_the_document_and_a_wrong_one_is_not(project: Project, targets: list[str]) -> None:
    found = document(project, *SERVICES)
    order = OrderPlaced(
        order_id="0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f",  # type: ignore[arg-type]
        customer_id="0199f3c2-7b1e-7cc3-98c4-dc0c0c07398f",  # type: ignore[arg-type]
        total_cents=7,
        lines=(Line(sku="a", quantity=1, unit_cents=7),),
    )
    body = msgspec.to_builtins(order)
    validator = jsonschema_rs.Draft7Validator({"$ref": "#/components/schemas/OrderPlaced", **found})
    assert [str(error) for error in validator.iter_errors(body)] == []
    assert not validator.is_valid(body | {"total_cents": "7"})

    tuples = jsonschema_rs.Draft7Validator({"$ref": "#/components/schemas/Placed", **document(project, *targets)})
    assert tuples.is_valid({"order_id": "a", "point": [1, "b"]})
    assert not tuples.is_valid({"order_id": "a", "point": ["b", 1]})
    assert not tuples.is_valid({"order_id": "a", "point": [1, "b", 2]})


def test_two_classes_of_one_name_are_told_apart(project: Project) -> None:
    for module, topic in (("one", "a"), ("two", "b")):
        project.write(
            f"""
            from orderbus import Bus, Event
            class Placed(Event, topic="{topic}.placed"):
                {topic}: int
            bus = Bus("{module}")
            @bus.on(Placed, guard="none")
            async def handle(event: Placed) -> None: ...
            """,
            f"{project.module}_{module}",
        )
    found = document(project, f"{project.module}_one:bus", f"{project.module}_two:bus")
    assert [str(error) for error in jsonschema_rs.validator_for(SCHEMA).iter_errors(found)] == []
    assert len(found["components"]["schemas"]) == 2


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "asyncapi", "--json"], "leave it out with --format asyncapi"),
        (["--format", "yaml"], "'yaml' is not one of 'table', 'mermaid', 'asyncapi'"),
    ],
    ids=" ".join,
)
def test_a_format_that_can_not_be(project: Project, targets: list[str], arguments: list[str], says: str) -> None:
    project.environment["COLUMNS"] = "200"
    result = project.run("describe", *targets, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


def test_a_type_that_json_schema_can_not_say_is_named(project: Project) -> None:
    project.write(
        """
        from orderbus import Bus, Event
        class E(Event, topic="e"):
            n: complex
        bus = Bus("shop")
        @bus.on(E, guard="none")
        async def handle(event: E) -> None: ...
        """
    )
    result = project.run("describe", project.bus, "--format", "asyncapi")
    assert result.exit_code == 2
    assert "can't be described by JSON Schema" in result.stderr
    assert "complex" in result.stderr


def test_a_bus_without_handlers_has_a_valid_document(project: Project) -> None:
    project.write('from orderbus import Bus\nbus = Bus("idle")')
    assert jsonschema_rs.validator_for(SCHEMA).is_valid(asyncapi(load_buses([project.bus])))
