"""`memory://` is one's own; `memory://NAME` is shared within the process and the event loop, as long as it is open."""

from __future__ import annotations

import gc
from typing import Any
from uuid import UUID

import anyio
import pytest

from orderbus._core.message import Receipt
from orderbus._core.topology import Queue
from orderbus.abc import ClaimState, InboxEntry, Verdict
from orderbus.adapters.memory import open_broker, open_claims, open_store
from orderbus.errors import UsageError
from tests.contract.talk import bodies, declare, drain, message, send

pytestmark = pytest.mark.anyio


async def test_two_openers_of_a_name_meet() -> None:
    async with open_broker("memory://meeting", name="a") as one, open_broker("memory://meeting", name="b") as two:
        await declare(one, Queue("q"))
        await send(one, "q", ["x"])
        assert bodies(await drain(two, "q", 1)) == ["x"]


async def test_without_a_name_everybody_has_their_own() -> None:
    async with open_broker("memory://", name="a") as one, open_broker("memory://", name="a") as two:
        await declare(one, Queue("q"))
        assert await two.publish([message("q")]) == [Receipt.UNROUTABLE]


async def test_other_names_are_other_brokers() -> None:
    async with open_broker("memory://this", name="a") as one, open_broker("memory://that", name="a") as two:
        assert one is not two


async def test_the_content_lives_as_long_as_somebody_has_it_open() -> None:
    async with open_broker("memory://relay-race", name="a") as first:
        await declare(first, Queue("q"))
        await send(first, "q", ["x"])
        second = open_broker("memory://relay-race", name="b")
        await second.__aenter__()
    async with open_broker("memory://relay-race", name="c") as third:
        assert bodies(await drain(third, "q", 1)) == ["x"]
        await second.__aexit__(None, None, None)
    async with open_broker("memory://relay-race", name="d") as fourth:
        assert await fourth.publish([message("q")]) == [Receipt.UNROUTABLE]


async def test_stores_and_claims_are_shared_in_the_same_way() -> None:
    entry = InboxEntry(UUID(int=1), "c", 1)
    async with open_store("memory://s") as one, open_store("memory://s") as two, open_store("memory://") as other:
        await (await one.begin([entry])).commit([], [])
        assert list((await two.begin([entry])).verdicts) == [Verdict.DUPLICATE]
        assert list((await other.begin([entry])).verdicts) == [Verdict.NEW]

    async with open_claims("memory://s", prefix="p:") as mine, open_claims("memory://s", prefix="p:") as same:
        async with open_claims("memory://s", prefix="other:") as apart:
            states = [(await claims.claim([("k", "f")], str(at), 1000))[0].state for at, claims in enumerate((mine, same, apart))]
    assert states == [ClaimState.GRANTED, ClaimState.IN_PROGRESS, ClaimState.GRANTED]


async def test_another_event_loop_is_refused_with_the_fix() -> None:
    def open_elsewhere() -> None:
        async def main() -> None:
            async with open_broker("memory://mine", name="b"):
                pass

        anyio.run(main)

    async with open_broker("memory://mine", name="a"):
        with pytest.raises(UsageError, match=r"another event loop.*use another name"):
            await anyio.to_thread.run_sync(open_elsewhere)


def test_an_event_loop_that_died_without_closing_does_not_keep_the_name() -> None:
    async def open_and_abandon() -> None:
        await open_broker("memory://orphan", name="a").__aenter__()

    async def open_again() -> None:
        async with open_broker("memory://orphan", name="b"):
            pass

    anyio.run(open_and_abandon)
    gc.collect()
    anyio.run(open_again)


@pytest.mark.parametrize("url", ["memory:///path", "memory://name?x=1", "amqp://name", "memory://name#x"])
@pytest.mark.parametrize("open_it", [lambda url: open_broker(url, name="a"), open_store, open_claims])
async def test_a_url_that_means_nothing_is_refused(url: str, open_it: Any) -> None:
    with pytest.raises(UsageError, match="memory://NAME"):
        async with open_it(url):
            pass
