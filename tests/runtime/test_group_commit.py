"""Writes that arrive together commit together; who fails, fails alone."""

from typing import Any

import anyio
import pytest

from orderbus import TransientError, Tx, UnavailableError, UsageError
from orderbus._runtime import group_commit
from orderbus._runtime.group_commit import LANES, MOST_TOGETHER
from tests.runtime.faults import StoreFaults
from tests.runtime.world import Log, Paid, Placed, World, receipt_of, until

pytestmark = pytest.mark.anyio


class CardRefused(Exception):
    pass


def place(n: int, log: Log | None = None):
    """The work of one caller."""

    async def work(tx: Tx) -> int:
        tx.emit(Placed(order="a", n=n))
        if log is not None:
            log((n, tx))
        return n

    return work


async def together(bus, works) -> list[object]:
    """All at once; the result or the error of each."""
    outcomes: list[object] = [None] * len(works)

    async def call(n: int, work) -> None:
        try:
            outcomes[n] = await bus.group_commit(work)
        except Exception as error:
            outcomes[n] = error

    async with anyio.create_task_group() as callers:
        for n, work in enumerate(works):
            callers.start_soon(call, n, work)
    return outcomes


async def test_callers_share_transactions_and_each_gets_its_own_result(world: World) -> None:
    bus, log = world.bus(relay=False), Log()

    async with bus:
        assert await together(bus, [place(n, log) for n in range(100)]) == list(range(100))

    assert len({tx for _, tx in log.lines}) <= 2 * LANES
    assert len(world.store.outbox.rows()) == 100
    assert receipt_of(bus).stats.emitted == 100


async def test_a_transaction_holds_a_bounded_number_of_them(world: World) -> None:
    bus, log = world.bus(relay=False), Log()

    async with bus:
        await together(bus, [place(n, log) for n in range(3 * MOST_TOGETHER)])

    transactions = [tx for _, tx in log.lines]
    assert max(transactions.count(tx) for tx in set(transactions)) <= MOST_TOGETHER


async def test_a_lone_caller_waits_for_no_company(world: World) -> None:
    bus = world.bus(relay=False)

    async with bus:
        began = anyio.current_time()
        await bus.group_commit(place(1))
        assert anyio.current_time() == began


async def test_work_may_be_a_plain_function(world: World) -> None:
    bus = world.bus(relay=False)

    async with bus:
        assert await bus.group_commit(lambda tx: tx.emit(Placed(order="a")).version) == 7


async def test_who_fails_gets_its_own_error_and_the_others_are_committed(world: World) -> None:
    bus = world.bus(relay=False)

    async def refuse(tx: Tx) -> None:
        tx.emit(Paid(order="ghost"))
        raise CardRefused("no")

    async with bus:
        outcomes = await together(bus, [place(0), refuse, place(2), refuse, place(4)])

    assert [outcome for outcome in outcomes if not isinstance(outcome, CardRefused)] == [0, 2, 4]
    assert isinstance(outcomes[1], CardRefused)
    assert isinstance(outcomes[3], CardRefused)
    assert [row.topic for row in world.store.outbox.rows()] == ["orders.placed"] * 3


async def test_a_deadlock_is_run_again_and_nobody_notices(world: World) -> None:
    bus, faults = world.bus(relay=False), StoreFaults(world.store)

    async with bus:
        faults.transient = 3
        assert await together(bus, [place(n) for n in range(10)]) == list(range(10))

    assert len(world.store.outbox.rows()) == 10


async def test_a_write_that_deadlocks_for_ever_fails_alone(world: World) -> None:
    bus = world.bus(relay=False)

    async def locked(tx: Tx) -> None:
        raise TransientError("lock timeout")

    async with bus:
        outcomes = await together(bus, [place(0), locked, place(2)])

    assert isinstance(outcomes[1], TransientError)
    assert [outcomes[0], outcomes[2]] == [0, 2]


async def test_a_database_that_is_away_is_said_to_everybody_at_once(world: World) -> None:
    bus, faults = world.bus(relay=False), StoreFaults(world.store)

    async with bus:
        faults.is_away = True
        outcomes = await together(bus, [place(n) for n in range(5)])
        faults.is_away = False
        assert await bus.group_commit(place(7)) == 7

    assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)


