"""`orderbus explain` on real servers: each place says what it knows of an event, and what it can't know."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import anyio
import pytest

from orderbus import new_id
from orderbus._core.leaving import ERROR, ERROR_TEXT, PARKED_AT, QUEUE, REASON
from orderbus._core.message import ATTEMPT, Outgoing, Receipt
from orderbus._core.topology import QueueNeed, topology_for
from orderbus.abc import InboxEntry
from orderbus.adapters.postgres import open_store
from orderbus.adapters.rabbitmq import open_broker
from orderbus.adapters.redis import open_claims
from tests.cli.conftest import LIMIT_S, Project, delete_queues, stranger
from tests.cli.test_outbox import Outbox

pytestmark = pytest.mark.servers

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed"):
        n: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None: ...

    @bus.on(Placed, name="mail", guard="claims")
    async def mail(order: Placed) -> None: ...
"""


class Story:
    """A project with a bus, and places in which an event can be put."""

    def __init__(self, project: Project, broker_url: str, outbox: Outbox, redis_url: str) -> None:
        self.project = project
        self.outbox = outbox
        self.group = f"shop-{secrets.token_hex(4)}"
        self.queue = f"{self.group}.orders.placed"
        self.broker_url = broker_url
        self.redis_url = redis_url
        project.write(SHOP.format(group=self.group))
        project.environment |= {
            "ORDERBUS_BROKER_URL": broker_url,
            "ORDERBUS_REDIS_URL": redis_url,
            "ORDERBUS_REDIS_PREFIX": f"{self.group}:",
        }
        topics = ("orders.placed",)
        self.topology = topology_for([QueueNeed(self.queue, topics), QueueNeed(f"{self.group}.mail", topics)])

    def on_servers(self, work: Any) -> None:
        async def run() -> None:
            with anyio.fail_after(LIMIT_S):
                async with (
                    open_broker(self.broker_url, name="tests") as broker,
                    open_store(self.outbox.url, name="tests") as store,
                    open_claims(self.redis_url, prefix=f"{self.group}:") as claims,
                ):
                    await broker.apply(self.topology)
                    await work(broker, store, claims)

        anyio.run(run)

    def told(self, event_id: UUID, *, code: int) -> dict[str, list[tuple[str, str]]]:
        """What each place says."""
        result = self.project.run("explain", str(event_id), self.project.bus, "--json")
        assert result.exit_code == code, result.output
        first, *facts = [json.loads(line) for line in result.stdout.splitlines()]
        assert (first["event"], first["id"]) == ("explained", str(event_id))
        places: dict[str, list[tuple[str, str]]] = {}
        for fact in facts:
            places.setdefault(fact["place"], []).append((fact["status"], fact["text"]))
        return places


@pytest.fixture
def story(project: Project, vhost_url: str, database_url: str, redis_url: str) -> Iterator[Story]:
    outbox = Outbox(database_url)
    outbox.on_store(outbox.fill)
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    story = Story(project, vhost_url, outbox, redis_url)
    yield story

    async def delete(broker: Any, store: Any, claims: Any) -> None:
        await delete_queues(broker, *(f"{queue}{end}" for queue in (story.queue, f"{story.group}.mail") for end in ("", ".dlq")))

    story.on_servers(delete)


def test_an_event_that_nobody_knows(story: Story) -> None:
    async def nothing(broker: Any, store: Any, claims: Any) -> None: ...

    story.on_servers(nothing)
    told = story.told(new_id(), code=1)
    assert told["outbox"] == [("absent", "published and deleted, discarded, or never emitted")]
    assert told["inbox"] == [("absent", f"not handled by {story.queue}, or longer ago than the inbox remembers")]
    assert [status for status, _ in told["dead letters"]] == ["absent", "absent", "absent"]
    assert told[f"claim of {story.group}.mail"] == [("absent", "none: not handled, or longer ago than it is kept")]
    assert told[f"queue {story.queue}"] == [("absent", "nothing is ready in it")]


def test_stuck_and_behind_and_scheduled_and_waiting(story: Story) -> None:
    outbox = story.outbox
    for event_id, begins in (
        (outbox.stuck[0], "stuck: unroutable since 20"),
        (outbox.stuck[1], f"stuck behind event {outbox.stuck[0]} of its key (orders.placed, key k)"),
        (outbox.scheduled, "scheduled for 2096-10-02T07:06:40.000+00:00 (orders.placed, key k)"),
        (outbox.waiting, "waits for the relay (orders.paid, key other, bucket 7)"),
    ):
        [(status, text)] = story.told(event_id, code=0)["outbox"]
        assert (status, text[: len(begins)]) == ("found", begins)


def test_handled_by_one_and_parked_by_another(story: Story) -> None:
    event_id = new_id()
    marks = {REASON: "retries-exhausted", ERROR: "ValueError", ERROR_TEXT: "no", ATTEMPT: 8, PARKED_AT: 1_700_000_000.0}
    mail = f"{story.group}.mail"

    async def happen(broker: Any, store: Any, claims: Any) -> None:
        transaction = await store.begin([InboxEntry(event_id, story.queue, 1)])
        await transaction.commit([], [])
        letter = Outgoing("", f"{mail}.dlq", b"{}", str(event_id), "orders.placed", headers={**marks, QUEUE: mail})
        other = Outgoing("", story.queue, b"{}", str(new_id()), "orders.placed")
        assert set(await broker.publish([letter, other])) == {Receipt.CONFIRMED}
        await claims.claim([(f"inbox:{mail}:{event_id}", "f")], "token", 60_000)
        await claims.complete([(f"inbox:{mail}:{event_id}", b"")], "token", 3_600_000)

    story.on_servers(happen)
    told = story.told(event_id, code=0)
    assert told["inbox"][0][0] == "found"
    assert told["inbox"][0][1].startswith(f"handled by {story.queue} at 20")
    assert [text for status, text in told["dead letters"] if status == "found"] == [
        f"parked in {mail}.dlq at 2023-11-14T22:13:20.000+00:00 for 'retries-exhausted' after 8 tries: ValueError: no"
    ]
    assert told[f"queue {story.queue}"] == [
        ("unknown", "1 ready; whether it is one of them can't be seen without taking it from its consumer")
    ]
    assert told[f"claim of {mail}"][0][1].startswith("handled; kept for another 3")
    text = story.project.run("explain", str(event_id), story.project.bus).stdout
    assert f"handled by {story.queue}" in " ".join(text.split())


def test_a_server_that_is_away_is_said_and_the_others_answer(story: Story) -> None:
    story.project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    story.project.environment["ORDERBUS_REDIS_URL"] = "redis://127.0.0.1:1/"
    told = story.told(story.outbox.waiting, code=4)
    assert told["outbox"][0][0] == "found"
    [(status, text)] = told["broker amqp://someone:***@127.0.0.1:1/"]
    assert (status, "127.0.0.1:1" in text, "secret" in text) == ("away", True, False)
    assert told[f"claim of {story.group}.mail"][0][0] == "away"


def test_a_place_that_may_not_be_read_is_refused_and_the_others_answer(story: Story) -> None:
    with stranger(story.project.environment["ORDERBUS_DATABASE_URL"]) as (_, url):
        story.project.environment["ORDERBUS_DATABASE_URL"] = url
        told = story.told(story.outbox.waiting, code=2)
    [(status, text)] = next(facts for place, facts in told.items() if place.startswith("database "))
    assert (status, "permission denied for schema orderbus" in text) == ("refused", True)
    assert told[f"queue {story.queue}"]
