"""`orderbus messages`: samples are written once, and a change that they would not survive is found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cli.conftest import Project

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed", key="order_id"):
        order_id: int
        cents: int

    class Paid(Event, topic="orders.paid", key="order_id"):
        order_id: int

    class Noted(Event, topic="orders.noted"):
        text: str

    bus = Bus("shop")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> Paid:
        tx.emit(Noted(text="paid"))
        return Paid(order_id=order.order_id)
"""


@pytest.fixture
def shop(project: Project) -> Project:
    """A project with samples of its events."""
    project.write(SHOP)
    assert project.run("messages", "write", "samples", project.bus).exit_code == 0
    return project


def checked(project: Project, old: str = "", new: str = "") -> tuple[int, list[dict[str, Any]]]:
    """The findings after a change of the code: a module of another name, for Python does not import one twice."""
    project.write(SHOP.replace(old, new), module=f"{project.module}_changed")
    result = project.run("messages", "check", "samples", f"{project.module}_changed:bus", "--json")
    assert "Traceback" not in result.output
    looked = [json.loads(line) for line in result.stdout.splitlines()]
    return result.exit_code, [one for one in looked if one["status"] == "finding"]


def test_each_event_that_a_bus_takes_returns_or_names_has_samples(shop: Project) -> None:
    files = sorted(path.name for path in (shop.folder / "samples").iterdir())

    assert files == ["orders.noted.v1.json", "orders.paid.v1.json", "orders.placed.v1.json"]
    assert json.loads((shop.folder / "samples" / files[2]).read_text()) == {
        "topic": "orders.placed",
        "version": 1,
        "samples": [{"body": {"order_id": 7, "cents": 7}, "key": "7"}],
    }


def test_without_a_change_nothing_is_found_and_nothing_is_written_again(shop: Project) -> None:
    before = {path: path.read_bytes() for path in (shop.folder / "samples").iterdir()}

    again = shop.run("messages", "write", "samples", shop.bus)

    assert again.exit_code == 0
    assert "nothing new" in again.output
    assert {path: path.read_bytes() for path in (shop.folder / "samples").iterdir()} == before
    assert checked(shop) == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("cents: int", "total: int", "missing required field `total`"),
        ("cents: int", "total: int = 0", "`$.cents` of old messages would be ignored: Placed has no such field"),
        ("cents: int", "cents: str", "Expected `str`, got `int` - at `$.cents`"),
        ('placed", key="order_id"', 'placed", key="cents"', "its key is '500' now, by cents, and was '7'"),
        ('topic="orders.placed"', 'topic="orders.made"', "no event class of these buses has the topic 'orders.placed'"),
        (
            "cents: int",
            "cents: int\n        note: str | None = None",
            "no sample has `note`; `orderbus messages write` adds some",
        ),
        ('topic="orders.placed"', 'topic="orders.placed", version=2', "there is no sample of it"),
    ],
)
def test_a_change_that_old_messages_would_not_survive_names_its_field(shop: Project, old: str, new: str, said: str) -> None:
    (shop.folder / "samples" / "orders.placed.v1.json").write_text(
        '{"topic": "orders.placed", "version": 1, "samples": [{"body": {"order_id": 7, "cents": 500}, "key": "7"}]}'
    )

    code, found = checked(shop, old, new)

    assert code == 1
    assert said in found[0]["text"]


def test_a_field_that_was_added_is_in_the_samples_after_the_next_write(shop: Project) -> None:
    checked(shop, "cents: int", "cents: int\n        note: str | None = None")
    written = shop.run("messages", "write", "samples", f"{shop.module}_changed:bus")
    result = shop.run("messages", "check", "samples", f"{shop.module}_changed:bus")

    assert "2 samples added to samples/orders.placed.v1.json" in " ".join(written.output.split())
    assert result.exit_code == 0
    assert "3 samples can be read as Placed" in " ".join(result.output.split())


def test_two_services_classes_for_one_topic_may_leave_out_what_the_other_reads(shop: Project) -> None:
    reader = SHOP.replace('Bus("shop")', 'Bus("reader")').replace("        cents: int\n", "")
    shop.write(reader, module=f"{shop.module}_reader")
    buses = (shop.bus, f"{shop.module}_reader:bus")

    assert shop.run("messages", "write", "samples", *buses).exit_code == 0
    assert shop.run("messages", "check", "samples", *buses).exit_code == 0


def test_what_can_not_be_made_up_is_asked_for(project: Project) -> None:
    annotated = "from typing import Annotated\n    from msgspec import Meta\n    from orderbus import"
    licensed = r'cents: Annotated[str, Meta(pattern=r"^\d{9}[QX]$")]'
    project.write(SHOP.replace("from orderbus import", annotated, 1).replace("cents: int", licensed))

    result = project.run("messages", "write", "samples", project.bus, "--json")
    found = [one for one in map(json.loads, result.stdout.splitlines()) if one["status"] == "finding"]

    assert result.exit_code == 1
    assert "Placed.cents: no text can be made up" in found[0]["text"]
    assert "write one by hand into samples/orders.placed.v1.json" in found[0]["text"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no folder samples; make the samples with"),
        ("{", "is no file of samples"),
        ('{"topic": 1}', "is no file of samples"),
    ],
)
def test_wrong_use_says_what_to_do(project: Project, content: str | None, said: str) -> None:
    project.write(SHOP)
    if content is not None:
        (project.folder / "samples").mkdir()
        (project.folder / "samples" / "x.json").write_text(content)

    result = project.run("messages", "check", "samples", project.bus)

    assert result.exit_code == 2
    assert said in result.stderr


def test_a_file_in_the_folders_place_is_wrong_use(project: Project) -> None:
    project.write(SHOP)
    (project.folder / "samples").write_text("")

    result = project.run("messages", "write", "samples", project.bus)

    assert result.exit_code == 2
    assert "the samples can't be written" in result.stderr
