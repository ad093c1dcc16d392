"""`orderbus dlq` on a real RabbitMQ."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

import anyio
import pytest

from orderbus import new_id
from orderbus._core.leaving import ERROR, ERROR_TEXT, HANDLER, PARKED_AT, QUEUE, RAW_PROPERTIES, REASON
from orderbus._core.message import ATTEMPT, NO_HEADERS, Headers, Outgoing, Receipt, Settlement
from orderbus._core.topology import QueueNeed, topology_for
from orderbus.abc import Broker
from orderbus.adapters.rabbitmq import open_broker
from tests.cli.conftest import LIMIT_S, Project, delete_queues

T = TypeVar("T")

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed"):
        n: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None: ...
"""


class Letters:
    """A bus of the project with dead letters in its queue."""

    def __init__(self, url: str, group: str) -> None:
        self.url = url
        self.queue = f"{group}.orders.placed"
        self.dlq = f"{self.queue}.dlq"

    def park(self, count: int = 1, headers: Headers = NO_HEADERS, *, body: bytes = b'{"n":1}') -> list[str]:
        marks = {REASON: "broken", QUEUE: self.queue, ATTEMPT: 8, PARKED_AT: 1_700_000_000.0, **headers}
        letters = [Outgoing("", self.dlq, body, str(new_id()), "orders.placed", headers=marks) for _ in range(count)]

        async def publish(broker: Broker) -> None:
            assert set(await broker.publish(letters)) == {Receipt.CONFIRMED}

        self.on_broker(publish)
        return [letter.message_id for letter in letters]

    def depths(self) -> tuple[int, int]:
        async def ask(broker: Broker) -> tuple[int, int]:
            return await broker.depth(self.queue), await broker.depth(self.dlq)

        return self.on_broker(ask)

    def settled_at(self, ready: int, parked: int) -> None:
        """Until the queues have so many: a quorum queue takes back what was held a moment after the channel is closed."""

        async def wait(broker: Broker) -> None:
            while (await broker.depth(self.queue), await broker.depth(self.dlq)) != (ready, parked):
                pass

        self.on_broker(wait)

    def taken(self, queue: str) -> list[str | None]:
        """The ids of all that is in a queue, taken out of it."""

        async def take(broker: Broker) -> list[str | None]:
            count, ids = await broker.depth(queue), list[str | None]()
            async with broker.subscribe(queue, prefetch=100) as subscription:
                while len(ids) < count:
                    for delivery in await subscription.receive():
                        ids.append(delivery.properties.message_id)
                        subscription.settle(delivery, Settlement.ACK)
                await subscription.flush()
            return ids

        return self.on_broker(take)

    def on_broker(self, work: Callable[[Broker], Awaitable[T]]) -> T:
        async def run() -> T:
            with anyio.fail_after(LIMIT_S):
                async with open_broker(self.url, name="tests") as broker:
                    return await work(broker)

        return anyio.run(run)


@pytest.fixture
def letters(project: Project, vhost_url: str) -> Iterator[Letters]:
    group = f"shop-{secrets.token_hex(4)}"
    project.write(SHOP.format(group=group))
    project.environment["ORDERBUS_BROKER_URL"] = vhost_url
    found = Letters(vhost_url, group)

    async def declare(broker: Broker) -> None:
        await broker.apply(topology_for([QueueNeed(found.queue, ("orders.placed",))]))

    found.on_broker(declare)
    yield found
    found.on_broker(lambda broker: delete_queues(broker, found.queue, found.dlq))


