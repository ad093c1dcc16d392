"""`orderbus describe`: everything a handler was given, for people and for programs."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Project

SHOP = """
    from collections.abc import AsyncIterator

    from orderbus import Batch, Bus, Event, Retry, Tx

    class Placed(Event, topic="orders.placed", key="order_id", version=2):
        order_id: str

    class Paid(Event, topic="orders.paid"):
        order_id: str

    class Mailer: ...

    bus = Bus("shop")

    @bus.resource
    async def mailer() -> AsyncIterator[Mailer]:
        yield Mailer()

    @bus.on(Placed, retry=Retry.fixed(2, attempts=5).never(ValueError), fuse=50, concurrency=4, timeout=7)
    async def pay(order: Placed, tx: Tx, mailer: Mailer) -> Paid | None: ...

    @bus.on(Paid, ordered=True, prefetch=33)
    async def follow(paid: Paid, tx: Tx) -> None: ...

    @bus.on_batch(Paid, most=20, name="totals", guard="none")
    async def totals(batch: Batch[Paid]) -> None: ...

    @bus.every(60, timeout=5)
    async def sweep(tx: Tx) -> None: ...
"""


def test_every_option_is_in_the_json(project: Project) -> None:
    project.write(SHOP)
    del project.environment["ORDERBUS_BROKER_URL"]
    result = project.run("describe", project.bus, "--json")
    assert result.exit_code == 0, result.stderr
    described = json.loads(result.stdout)
    pay, follow, totals = described["handlers"]
    assert described["group"] == "shop"
    assert described["periodics"] == [{"function": "sweep", "every_s": 60, "timeout_s": 5}]
    assert described["resources"] == ["Mailer"]
    assert pay | {"place": None, "retry": None} == {
        "name": "orders.placed",
        "function": "pay",
        "place": None,
        "events": [{"event": "Placed", "topic": "orders.placed", "version": 2}],
        "queue": "shop.orders.placed",
        "dead_letters": "shop.orders.placed.dlq",
        "batch": False,
        "ordered": False,
        "concurrency": 4,
        "fuse": 50,
        "prefetch": 400,
        "timeout_s": 7.0,
        "guard": "inbox, or claims without a database",
        "retry": None,
        "retry_brief": "5 tries",
        "emits": ["Paid"],
    }
    assert pay["place"] == f"{project.module}.py:{pay['place'].rpartition(':')[2]}"
    assert (follow["queue"], follow["ordered"], follow["prefetch"]) == ("shop.ordered", True, 33)
    assert (totals["batch"], totals["fuse"], totals["guard"], totals["queue"]) == (True, 20, "none", "shop.totals")


def test_the_guard_follows_from_the_settings(project: Project) -> None:
    project.write(SHOP)
    assert json.loads(project.run("describe", project.bus, "--json").stdout)["handlers"][0]["guard"] == "inbox"


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_table_fits_the_terminal_and_shows_the_policies(project: Project, columns: int) -> None:
    project.write(SHOP)
    project.environment["COLUMNS"] = str(columns)
    text = project.run("describe", project.bus).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert "group shop" in text
    assert "2 s, 2 s, 2 s, 2 s, parked" in text
    assert "every 60 s: sweep" in text
    assert "resources: Mailer" in text


def test_a_wrong_handler_is_one_message(project: Project) -> None:
    project.write(
        """
        from orderbus import Bus, Event, Tx
        class E(Event, topic="e"):
            n: int
        bus = Bus("shop")
        @bus.on(E)
        async def handle(event: "E", wrong: "Missing") -> None: ...
        """
    )
    result = project.run("describe", project.bus)
    assert result.exit_code == 2
    assert "its annotations name something that can't be found" in result.stderr
