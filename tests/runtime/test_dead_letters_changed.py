"""Dead letters removed, edited and put back, on every broker."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import anyio
import pytest

from orderbus import new_id
from orderbus._core.letter_record import EDITED_FROM, read_record, write_record
from orderbus._core.message import KEY, Incoming, Outgoing
from orderbus._core.parked import Parked, Wanted
from orderbus._core.topology import dead_letter_queue
from orderbus._runtime.dead_letters import DeadLetters, Outcome
from orderbus.abc import Broker
from orderbus.adapters.memory import MemoryBroker
from orderbus.errors import UnavailableError, UsageError
from tests.runtime.test_dead_letters import (
    MEMORY,
    anyio_backend,
    broker,
    drained,
    flavour,
    holds,
    letter,
    park,
    queue,
    url,
)

__all__ = ["anyio_backend", "broker", "flavour", "queue", "url"]

pytestmark = pytest.mark.anyio


def message_ids(deliveries: Sequence[Incoming]) -> list[str | None]:
    return [one.properties.message_id for one in deliveries]


async def seen(broker: Broker, queue: str) -> Parked:
    [one] = (await DeadLetters(broker).list(queue)).letters
    await holds(broker, queue, 1)
    return one


async def test_the_purged_are_stored_before_they_are_gone_and_the_others_keep_their_order(broker: Broker, queue: str) -> None:
    dlq = dead_letter_queue(queue)
    parked = await park(broker, [letter(queue, reason="odd" if n % 2 else "even") for n in range(20)])
    stored: list[Incoming] = []
    told: list[tuple[str | None, Outcome, int]] = []

    def tell(one: Parked, outcome: Outcome, why: str) -> None:
        told.append((one.event_id, outcome, len(stored)))

    done = await DeadLetters(broker).purge(dlq, Wanted(reasons=("odd",)), limit=7, keep=stored.extend, tell=tell)
    assert done.counts[Outcome.PURGED] == 7
    assert message_ids(stored) == parked[1:15:2]
    assert [(one, outcome) for one, outcome, _ in told] == [(one, Outcome.PURGED) for one in parked[1:15:2]]
    assert all(count >= n for n, (_, _, count) in enumerate(told, 1))
    await holds(broker, dlq, 13)
    assert message_ids(await drained(broker, dlq)) == [one for one in parked if one not in parked[1:15:2]]


async def test_what_could_not_be_stored_stays(broker: Broker, queue: str) -> None:
    parked = await park(broker, [letter(queue) for _ in range(3)])

    def full(deliveries: Sequence[Incoming]) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        await DeadLetters(broker).purge(dead_letter_queue(queue), keep=full)
    await holds(broker, dead_letter_queue(queue), 3)
    assert message_ids(await drained(broker, dead_letter_queue(queue))) == parked


@pytest.mark.parametrize("flavour", MEMORY, indirect=True)
async def test_what_the_broker_had_not_taken_when_it_went_is_not_told_of_as_purged(broker: MemoryBroker, queue: str) -> None:
    parked = await park(broker, [letter(queue) for _ in range(3)])
    told: list[tuple[str | None, Outcome]] = []

    with pytest.raises(UnavailableError):
        await DeadLetters(broker).purge(
            dead_letter_queue(queue),
            keep=lambda deliveries: broker.drop_connections(),
            tell=lambda one, outcome, why: told.append((one.event_id, outcome)),
        )

    assert told == [(one, Outcome.FAILED) for one in parked]
    await holds(broker, dead_letter_queue(queue), 3)


@pytest.mark.parametrize("flavour", MEMORY, indirect=True)
@pytest.mark.parametrize("what", ["purge", "replay", "put_back"])
async def test_where_telling_of_one_fails_the_others_are_told_of(broker: MemoryBroker, queue: str, what: str) -> None:
    """The disk of the audit file is full, or nobody reads stdout any more: they are gone all the same."""
    dlq = dead_letter_queue(queue)
    parked = await park(broker, [letter(queue, headers={KEY: f"k{n}"}) for n in range(5)])
    told: list[str | None] = []

    def tell(one: Parked, outcome: Outcome, why: str) -> None:
        told.append(one.event_id)
        if len(told) == 2:
            raise BrokenPipeError

    there = [await drained(broker, dlq)] if what == "put_back" else []
    with pytest.raises(BrokenPipeError):
        await getattr(DeadLetters(broker), what)(dlq, *there, tell=tell)
    assert told == parked
    assert await broker.depth(dlq) == (5 if what == "put_back" else 0)


@pytest.mark.parametrize("flavour", MEMORY, indirect=True)
@pytest.mark.parametrize("what", ["edit", "replay", "put_back"])
async def test_what_was_being_published_when_it_was_interrupted_is_told_of(broker: MemoryBroker, queue: str, what: str) -> None:
    dlq = dead_letter_queue(queue)
    parked = await park(broker, [letter(queue, headers={KEY: f"k{n}"}) for n in range(3)])
    one = (await DeadLetters(broker).list(dlq, limit=1)).letters[0]
    await holds(broker, dlq, 3)
    copies = await drained(broker, dlq) if what == "put_back" else []
    told: list[tuple[str | None, Outcome]] = []

    def tell(one: Parked, outcome: Outcome, why: str) -> None:
        assert why == "interrupted before the confirm: it may be in its queue as well"
        told.append((one.event_id, outcome))

    letters = DeadLetters(broker)
    calls = {
        "edit": lambda: letters.edit(one, b"new", event_id=new_id(), tell=tell),
        "replay": lambda: letters.replay(dlq, tell=tell),
        "put_back": lambda: letters.put_back(dlq, copies, tell=tell),
    }
    broker.block()  # no confirm comes
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(calls[what])
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert told == [(one, Outcome.FAILED) for one in (parked[:1] if what == "edit" else parked)]


async def test_an_edited_letter_goes_to_its_queue_and_is_no_longer_here(broker: Broker, queue: str) -> None:
    dlq = dead_letter_queue(queue)
    [old] = await park(broker, [letter(queue)])
    new = new_id()
    done = await DeadLetters(broker).edit(await seen(broker, dlq), b"new", event_id=new)
    assert done.counts[Outcome.EDITED] == 1
    [back] = await drained(broker, queue)
    assert (back.body, back.properties.message_id) == (b"new", str(new))
    headers = {name: value for name, value in back.properties.headers.items() if name != "ob-seq"}
    assert headers == {KEY: "k", "mine": "kept", EDITED_FROM: old}
    assert await broker.depth(dlq) == 0


async def test_a_letter_that_somebody_else_has_dealt_with_is_not_edited(broker: Broker, queue: str) -> None:
    dlq = dead_letter_queue(queue)
    await park(broker, [letter(queue)])
    one = await seen(broker, dlq)
    await DeadLetters(broker).purge(dlq)
    with pytest.raises(UsageError, match=r"is not in .* any more as it was shown; look again"):
        await DeadLetters(broker).edit(one, b"new", event_id=new_id())
    assert await broker.depth(queue) == 0


async def test_a_letter_comes_back_once_whoever_puts_it_there_twice(broker: Broker, queue: str) -> None:
    dlq = dead_letter_queue(queue)
    parked = await park(broker, [letter(queue, body=b"%d" % n) for n in range(5)])
    nameless = Outgoing("", dlq, b"nameless", "", "tests.happened")
    await park(broker, [nameless])
    copies: list[Incoming] = []
    await DeadLetters(broker).visit(dlq, copies.extend)
    await holds(broker, dlq, 6)
    on_file = [read_record(write_record(one)) for one in copies]
    assert (await DeadLetters(broker).put_back(dlq, on_file)).counts[Outcome.PRESENT] == 6
    await holds(broker, dlq, 6)
    await drained(broker, dlq)
    done = await DeadLetters(broker).put_back(dlq, [*on_file, *on_file])
    assert (done.counts[Outcome.IMPORTED], done.counts[Outcome.PRESENT]) == (6, 6)
    listing = await DeadLetters(broker).list(dlq)
    assert [one.event_id for one in listing.letters] == [*parked, None]
    assert {one.reason for one in listing.letters} == {"broken", "unknown"}


@pytest.mark.parametrize("flavour", MEMORY, indirect=True)
class TestWhenTheBrokerRefuses:
    async def test_an_edit_leaves_the_letter(self, broker: MemoryBroker, queue: str) -> None:
        dlq = dead_letter_queue(queue)
        [old] = await park(broker, [letter(queue)])
        one = await seen(broker, dlq)
        broker.refuse_publishes(1)
        done = await DeadLetters(broker).edit(one, b"new", event_id=UUID(old))
        assert (done.counts[Outcome.FAILED], done.complete) == (1, False)
        assert message_ids(await drained(broker, dlq)) == [old]

    async def test_an_import_says_so(self, broker: MemoryBroker, queue: str) -> None:
        dlq = dead_letter_queue(queue)
        await park(broker, [letter(queue), letter(queue)])
        copies: list[Incoming] = []
        await DeadLetters(broker).visit(dlq, copies.extend)
        await drained(broker, dlq)
        broker.refuse_publishes(1)
        done = await DeadLetters(broker).put_back(dlq, copies)
        assert (done.counts[Outcome.FAILED], done.counts[Outcome.IMPORTED]) == (1, 1)
