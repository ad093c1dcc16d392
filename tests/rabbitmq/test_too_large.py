"""A broker that takes smaller messages than orderbus sends: it closes the channel, and only what is too large suffers for it."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from uuid import UUID

import anyio
import anyio.to_thread
import psycopg
import pytest

from orderbus import Bus, Event, Park, Settings
from orderbus._core.message import Incoming, Outgoing, Receipt, Settlement
from orderbus._runtime import leaving
from orderbus.adapters.rabbitmq import RabbitBroker, open_broker, publisher
from tests.databases import prepared_database
from tests.rabbitmq.conftest import Place
from tests.servers import Missing, Rabbit, start_rabbit

pytestmark = [pytest.mark.anyio, pytest.mark.servers]
LIMIT = 20_000
CONFIRMED, REFUSED, UNKNOWN = Receipt.CONFIRMED, Receipt.REFUSED, Receipt.UNKNOWN


class Noted(Event, topic=f"notes.{secrets.token_hex(4)}", key="n"):
    n: str
    text: str = ""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def strict_rabbit() -> Iterator[Rabbit]:
    with ExitStack() as stack:
        try:
            node = start_rabbit(stack, settings=f"max_message_size = {LIMIT}\n")
        except Missing as error:
            if os.environ.get("CI"):
                pytest.fail(f"a server is missing, and CI may not skip: {error}", pytrace=False)
            pytest.skip(f"SERVER MISSING: {error}")
        yield node


@pytest.fixture
def notes_url(postgres_url: str) -> Iterator[str]:
    with prepared_database(postgres_url, "too_large", "") as url:
        yield url


def message(place: Place, size: int, name: str = "m") -> Outgoing:
    return Outgoing(place.exchange, Place.key, b"x" * size, name, "test")


async def set_limit(rabbit: Rabbit, limit: int) -> None:
    """For channels that are opened from now on: RabbitMQ 3 reads the one, 4 the other."""
    code = f"application:set_env(rabbit, max_message_size, {limit}), persistent_term:put(max_message_size, {limit})."
    await anyio.to_thread.run_sync(rabbit.ctl, "eval", code)


async def all_of(broker: RabbitBroker, queue: str, count: int) -> list[Incoming]:
    """All that are ready, which must be so many at least."""
    found: list[Incoming] = []
    async with broker.subscribe(queue, prefetch=500) as subscription:
        while len(found) < count or await broker.depth(queue):
            found += await subscription.receive()
        for delivery in found:
            subscription.settle(delivery, Settlement.ACK)
        await subscription.flush()
    return found


async def test_what_is_too_large_is_refused_and_all_others_of_the_channel_are_unknown_or_confirmed(
    strict_rabbit: Rabbit, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    async with open_broker(strict_rabbit.url, name="test") as broker:
        await broker.apply(place.topology())
        batch = [message(place, 1), message(place, LIMIT), message(place, LIMIT + 1, "a"), *[message(place, 1)] * 3]
        with caplog.at_level(logging.WARNING, "orderbus.rabbitmq"):
            receipts = await broker.publish([*batch, message(place, LIMIT + 5, "b")])

        assert set(receipts[:2]) <= {CONFIRMED, UNKNOWN}
        assert receipts[2:] == [REFUSED, UNKNOWN, UNKNOWN, UNKNOWN, REFUSED]
        assert [record.message for record in caplog.records] == [
            f"message 'a' for exchange '{place.exchange}' is refused: the body takes {LIMIT + 1} bytes; "
            f"the broker's max_message_size is {LIMIT}",
            f"message 'b' for exchange '{place.exchange}' is refused: the body takes {LIMIT + 5} bytes; "
            f"the broker's max_message_size is {LIMIT}",
        ]


async def test_once_the_limit_is_known_nobody_else_suffers_until_it_is_asked_again(
    strict_rabbit: Rabbit, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place()
    async with open_broker(strict_rabbit.url, name="test") as broker:
        await broker.apply(place.topology())
        await broker.publish([message(place, LIMIT + 1)])

        mixed = [message(place, 1), message(place, LIMIT + 1), message(place, LIMIT)]
        assert await broker.publish(mixed) == [CONFIRMED, REFUSED, CONFIRMED]
        monkeypatch.setattr(publisher.SizeLimit, "KNOWN_S", 0.0)
        broker._size_limit.learn(LIMIT)
        assert (await broker.publish(mixed))[1:] == [REFUSED, UNKNOWN]
        await set_limit(strict_rabbit, 2 * LIMIT)
        try:
            assert await broker.publish(mixed) == [CONFIRMED] * 3
        finally:
            await set_limit(strict_rabbit, LIMIT)


async def test_an_event_that_is_too_large_is_stuck_and_the_rest_of_the_outbox_gets_out(
    strict_rabbit: Rabbit, notes_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    handled: set[str] = set()
    complete = anyio.Event()
    bus = Bus("notes", settings=Settings(broker_url=strict_rabbit.url, database_url=notes_url))

    @bus.on(Noted)
    async def handle(event: Noted) -> None:
        handled.add(event.n)
        if len(handled) == 40:
            complete.set()

    with anyio.fail_after(60), caplog.at_level(logging.WARNING):
        async with bus:
            async with bus.transaction() as tx:
                for n in range(20):
                    tx.emit(Noted(n=str(n)))
                large = tx.emit(Noted(n="large", text="x" * LIMIT))
                behind = tx.emit(Noted(n="large"))
                for n in range(20, 40):
                    tx.emit(Noted(n=str(n)))
            await complete.wait()
    with psycopg.connect(notes_url) as db:
        stuck = db.execute("select event_id, reason, is_behind from orderbus.stuck order by id").fetchall()
        left = db.execute("select count(*) from orderbus.outbox").fetchone()

    assert handled == {str(n) for n in range(40)}
    assert (stuck, left) == ([(large, "refused", False), (behind, "behind", True)], (0,))
    assert f"event {large} ({Noted.__event_type__.topic}) is stuck: refused" in caplog.text
    assert f"message '{large}' for exchange 'ob.events' is refused: the body takes " in caplog.text


async def test_a_dead_letter_that_is_too_large_leaves_the_others_alone(
    strict_rabbit: Rabbit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is always tried again together with those that had no answer because of it."""
    monkeypatch.setattr(leaving, "PUBLISH_TRIES", 3)
    monkeypatch.setattr(leaving, "backoff_s", lambda *_, **__: 0.0)
    bus = Bus("letters", settings=Settings(broker_url=strict_rabbit.url))
    queue = f"letters.{Noted.__event_type__.topic}"

    @bus.on(Noted, guard="none")
    async def handle(event: Noted) -> None:
        raise Park("so it is")

    async def filled() -> tuple[set[UUID], UUID]:
        """The others, and the large one in their midst."""
        await set_limit(strict_rabbit, 2 * LIMIT)
        try:
            sender = Bus("sender", settings=Settings(broker_url=strict_rabbit.url))
            async with sender:
                events = [Noted(n=str(n), text="x" * LIMIT if n == 10 else "") for n in range(20)]
                ids = await sender.publish_many(events)
        finally:
            await set_limit(strict_rabbit, LIMIT)
        return {*ids[:10], *ids[11:]}, ids[10]

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "can't be moved" in record.getMessage():
                given_up.set()

    given_up = anyio.Event()
    with anyio.fail_after(60):
        async with open_broker(strict_rabbit.url, name="test") as broker:
            await broker.apply(bus.topology())
            others, large = await filled()
            told = Told()
            logging.getLogger("orderbus.consumer").addHandler(told)
            try:
                async with bus:
                    await given_up.wait()
            finally:
                logging.getLogger("orderbus.consumer").removeHandler(told)
            parked = {UUID(letter.properties.message_id) for letter in await all_of(broker, f"{queue}.dlq", len(others))}
            (left,) = await all_of(broker, queue, 1)

    assert (parked, left.properties.message_id) == (others, str(large))
    moved = [record.getMessage() for record in caplog.records if "can't be moved" in record.getMessage()]
    assert moved
    assert all(str(large) in line for line in moved)
