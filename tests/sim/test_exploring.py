"""The simulator itself: the same seed is the same run, a schedule is a text, and what breaks is said."""

from __future__ import annotations

import inspect
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import anyio
import pytest
from hypothesis import given, strategies as st

from orderbus import Bus, Park, Tx, UsageError, new_id
from orderbus.testing.sim import Fault, ViolationError, World, explore, faulty, replay
from orderbus.testing.sim.decisions import FAULTS, Decision, parse, text
from tests.programs import ROOT
from tests.sim.core import CONSUMING, Paid, Placed, effects, ordered, placing, retries


class Pool:
    """A resource."""


TRACES = """
import hashlib
from orderbus.testing.sim import replay
from tests.sim.core import claims, effects, ordered, overrun, retries
traces = [replay(scenario, str(seed)).trace for scenario in (claims, effects, ordered, overrun, retries) for seed in range(20)]
print(hashlib.sha256(repr(traces).encode()).hexdigest())
"""


@pytest.mark.parametrize("scenario", [effects, retries, ordered])
def test_the_same_seed_gives_the_same_trace_and_so_does_its_schedule(scenario: object) -> None:
    for seed in range(40):
        drawn, again = (replay(scenario, str(seed)) for _ in range(2))  # type: ignore[arg-type]
        given_back = replay(scenario, drawn.schedule)  # type: ignore[arg-type]

        assert again.trace == drawn.trace
        assert given_back.trace == drawn.trace
        assert given_back.decisions == drawn.decisions


def test_a_seed_gives_the_same_traces_in_every_process_whatever_its_hashes() -> None:
    hashes = {
        subprocess.run(
            [sys.executable, "-c", TRACES],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(hashes) == 1


decisions = st.builds(
    lambda operation, n, pick, value, process: Decision(
        process, operation, n, FAULTS[operation][pick % len(FAULTS[operation])], value
    ),
    st.sampled_from(sorted(FAULTS)),
    st.integers(1, 10**6),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0, 0.00123, 11.9]),
    st.sampled_from(["shop", "shop-2", "a_b"]),
)


@given(st.integers(), st.lists(decisions))
def test_a_schedule_is_read_as_it_was_written(seed: int, chosen: list[Decision]) -> None:
    assert parse(text(seed, chosen)) == (seed, chosen)


@pytest.mark.parametrize("wrong", ["", "seed", "1 shop", "1 shop/publish/1", "1 shop/publish/x:late", "1 shop/publish/1:eaten=3"])
def test_a_text_that_is_no_schedule_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="schedule"):
        replay(effects, wrong)


def test_a_bug_that_needs_no_fault_is_shown_without_any() -> None:
    def broken(world: World) -> None:
        placing(world, [Placed(order=1)])
        shop = Bus("shop", settings=CONSUMING)

        @shop.on(Placed)
        async def pay(order: Placed) -> None:
            raise Park("always")

        world.process(shop)

    with pytest.raises(ViolationError) as violation:
        explore(broken, 10, first_seed=3)

    shortest = violation.value.shortest.schedule
    assert shortest == f"{violation.value.found.seed} -"
    assert "innocent: orders.placed of key 1 (commit 1, event …" in str(violation.value)
    assert "was parked in shop.orders.placed.dlq: always" in str(violation.value)
    assert f"replay(broken, '{shortest}')" in str(violation.value)


def test_a_program_that_ends_with_an_error_of_its_own_is_reported_with_its_traceback() -> None:
    def broken(world: World) -> None:
        async def script(bus: Bus) -> None:
            raise ZeroDivisionError("mine")

        world.process(Bus("api"), script)

    with pytest.raises(ViolationError, match=r"failed: process api ended with ZeroDivisionError[\s\S]*in script[\s\S]*mine"):
        explore(broken, 1)


