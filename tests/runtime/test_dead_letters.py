"""Dead letters on every broker: looking takes nothing, a replay loses nothing, and doing it twice does no harm."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence

import anyio
import pytest

from orderbus import Bus, Event, Park, Retry, Settings, Tx, new_id
from orderbus._core.leaving import ERROR, PARKED_AT, QUEUE, RAW_PROPERTIES, REASON
from orderbus._core.message import ATTEMPT, KEY, NO_HEADERS, Headers, Incoming, Outgoing, Receipt, Settlement
from orderbus._core.parked import Parked, Wanted
from orderbus._core.topology import LOST_QUEUE, Queue, QueueNeed, Topology, dead_letter_queue, retry_exchange, topology_for
from orderbus._runtime.dead_letters import DeadLetters, Outcome
from orderbus._runtime.opening import open_broker
from orderbus.abc import Broker
from orderbus.adapters.memory import MemoryBroker
from orderbus.adapters.rabbitmq import RabbitBroker
from orderbus.errors import UnavailableError, UsageError
from tests.rabbitmq.conftest import delete_queue
from tests.rabbitmq.strangers import Raw, stranger
from tests.rabbitmq.test_malformed import bad_id

pytestmark = pytest.mark.anyio

MEMORY = [
    pytest.param(("memory", "asyncio"), id="memory-asyncio"),
    pytest.param(("memory", "trio"), id="memory-trio"),
]
LIMIT_S = 30.0


@pytest.fixture(params=[*MEMORY, pytest.param(("rabbitmq", "asyncio"), id="rabbitmq", marks=pytest.mark.servers)])
def flavour(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue("flavour")[1] if "flavour" in request.fixturenames else "asyncio"


@pytest.fixture
def url(flavour: tuple[str, str], queue: str, request: pytest.FixtureRequest) -> str:
    return f"memory://{queue}" if flavour[0] == "memory" else request.getfixturevalue("vhost_url")


@pytest.fixture
def queue() -> str:
    return f"letters-{secrets.token_hex(6)}"


@pytest.fixture
async def broker(url: str, queue: str) -> AsyncIterator[Broker]:
    with anyio.fail_after(LIMIT_S):
        async with open_broker(url, name="tests") as broker:
            await broker.apply(topology_for([QueueNeed(queue, ("tests.happened",))]))
            yield broker
            if isinstance(broker, RabbitBroker):
                await delete_queue(broker, queue)
                await delete_queue(broker, dead_letter_queue(queue))


def letter(queue: str, *, reason: str = "broken", body: bytes = b"{}", headers: Headers = NO_HEADERS) -> Outgoing:
    own = {REASON: reason, QUEUE: queue, ATTEMPT: 3, PARKED_AT: 1_000.0, KEY: "k", "mine": "kept", **headers}
    return Outgoing("", dead_letter_queue(queue), body, str(new_id()), "tests.happened", headers=own)


async def park(broker: Broker, letters: Sequence[Outgoing]) -> list[str]:
    assert set(await broker.publish(letters)) == {Receipt.CONFIRMED}
    return [one.message_id for one in letters]


async def drained(broker: Broker, queue: str) -> list[Incoming]:
    """Everything that is in a queue, taken."""
    count, taken = await broker.depth(queue), list[Incoming]()
    async with broker.subscribe(queue, prefetch=100) as subscription:
        while len(taken) < count:
            for delivery in await subscription.receive():
                subscription.settle(delivery, Settlement.ACK)
                taken.append(delivery)
        await subscription.flush()
    return taken


async def holds(broker: Broker, queue: str, count: int) -> None:
    """Until a queue has so many ready: a quorum queue takes back what a channel held a moment after the channel is closed."""
    while await broker.depth(queue) != count:
        pass


def ids(letters: Sequence[Parked]) -> list[str | None]:
    return [one.event_id for one in letters]


# Looking


@pytest.mark.parametrize("hold", [200, 7])
async def test_looking_again_and_again_changes_nothing(broker: Broker, queue: str, hold: int) -> None:
    parked = await park(broker, [letter(queue) for _ in range(50)])
    letters = DeadLetters(broker)
    for _ in range(3):
        listing = await letters.list(dead_letter_queue(queue), hold=hold)
        assert ids(listing.letters) == parked[:hold]
        assert (listing.ready, listing.looked_at) == (50, min(hold, 50))
        await holds(broker, dead_letter_queue(queue), 50)
    assert [one.properties.message_id for one in await drained(broker, dead_letter_queue(queue))] == parked


async def test_a_listing_says_all_that_parking_wrote(broker: Broker, queue: str) -> None:
    await park(broker, [letter(queue, headers={ERROR: "ValueError", "ob-error-text": "no", "ob-handler": "g.h"})])
    (found,) = (await DeadLetters(broker).list(dead_letter_queue(queue))).letters
    assert (found.queue, found.origin, found.reason) == (dead_letter_queue(queue), queue, "broken")
    assert (found.error, found.error_text, found.handler) == ("ValueError", "no", "g.h")
    assert (found.attempts, found.parked_at_s, found.key, found.topic) == (3, 1_000.0, "k", "tests.happened")
    assert {name: value for name, value in found.headers.items() if not name.startswith("x-")} == {"mine": "kept"}


async def test_the_wanted_are_found_behind_the_others(broker: Broker, queue: str) -> None:
    await park(broker, [letter(queue) for _ in range(30)])
    (rare,) = await park(broker, [letter(queue, reason="rare")])
    listing = await DeadLetters(broker).list(dead_letter_queue(queue), Wanted(reasons=("ra*",)), limit=1)
    assert ids(listing.letters) == [rare]


async def test_an_empty_queue_is_an_empty_listing(broker: Broker, queue: str) -> None:
    listing = await DeadLetters(broker).list(dead_letter_queue(queue))
    assert (listing.ready, listing.letters) == (0, ())


async def test_a_queue_that_is_consumed_is_not_looked_into(broker: Broker, queue: str) -> None:
    with pytest.raises(UsageError, match=rf"not a dead letter queue; did you mean '{queue}\.dlq'\?"):
        await DeadLetters(broker).list(queue)


async def test_a_queue_that_does_not_exist_is_named(broker: Broker, queue: str) -> None:
    with pytest.raises(UsageError, match=f"{queue}-gone.dlq"):
        await DeadLetters(broker).list(f"{queue}-gone.dlq")


async def test_a_second_look_at_the_same_time_ends(broker: Broker, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderbus._runtime.looking.QUIET_S", 0.2)
    await park(broker, [letter(queue) for _ in range(5)])

    async def before_somebody_else_took_them(name: str) -> int:
        return 5

    async with broker.subscribe(dead_letter_queue(queue), prefetch=5) as other:
        taken = [*await other.receive()]
        while len(taken) < 5:
            taken += await other.receive()
        monkeypatch.setattr(broker, "depth", before_somebody_else_took_them)
        listing = await DeadLetters(broker).list(dead_letter_queue(queue))
    assert (listing.ready, listing.looked_at) == (5, 0)
    monkeypatch.undo()
    await holds(broker, dead_letter_queue(queue), 5)


# Replaying


async def test_a_replay_is_the_same_event_without_the_marks_of_parking(broker: Broker, queue: str) -> None:
    parked = await park(broker, [letter(queue, body=b'{"n":%d}' % n) for n in range(120)])
    replay = await DeadLetters(broker).replay(dead_letter_queue(queue))
    assert replay.counts[Outcome.REPLAYED] == 120
    assert replay.complete
    assert await broker.depth(dead_letter_queue(queue)) == 0
    back = await drained(broker, queue)
    assert [one.properties.message_id for one in back] == parked
    assert [one.body for one in back] == [b'{"n":%d}' % n for n in range(120)]
    for one in back:
        assert {name: value for name, value in one.properties.headers.items() if name != "ob-seq"} == {KEY: "k", "mine": "kept"}


async def test_only_the_wanted_are_replayed_and_the_others_keep_their_order(broker: Broker, queue: str) -> None:
    parked = await park(broker, [letter(queue, reason="odd" if n % 2 else "even") for n in range(40)])
    replay = await DeadLetters(broker).replay(dead_letter_queue(queue), Wanted(reasons=("odd",)), limit=15)
    assert replay.counts[Outcome.REPLAYED] == 15
    assert [one.properties.message_id for one in await drained(broker, queue)] == parked[1:31:2]
    await holds(broker, dead_letter_queue(queue), 25)
    left = [one.properties.message_id for one in await drained(broker, dead_letter_queue(queue))]
    assert left == [one for one in parked if one not in parked[1:31:2]]


async def test_those_that_are_held_bound_a_replay(broker: Broker, queue: str) -> None:
    await park(broker, [letter(queue) for _ in range(10)])
    await park(broker, [letter(queue, reason="rare")])
    replay = await DeadLetters(broker).replay(dead_letter_queue(queue), Wanted(reasons=("rare",)), hold=4)
    assert (replay.ready, replay.looked_at, replay.counts[Outcome.REPLAYED]) == (11, 4, 0)
    await holds(broker, dead_letter_queue(queue), 11)


async def test_a_dry_run_tells_and_does_nothing(broker: Broker, queue: str) -> None:
    parked = await park(broker, [letter(queue) for _ in range(3)])
    told: list[tuple[str | None, Outcome]] = []
    replay = await DeadLetters(broker).replay(
        dead_letter_queue(queue), dry_run=True, tell=lambda one, outcome, why: told.append((one.event_id, outcome))
    )
    assert told == [(one, Outcome.WOULD_REPLAY) for one in parked]
    assert replay.counts[Outcome.REPLAYED] == 0
    await holds(broker, dead_letter_queue(queue), 3)
    assert await broker.depth(queue) == 0


async def test_what_no_replay_can_help_is_refused_with_its_reason(broker: Broker, queue: str) -> None:
    unreadable = letter(queue, headers={RAW_PROPERTIES: b"\x00\x80\x02\xff\xfe"})
    nameless = Outgoing("", dead_letter_queue(queue), b"{}", "", "tests.happened")
    old = Outgoing("", dead_letter_queue(queue), b"{}", "01890000-0000-7000-8000-000000000000", "tests.happened")
    await park(broker, [unreadable, nameless, old])
    told: list[str] = []
    letters = DeadLetters(broker, window_s=86_400.0)
    replay = await letters.replay(dead_letter_queue(queue), tell=lambda one, outcome, why: told.append(why))
    assert replay.counts[Outcome.REFUSED] == 3
    assert not replay.complete
    assert [why.split(",")[0] for why in told] == [
        "its properties could not be read",
        "it has no event id (a UUID)",
        "the event is older than the dedupe window of 1 days: its consumer can't know whether it was handled",
    ]
    await holds(broker, dead_letter_queue(queue), 3)
    assert await broker.depth(queue) == 0


async def test_letters_of_a_queue_that_is_gone_stay(broker: Broker, queue: str) -> None:
    gone = dead_letter_queue(f"{queue}-gone")
    await broker.apply(Topology(queues=(Queue(gone),)))
    await park(broker, [Outgoing("", gone, b"{}", str(new_id()), "tests.happened") for _ in range(3)])
    told: list[str] = []
    replay = await DeadLetters(broker).replay(gone, tell=lambda one, outcome, why: told.append(why))
    assert replay.counts[Outcome.FAILED] == 3
    assert told[0].startswith(f"there is no queue '{queue}-gone'")
    await holds(broker, gone, 3)


async def test_a_retry_whose_queue_was_gone_is_replayed_from_the_lost(broker: Broker, queue: str) -> None:
    gone = f"{queue}-gone"
    lost = Outgoing(retry_exchange(1), gone, b"{}", str(new_id()), "tests.happened", headers={KEY: "k"})
    assert await broker.publish([lost]) == [Receipt.CONFIRMED]
    async with broker.subscribe(LOST_QUEUE, prefetch=1) as subscription:
        await subscription.receive()
    await broker.apply(Topology(queues=(Queue(gone),)))
    wanted = Wanted(ids=(lost.message_id,))
    while not (found_there := (await DeadLetters(broker).list(LOST_QUEUE, wanted)).letters):
        pass
    (found,) = found_there
    assert (found.origin, found.reason) == (gone, "lost")
    while not (await DeadLetters(broker).replay(LOST_QUEUE, wanted)).counts[Outcome.REPLAYED]:
        pass
    assert [one.properties.message_id for one in await drained(broker, gone)] == [lost.message_id]


async def test_what_fails_again_is_not_replayed_for_ever(broker: Broker, queue: str) -> None:
    """A consumer that parks at once, while the replay runs."""
    await park(broker, [letter(queue) for _ in range(30)])

    async def park_again(*, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with broker.subscribe(queue, prefetch=10) as subscription:
            task_status.started()
            while True:
                deliveries = await subscription.receive()
                await park(broker, [letter(queue) for _ in deliveries])
                for delivery in deliveries:
                    subscription.settle(delivery, Settlement.ACK)

    async with anyio.create_task_group() as tasks:
        await tasks.start(park_again)
        replay = await DeadLetters(broker).replay(dead_letter_queue(queue), rate=1_000)
        tasks.cancel_scope.cancel()
    assert replay.counts[Outcome.REPLAYED] == 30


async def test_a_replay_that_is_cancelled_in_the_middle_loses_nothing(broker: Broker, queue: str) -> None:
    parked = await park(broker, [letter(queue) for _ in range(40)])
    with anyio.CancelScope() as scope:

        def tell(one: Parked, outcome: Outcome, why: str) -> None:
            if one.event_id == parked[9]:
                scope.cancel()

        await DeadLetters(broker).replay(dead_letter_queue(queue), rate=50, tell=tell)
    assert scope.cancelled_caught
    replayed = [one.properties.message_id for one in await drained(broker, queue)]
    await holds(broker, dead_letter_queue(queue), 30)
    left = [one.properties.message_id for one in await drained(broker, dead_letter_queue(queue))]
    assert replayed == parked[:10]
    assert left == parked[10:]


@pytest.mark.servers
@pytest.mark.parametrize("flavour", [("rabbitmq", "asyncio")], indirect=True)
async def test_letters_with_malformed_properties_are_listed_and_refused(broker: Broker, queue: str, url: str) -> None:
    """Dead-lettered by the broker itself, so that nobody could put its bytes into a header."""
    (neighbour,) = await park(broker, [letter(queue)])
    async with stranger(url) as other:
        assert await other.publish([Raw("", dead_letter_queue(queue), b"", "m", "t", properties=bad_id())]) == [Receipt.CONFIRMED]
    listing = await DeadLetters(broker).list(dead_letter_queue(queue))
    assert ids(listing.letters) == [neighbour, None]
    assert listing.letters[1].reason == "malformed-properties"
    assert listing.letters[1].raw_properties is not None
    assert listing.letters[1].raw_properties.startswith(bad_id()[:2])
    await holds(broker, dead_letter_queue(queue), 2)
    replay = await DeadLetters(broker).replay(dead_letter_queue(queue))
    assert (replay.counts[Outcome.REPLAYED], replay.counts[Outcome.REFUSED]) == (1, 1)
    await holds(broker, dead_letter_queue(queue), 1)


# A broker that fails


@pytest.mark.parametrize("flavour", MEMORY, indirect=True)
class TestWhenTheBrokerFails:
    async def test_what_is_not_confirmed_stays(self, broker: MemoryBroker, queue: str) -> None:
        parked = await park(broker, [letter(queue, headers={KEY: f"k{n}"}) for n in range(5)])
        broker.refuse_publishes(2)
        replay = await DeadLetters(broker).replay(dead_letter_queue(queue))
        assert (replay.counts[Outcome.FAILED], replay.counts[Outcome.REPLAYED]) == (2, 3)
        assert ids((await DeadLetters(broker).list(dead_letter_queue(queue))).letters) == parked[:2]

    async def test_none_overtakes_an_earlier_letter_of_its_key_that_was_refused(self, broker: MemoryBroker, queue: str) -> None:
        parked = await park(broker, [letter(queue, headers={KEY: key}) for key in ("a", "b", "a", "b", "a")])
        broker.refuse_publishes(1)
        replay = await DeadLetters(broker).replay(dead_letter_queue(queue))
        assert replay.counts[Outcome.FAILED] == 3
        assert [one.properties.message_id for one in await drained(broker, queue)] == [parked[1], parked[3]]
        await DeadLetters(broker).replay(dead_letter_queue(queue))
        assert [one.properties.message_id for one in await drained(broker, queue)] == [parked[0], parked[2], parked[4]]

    async def test_a_connection_lost_in_the_middle_loses_nothing(self, broker: MemoryBroker, queue: str) -> None:
        parked = await park(broker, [letter(queue) for _ in range(20)])

        def tell(one: Parked, outcome: Outcome, why: str) -> None:
            if one.event_id == parked[4]:
                broker.drop_connections()

        with pytest.raises(UnavailableError):
            await DeadLetters(broker).replay(dead_letter_queue(queue), rate=1_000, tell=tell, hold=5)
        await DeadLetters(broker).replay(dead_letter_queue(queue))
        back = [one.properties.message_id for one in await drained(broker, queue)]
        assert set(back) == set(parked)
        assert await broker.depth(dead_letter_queue(queue)) == 0


# Effects


class Happened(Event, topic="tests.happened"):
    n: int


@pytest.mark.parametrize("lost_confirms", [0, 3])
async def test_a_letter_that_is_replayed_twice_is_handled_once(url: str, queue: str, lost_confirms: int) -> None:
    """The second replay is of letters whose first one was confirmed to nobody."""
    bus = Bus(queue, settings=Settings(broker_url=url, database_url=f"memory://{queue}"))
    is_mended, handled = False, list[int]()

    @bus.on(Happened, retry=Retry.none())
    async def handle(event: Happened, tx: Tx) -> None:
        if not is_mended:
            raise Park("not-mended")
        handled.append(event.n)

    dlq = dead_letter_queue(f"{queue}.tests.happened")
    with anyio.fail_after(LIMIT_S):
        async with open_broker(url, name="tests") as broker, bus:
            for n in range(3):
                await bus.publish(Happened(n=n))
            letters = DeadLetters(broker)
            await holds(broker, dlq, 3)
            is_mended = True
            if lost_confirms:
                await broker.publish([again(one) for one in (await letters.list(dlq)).letters])
                while bus.stats.handled < 3:
                    await broker.depth(dlq)
            assert (await letters.replay(dlq)).counts[Outcome.REPLAYED] == 3
            while bus.stats.handled + bus.stats.duplicates < 3 + lost_confirms:
                await broker.depth(dlq)
            await holds(broker, dlq, 0)
    assert sorted(handled) == [0, 1, 2]
    assert bus.receipt is not None
    assert bus.receipt.stats.duplicates == lost_confirms


def again(one: Parked) -> Outgoing:
    """What a replay publishes, without the acknowledgement."""
    return Outgoing("", one.origin, one.body, one.event_id or "", one.topic or "")
