"""Messages of strangers and of liars: each is parked alone, with its reason and exact bytes, or handled once; nobody else notices."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import aiormq

from tests.faults.hostile import KEY, Hostile, all_of, body, event_id
from tests.faults.scenario import scenario
from tests.faults.world import Broken, World
from tests.rabbitmq.strangers import CONTENT_TYPE, HEADERS, MESSAGE_ID, TYPE, properties, publish_raw, short, text

QUEUE = "faults.faults.placed"
DEAD = f"{QUEUE}.dlq"
FIRST = 20_000_000
"""The numbers of strangers' events are above all others."""
ROUNDS = 3
COPIES = 20
RAW_BYTES = 8192


def commit(world: World, numbers: Sequence[int]) -> None:
    """The ledger shall look for these, too."""
    world.execute("insert into source (n, key, seq, does) select n, %s, 0, '' from unnest(%s::bigint[]) n", KEY, list(numbers))


def send(world: World, messages: Sequence[tuple[bytes, bytes]]) -> None:
    asyncio.run(publish_raw(world.broker_url, QUEUE, messages))


@scenario("hostile-messages", quick=True)
def hostile(world: World) -> None:
    """Bad UTF-8, impossible times, nesting bombs, 17 MiB, wrong types, forged counters, in the middle of the load."""
    world.begin("service", "service-b", "relay")
    connections = set(world.connections())
    sent: list[Hostile] = []
    for _ in range(ROUNDS):
        kinds = all_of(world.rng, FIRST + len(sent))
        commit(world, [one.n for one in kinds if one.reason is None])
        sent += kinds
        world.rng.shuffle(kinds)
        while kinds:
            some, kinds = kinds[:10], kinds[10:]
            send(world, [(one.properties, one.body) for one in some])
            world.pause(0.0, 0.3)
    parked = [one for one in sent if one.reason is not None]
    world.strangers = Counter(one.reason for one in parked)
    with suppress(Broken):  # the comparison says what is missing
        world.until(lambda: len(letters_of(world)) >= len(parked), "the strangers' letters")
    compare(parked, letters_of(world))
    if gone := connections - set(world.connections()):
        raise Broken(f"{len(gone)} connections have ended because of what they were sent")
    world.mended()


@scenario("the-same-id-with-another-body")
def another_body(world: World) -> None:
    """The first body that is handled counts. Every other one is parked, whether it comes at the same time or later."""
    world.begin("service", "service-b", "relay")
    ids = [event_id(world.rng) for _ in range(50)]
    commit(world, range(FIRST, FIRST + len(ids)))
    for does in ("", "another", "a third"):
        send(world, [(healthy(str(one)), body(FIRST + n, does=does)) for n, one in enumerate(ids)])
        world.until(lambda: world.number("select count(*) from effect where n >= %s", FIRST) == 2 * len(ids), "all to be handled")
    world.strangers = {"id-reused": 2 * len(ids)}
    world.until(lambda: len(letters_of(world)) >= 2 * len(ids), "the letters")
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


def letters_of(world: World) -> list[tuple[str, bytes, bytes]]:
    """Reason, body and (where they could not be read) properties of the strangers' letters; all stay where they are."""
    found: list[tuple[str, bytes, bytes]] = []

    async def look(channel: aiormq.abc.AbstractChannel) -> None:
        while (message := await channel.basic_get(DEAD)).delivery_tag:  # type: ignore[union-attr]
            headers = message.header.properties.headers or {}
            reason = str(headers.get("ob-reason", ""))
            if reason != "asked-for":
                found.append((reason, message.body, bytes(headers.get("ob-raw-properties", b""))))  # type: ignore[arg-type]

    world.on_channel(look)
    return found


def compare(sent: Sequence[Hostile], letters: Sequence[tuple[str, bytes, bytes]]) -> None:
    wanted = Counter(
        (one.reason, one.body, one.properties[:RAW_BYTES] if one.reason == "malformed-properties" else b"") for one in sent
    )
    found = Counter(letters)
    missing, more = wanted - found, found - wanted
    if missing or more:
        names = {(one.reason, one.body): one.name for one in sent}
        by_body = {one.body: one.name for one in sent}
        raise Broken(
            f"missing: {sorted(names[reason, content] for reason, content, _ in missing)}; "
            f"instead: {sorted((by_body.get(content, 'altered'), reason) for reason, content, _ in more)}"
        )
