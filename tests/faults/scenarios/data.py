"""Messages of strangers and of liars: each is parked alone, with its reason and exact bytes, or handled once; nobody else notices."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

import aiormq

from tests.faults.hostile import KEY, Hostile, all_of, body, event_id
from tests.faults.ledger import PLACED, Place
from tests.faults.program import QUEUES
from tests.faults.scenario import scenario
from tests.faults.world import Broken, World, reason_of
from tests.rabbitmq.strangers import CONTENT_TYPE, HEADERS, MESSAGE_ID, TYPE, properties, publish_raw, short, text

ALL_QUEUES = (PLACED, *QUEUES["trail"], *QUEUES["notify"])
FIRST = 2 * 10**15
"""The numbers of strangers' events are above all others."""
ROUNDS = 2
COPIES = 20
RAW_BYTES = 8192


def commit(world: World, numbers: Sequence[int]) -> None:
    """The ledger shall look for these, too."""
    world.execute("insert into source (n, key, seq, does) select n, %s, 0, '' from unnest(%s::bigint[]) n", KEY, list(numbers))


def send(world: World, messages: Sequence[tuple[bytes, bytes]], queue: str = PLACED) -> None:
    asyncio.run(publish_raw(world.broker_url, queue, messages))


@scenario("hostile-messages", quick=True)
def hostile(world: World) -> None:
    """Bad UTF-8, impossible times, nesting bombs, 17 MiB, wrong types, forged counters, in the middle of the load.

    To a handler with an inbox, to the ordered one, and to the one with claims.
    """
    world.begin("service", "service-b", "relay", "trail", "notify")
    connections = set(world.connections())
    sent: list[Hostile] = []
    for _ in range(ROUNDS):
        kinds = all_of(world.rng, FIRST + len(sent))
        commit(world, [one.n for one in kinds if one.reason is None])
        sent += kinds
        world.rng.shuffle(kinds)
        while kinds:
            some, kinds = kinds[:10], kinds[10:]
            for queue in ALL_QUEUES:
                send(world, [(one.properties, one.body) for one in some if one.is_for(queue)], queue)
            world.pause(0.0, 0.3)
    parked = {queue: [one for one in sent if one.reason is not None and one.is_for(queue)] for queue in ALL_QUEUES}
    world.strangers = Counter(Place(dead(queue), str(one.reason)) for queue in ALL_QUEUES for one in parked[queue])
    names = {one.body: one.name for one in sent}
    for queue, these in parked.items():
        compare([letter(one) for one in these], await_letters(world, len(these), queue), names)
    if gone := connections - set(world.connections()):
        raise Broken(f"{len(gone)} connections have ended because of what they were sent")
    world.mended()


@scenario("the-same-id-with-another-body")
def another_body(world: World) -> None:
    """The first body that is handled counts. Every other one is parked as it came, whether at the same time or later."""
    world.begin("service", "service-b", "relay")
    ids = [event_id(world.rng) for _ in range(50)]
    commit(world, range(FIRST, FIRST + len(ids)))
    bodies = {does: [body(FIRST + n, does=does) for n in range(len(ids))] for does in ("", "another", "a third")}
    for these in bodies.values():
        send(world, [(healthy(str(one)), content) for one, content in zip(ids, these, strict=True)])
        world.until(lambda: world.number("select count(*) from effect where n >= %s", FIRST) == 2 * len(ids), "all to be handled")
    wrong = [*bodies["another"], *bodies["a third"]]
    world.strangers = {Place(dead(PLACED), "id-reused"): len(wrong)}
    names = {content: content.decode() for content in wrong}
    compare([("id-reused", content, b"") for content in wrong], await_letters(world, len(wrong)), names)
    world.mended()


@scenario("the-same-id-many-times-at-once")
def in_flight(world: World) -> None:
    """Copies of one event at two processes, in one batch and in many: one of them is handled, and all are acknowledged."""
    world.begin("service", "service-b", "relay")
    for turn in range(10):
        numbers = range(FIRST + 20 * turn, FIRST + 20 * (turn + 1))
        commit(world, numbers)
        copies = [(healthy(str(event_id(world.rng))), body(n)) for n in numbers] * COPIES
        world.rng.shuffle(copies)
        send(world, copies)
    world.mended()


def healthy(event_id: str) -> bytes:
    return properties(
        {
            CONTENT_TYPE: short("application/json"),
            MESSAGE_ID: short(event_id),
            TYPE: short("faults.placed"),
            HEADERS: text("ob-key", KEY),
        }
    )


StrangersLetter = tuple[str, bytes, bytes]
"""Reason, body and, where they could not be read, properties."""


def dead(queue: str) -> str:
    return f"{queue}.dlq"


def letter(one: Hostile) -> StrangersLetter:
    """What must become of it."""
    return str(one.reason), one.body, one.properties[:RAW_BYTES] if one.reason == "malformed-properties" else b""


def await_letters(world: World, count: int, queue: str = PLACED) -> list[StrangersLetter]:
    """So many, or those that have come in time: the comparison says what is missing."""
    with suppress(Broken):
        world.until(
            lambda: world.ready()[dead(queue)] >= count and len(letters_of(world, queue)) >= count, "the strangers' letters"
        )
    return letters_of(world, queue)


def letters_of(world: World, queue: str = PLACED) -> list[StrangersLetter]:
    """All stay where they are."""
    found: list[StrangersLetter] = []

    async def look(channel: aiormq.abc.AbstractChannel) -> None:
        while (message := await channel.basic_get(dead(queue))).delivery_tag:  # type: ignore[union-attr]
            headers = message.header.properties.headers or {}
            reason = reason_of(headers)
            if reason != "asked-for":
                found.append((reason, message.body, bytes(headers.get("ob-raw-properties", b""))))  # type: ignore[arg-type]

    world.on_channel(look)
    return found


def compare(wanted: Sequence[StrangersLetter], letters: Sequence[StrangersLetter], names: Mapping[bytes, str]) -> None:
    """Reason, body and properties, byte by byte; raises Broken, with the names of the bodies."""
    missing, more = Counter(wanted) - Counter(letters), Counter(letters) - Counter(wanted)
    if missing or more:
        raise Broken(
            f"missing: {sorted((names[content], reason) for reason, content, _ in missing)}; "
            f"instead: {sorted((names.get(content, 'altered'), reason) for reason, content, _ in more)}"
        )