def test_work_that_never_ends_is_reported_as_stuck() -> None:
    def endless(world: World) -> None:
        placing(world, [Placed(order=1)])
        shop = Bus("shop")

        @shop.on(Placed)
        async def again(order: Placed) -> Placed:
            return Placed(order=order.order, n=order.n + 1)

        world.process(shop)
        world.limit_s = 5.0

    with pytest.raises(ViolationError, match="stuck: "):
        explore(endless, 1)


def test_a_process_that_never_ends_is_stuck_also_where_nothing_else_can_happen() -> None:
    def endless(world: World) -> None:
        shop = Bus("shop")

        @shop.resource
        async def pool() -> AsyncIterator[Pool]:
            yield Pool()
            with anyio.CancelScope(shield=True):
                await anyio.sleep_forever()

        @shop.on(Placed)
        async def note(order: Placed, pool: Pool) -> None: ...

        world.process(shop)
        world.limit_s = math.inf

    with pytest.raises(ViolationError, match=r"stuck: after .*; told to end, and still here: shop\n"):
        explore(endless, 200)


def test_an_event_published_past_the_outbox_is_no_ghost() -> None:
    def direct(world: World) -> None:
        shop = Bus("shop")

        @shop.on(Placed)
        async def note(order: Placed, tx: Tx) -> None:
            await tx.execute("insert into seen", (order.order,))

        async def script(bus: Bus) -> None:
            await bus.publish(Placed(order=1))

        world.process(shop, script)

    explore(direct, 100)


def test_queries_are_answered_as_the_scenario_says() -> None:
    def asking(world: World) -> None:
        placing(world, [Placed(order=7)])
        shop = Bus("shop", settings=CONSUMING)

        @shop.on(Placed)
        async def ask(order: Placed, tx: Tx) -> Paid | None:
            assert await tx.fetch_one("select cents", (order.order,)) == (700,)
            await tx.execute("insert into asked", (order.order,))
            return None

        world.process(shop)
        world.answer(lambda sql, params: [(params[0] * 100,)] if sql == "select cents" else [])  # type: ignore[index]

    explore(asking, 20)


def test_a_scenario_without_a_process_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"world\.process"):
        explore(lambda world: None, 1)


def test_time_and_randomness_are_those_of_the_run_and_are_given_back() -> None:
    drawn: list[tuple[object, ...]] = []

    def looking(world: World) -> None:
        async def script(bus: Bus) -> None:
            values = (time.time(), time.monotonic(), os.urandom(4), random.random(), random.Random().random(), uuid4(), new_id())
            drawn.append(values)

        world.process(Bus("api"), script)

    before = time.time()
    for _ in range(2):
        replay(looking, "1 -")

    assert drawn[0] == drawn[1]
    assert drawn[0][1] == 0.0
    assert time.time() >= before
    assert random.Random().random() != random.Random().random()


def test_each_fault_can_happen_to_something() -> None:
    assert set(Fault) == {fault for faults in FAULTS.values() for fault in faults}


def test_each_operation_that_can_fail_has_its_faults() -> None:
    """One that has none would be a KeyError in the run whose seed draws it."""
    operations = set(re.findall(r'call\(self\._victim, "([a-z-]+)"', inspect.getsource(faulty)))
    assert len(operations) > 10
    assert operations <= FAULTS.keys()


def test_a_dead_process_cleans_nothing_up() -> None:
    cleaned: list[int] = []

    def cleaning(world: World) -> None:
        placing(world, [Placed(order=1)])
        shop = Bus("shop", settings=CONSUMING)

        @shop.on(Placed)
        async def pay(order: Placed, tx: Tx) -> None:
            try:
                await tx.execute("insert into payment", (order.order,))
            finally:
                cleaned.append(order.order)

        world.process(shop)
        world.invariant(lambda: seen.append(list(cleaned)))

    seen: list[list[int]] = []
    run = replay(cleaning, "1 shop/execute/1:killed=0.1")

    assert not run.broken
    assert seen == [[1]]  # by the second life alone