def lines(project: Project, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    result = project.run("dlq", *arguments, "--json")
    assert result.exit_code == code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def ids(found: Sequence[dict[str, Any]]) -> list[str]:
    return [one["id"] for one in found]


@pytest.mark.servers
class TestList:
    def test_a_bus_or_a_queue_names_the_letters(self, project: Project, letters: Letters) -> None:
        parked = letters.park(3, {ERROR: "ValueError", ERROR_TEXT: "no", HANDLER: "shop.pay"})
        for target in ([project.bus], [letters.queue], ["--queue", letters.dlq]):
            found = lines(project, "list", *target)
            assert ids(found) == parked
            letters.settled_at(0, 3)
        assert found[0] | {"id": None} == {
            "event": "dead-letter",
            "id": None,
            "queue": letters.dlq,
            "origin": letters.queue,
            "reason": "broken",
            "error": "ValueError",
            "error_text": "no",
            "handler": "shop.pay",
            "topic": "orders.placed",
            "key": None,
            "attempts": 8,
            "first_failed_at": None,
            "parked_at": "2023-11-14T22:13:20.000+00:00",
            "size_bytes": 7,
            "readable": True,
        }

    @pytest.mark.parametrize(
        "choice",
        [
            ["--reason", "ra*"],
            ["--error", "KeyError"],
            ["--handler", "shop.rare"],
            ["--since", "2023-11-14T22:13:21+00:00"],
            ["--since", "3650d", "--reason", "rare"],
        ],
        ids=" ".join,
    )
    def test_filters(self, project: Project, letters: Letters, choice: list[str]) -> None:
        letters.park(5, {ERROR: "ValueError", HANDLER: "shop.pay"})
        rare = letters.park(1, {REASON: "rare", ERROR: "KeyError", HANDLER: "shop.rare", PARKED_AT: 1_700_000_002.0})
        assert ids(lines(project, "list", project.bus, *choice)) == rare

    def test_what_was_not_looked_at_is_said(self, project: Project, letters: Letters) -> None:
        letters.park(5)
        result = project.run("dlq", "list", letters.queue, "--hold", "2")
        assert "2 of 5 letters were looked at; raise --hold" in result.stderr

    @pytest.mark.parametrize("columns", [50, 80])
    def test_the_listing_fits_the_terminal_and_can_not_command_it(self, project: Project, letters: Letters, columns: int) -> None:
        (parked,) = letters.park(1, {REASON: "\x1b]0;pwned\x07", ERROR: "ValueError", ERROR_TEXT: "[red]long[/red]\n" * 50})
        project.environment["COLUMNS"] = str(columns)
        text = project.run("dlq", "list", letters.queue).stdout
        assert max(map(len, text.splitlines())) <= columns
        assert parked in text
        assert "\x1b" not in text
        assert "\x07" not in text


@pytest.mark.servers
class TestShow:
    def test_everything_is_shown(self, project: Project, letters: Letters) -> None:
        letters.park(3)
        (parked,) = letters.park(1, {ERROR: "ValueError", "mine": "kept"}, body=b'{"n":[1,2]}')
        (shown,) = lines(project, "show", parked, project.bus)
        assert shown["id"] == parked
        assert shown["body"] == '{"n":[1,2]}'
        assert shown["headers"]["mine"] == "kept"
        letters.settled_at(0, 4)
        text = project.run("dlq", "show", parked, project.bus).stdout
        assert '"n": [' in text
        assert "mine: 'kept'" in text
        letters.settled_at(0, 4)

    def test_a_letter_nobody_could_read_is_shown_with_its_bytes(self, project: Project, letters: Letters) -> None:
        (parked,) = letters.park(1, {RAW_PROPERTIES: b"\x00\x80\x02\xff\xfe"}, body=b"\xff\x00\x1b[31m")
        (shown,) = lines(project, "show", parked, letters.queue)
        assert (shown["readable"], shown["body"]) == (False, None)
        assert base64.b64decode(shown["body_base64"]) == b"\xff\x00\x1b[31m"
        assert base64.b64decode(shown["raw_properties_base64"]) == b"\x00\x80\x02\xff\xfe"
        letters.settled_at(0, 1)
        assert "ff 00 1b" in project.run("dlq", "show", parked, letters.queue).stdout

    def test_an_unknown_event(self, project: Project, letters: Letters) -> None:
        letters.park(1)
        result = project.run("dlq", "show", str(new_id()), letters.queue)
        assert result.exit_code == 1
        assert f"in {letters.dlq}" in result.stderr


@pytest.mark.servers
class TestReplay:
    def test_the_chosen_go_back(self, project: Project, letters: Letters) -> None:
        letters.park(2)
        chosen = letters.park(2, {REASON: "rare"})
        *told, done = lines(project, "replay", project.bus, "--reason", "rare", "--yes")
        assert [(one["event"], one["id"], one["to"]) for one in told] == [("replayed", one, letters.queue) for one in chosen]
        assert (done["event"], done["replayed"], done["ready"]) == ("done", 2, 4)
        letters.settled_at(2, 2)
        assert letters.taken(letters.queue) == chosen

    def test_a_dry_run_moves_nothing(self, project: Project, letters: Letters) -> None:
        parked = letters.park(2)
        *told, done = lines(project, "replay", letters.queue, "--all", "--dry-run")
        assert [(one["event"], one["id"]) for one in told] == [("would-replay", one) for one in parked]
        assert done["replayed"] == 0
        letters.settled_at(0, 2)

    def test_all_must_be_said(self, project: Project, letters: Letters) -> None:
        letters.park(1)
        for arguments in ([], ["--all", "--reason", "x"]):
            result = project.run("dlq", "replay", letters.queue, *arguments)
            assert result.exit_code == 2
            assert "or --all" in result.stderr
        assert letters.depths() == (0, 1)

    def test_a_letter_nobody_could_read_is_refused_with_the_reason(self, project: Project, letters: Letters) -> None:
        letters.park(1, {RAW_PROPERTIES: b"\x00"})
        letters.park(1)
        result = project.run("dlq", "replay", letters.queue, "--all", "--yes")
        assert result.exit_code == 1
        assert "its properties could not be read" in result.stdout
        assert "1 replayed, 1 refused" in result.stdout
        letters.settled_at(1, 1)

    def test_a_replay_that_is_killed_in_the_middle_loses_nothing(self, project: Project, letters: Letters) -> None:
        parked = letters.park(60)
        process = project.start("dlq", "replay", letters.queue, "--all", "--yes", "--rate", "50/s", "--json")
        assert process.stdout is not None
        for _ in range(7):
            assert json.loads(process.stdout.readline())["event"] == "replayed"
        process.kill()
        process.wait(LIMIT_S)
        back: list[str | None] = []
        for _ in range(100):  # what the dead process held comes back when the broker has noticed
            assert lines(project, "replay", letters.queue, "--all", "--yes")[-1]["failed"] == 0
            back += letters.taken(letters.queue)
            if set(back) == set(parked):
                break
        assert set(back) == set(parked)
        assert len(back) - len(parked) <= 5  # one batch may have been published and not acknowledged


# Without a server


def test_a_memory_broker_is_out_of_reach(project: Project) -> None:
    result = project.run("dlq", "list", "shop.orders")
    assert result.exit_code == 2
    assert "live inside the process that runs the bus" in result.stderr


def test_something_must_be_named(project: Project) -> None:
    result = project.run("dlq", "list")
    assert result.exit_code == 2
    assert "name a bus as MODULE:BUS" in result.stderr


def test_a_broker_that_is_away(project: Project) -> None:
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    result = project.run("dlq", "list", "shop.orders")
    assert result.exit_code == 4
    assert "secret" not in result.output


@pytest.mark.parametrize(
    "arguments", [["--since", "yesterday"], ["--before", "5 m"], ["--hold", "0"], ["--limit", "0"]], ids=" ".join
)
def test_what_can_not_be_read_is_refused(project: Project, arguments: list[str]) -> None:
    assert project.run("dlq", "list", "shop.orders", *arguments).exit_code == 2


@pytest.mark.parametrize("rate", ["0", "fast", "-1/s", "5/d"])
def test_a_rate_that_can_not_be_read_is_refused(project: Project, rate: str) -> None:
    assert project.run("dlq", "replay", "shop.orders", "--all", "--rate", rate).exit_code == 2