async def test_a_database_that_goes_while_they_are_run_one_by_one_is_said_to_the_rest_at_once(world: World) -> None:
    bus, faults, begins, free = world.bus(relay=False), StoreFaults(world.store), Log(), anyio.Event()
    begin = world.store.begin

    async def counted(*arguments: Any) -> Any:
        begins("begin")
        return await begin(*arguments)

    async def keep_a_lane_busy(tx: Tx) -> None:
        await free.wait()

    async def refuse(tx: Tx) -> None:
        faults.is_away = len(begins.lines) == 2
        raise CardRefused("no")

    async with bus, anyio.create_task_group() as tasks:
        for _ in range(LANES):
            tasks.start_soon(bus.group_commit, keep_a_lane_busy)
            await anyio.wait_all_tasks_blocked()
        world.store.begin = counted  # type: ignore[method-assign]
        outcomes: list[object] = []

        async def six() -> None:
            outcomes.extend(await together(bus, [refuse] * 6))

        tasks.start_soon(six)
        await anyio.wait_all_tasks_blocked()
        free.set()
        await until(lambda: len(outcomes) == 6)
        faults.is_away = False

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["CardRefused", *["UnavailableError"] * 5]
    assert len(begins.lines) == 3  # of all, of the first, and of the one after it


async def test_a_caller_that_is_cancelled_before_its_turn_is_not_run(world: World) -> None:
    bus, log, gate = world.bus(relay=False), Log(), anyio.Event()

    async def slow(tx: Tx) -> None:
        log("slow")
        await gate.wait()

    async with bus, anyio.create_task_group() as callers:
        for _ in range(LANES):
            callers.start_soon(bus.group_commit, slow)
            await anyio.sleep(0.1)
        with anyio.move_on_after(1):
            await bus.group_commit(place(1, log))
        gate.set()

    assert [line for line in log.lines if line != "slow"] == []
    assert world.store.outbox.rows() == []


async def test_more_than_can_wait_are_turned_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_commit, "MOST_WAITING", 500)
    bus, gate = world.bus(relay=False), anyio.Event()

    async def slow(tx: Tx) -> None:
        await gate.wait()

    async with bus, anyio.create_task_group() as callers:
        for _ in range(LANES):
            callers.start_soon(bus.group_commit, slow)
            await anyio.sleep(0.1)
        for _ in range(500):
            callers.start_soon(bus.group_commit, lambda tx: None)
        await anyio.sleep(0.1)
        with pytest.raises(UnavailableError, match="500 writes wait for the database already"):
            await bus.group_commit(place(1))
        gate.set()


async def test_a_drain_commits_what_waits_and_takes_nothing_new(world: World) -> None:
    bus, log, gate = world.bus(relay=False), Log(), anyio.Event()

    async def slow(tx: Tx) -> str:
        log("slow")
        await gate.wait()
        return "slow"

    async def call(work) -> None:
        log(("done", await bus.group_commit(work)))

    async with anyio.create_task_group() as callers:
        async with bus:
            for _ in range(LANES):
                callers.start_soon(call, slow)
                await anyio.sleep(0.1)
            callers.start_soon(call, place(5))
            await anyio.sleep(0.1)
            callers.start_soon(bus.drain)
            await until(lambda: bus.draining)
            with pytest.raises(UnavailableError, match="the bus 'shop' is draining"):
                await bus.group_commit(place(6))
            gate.set()

    assert ("done", 5) in log.lines
    assert receipt_of(bus).clean
    assert len(world.store.outbox.rows()) == 1


async def test_nobody_waits_for_ever_on_a_bus_that_stopped_in_the_middle(world: World) -> None:
    bus, outcomes = world.bus(relay=False, grace_s=1), Log()

    async def stuck(tx: Tx) -> None:
        outcomes("stuck")
        await anyio.sleep(10_000)

    async def call(work) -> None:
        try:
            await bus.group_commit(work)
        except UnavailableError as error:
            outcomes(str(error))

    async with anyio.create_task_group() as callers:
        async with bus:
            for _ in range(LANES):
                callers.start_soon(call, stuck)
                await anyio.sleep(0.1)
            callers.start_soon(call, place(5))
            await anyio.sleep(0.1)

    assert sorted(outcomes.lines[LANES:]) == [
        "the bus was stopped before the write was begun",
        *["the bus was stopped while the write was under way; it may be done"] * LANES,
    ]
    assert not receipt_of(bus).clean


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_cancelled_future_inside_a_work_is_its_callers_error_and_ends_no_lane(world: World) -> None:
    import asyncio

    bus = world.bus(relay=False)

    async def broken(tx: Tx) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with bus:
        outcomes = await together(bus, [broken, place(1), broken, broken])
        with anyio.fail_after(10):
            assert await bus.group_commit(place(2)) == 2

    assert outcomes[1] == 1
    assert [type(outcome) for outcome in (outcomes[0], outcomes[2], outcomes[3])] == [UsageError] * 3
