"""Each bug that a library of this kind may have is put in, and the simulator must find it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import anyio
import pytest

from orderbus import Bus, Tx
from orderbus._core.delivery import Step
from orderbus._core.message import Settlement
from orderbus._core.work import AnyOrder, KeyOrder
from orderbus._runtime import engine, relay
from orderbus._runtime.consumer import Consumer
from orderbus._runtime.engine import Engine
from orderbus._runtime.guard import ClaimsGuard
from orderbus._runtime.leaving import Leaving
from orderbus._runtime.relay import Relay
from orderbus._runtime.session import Session
from orderbus.abc import OutboxPage, Verdict
from orderbus.adapters.memory.claims import MemoryClaims
from orderbus.adapters.memory.outbox import MemoryOutbox
from orderbus.adapters.memory.store import MemoryStore, MemoryTransaction
from orderbus.errors import UnavailableError
from orderbus.testing.sim import Scenario, ViolationError, World, explore, replay
from tests.sim.core import CONSUMING, Placed, claims, effects, ordered, overrun, placing, retries

SCHEDULES = 1_500


def caught(scenario: Scenario) -> str:
    """What the simulator says of the bug: found, and shown by a schedule that shows it again."""
    with pytest.raises(ViolationError) as violation:
        explore(scenario, SCHEDULES)
    shortest = violation.value.shortest
    again = replay(scenario, shortest.schedule)
    assert (again.broken, again.trace) == (shortest.broken, shortest.trace)
    assert len(shortest.decisions) <= 3, f"could be shorter: {violation.value}"
    return str(violation.value)


def test_an_ack_before_the_commit_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded = Session._guarded

    async def ack_first(session: Session, guard: Any, works: Any) -> Any:
        for work in works:
            session._subscription.settle(work.incoming, Settlement.ACK)
        return await guarded(session, guard, works)

    def settled_already(session: Session, work: Any, taken: Any) -> None:
        work.take(taken)
        session._intake.done(work)

    monkeypatch.setattr(Session, "_guarded", ack_first)
    monkeypatch.setattr(Session, "_settle", settled_already)

    assert "lost: orders.p" in caught(effects)


def test_a_relay_that_deletes_before_the_confirm_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Relay._publish

    async def delete_first(self: Relay, rows: Sequence[Any]) -> Any:
        await self._delete(rows)
        return await publish(self, rows)

    monkeypatch.setattr(Relay, "_publish", delete_first)

    assert "was committed, and never published" in caught(effects)


def test_a_retry_without_its_confirm_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def publish(self: Leaving, batch: Sequence[Any]) -> None:
        with suppress(UnavailableError):
            await self._env.broker.publish([outgoing for _, outgoing in batch])
        for work, _ in batch:
            self.count -= 1
            self._settle(work, Step.FINISH)

    monkeypatch.setattr(Leaving, "_publish", publish)

    assert "was neither handled nor parked" in caught(retries)


def test_a_claim_without_a_token_of_its_own_is_held_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "everybody's")

    assert "was granted while another held it" in caught(claims)


def test_a_claim_that_anybody_may_release_is_held_by_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(self: MemoryClaims, key: str, token: str, now: float) -> Any:
        claim = self.table.claims.get(self._prefix + key)
        return None if claim is None or claim.answer is not None else claim

    monkeypatch.setattr(MemoryClaims, "_held", held)

    assert "was granted while another held it" in caught(overrun)


def test_a_guard_that_takes_every_answer_for_a_claim_handles_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = ClaimsGuard._claim

    async def all_granted(self: ClaimsGuard, works: Sequence[Any], outcomes: Any) -> Any:
        _, token = await claim(self, works, outcomes)
        return list(works), token

    monkeypatch.setattr(ClaimsGuard, "_claim", all_granted)

    found = caught(claims)

    assert "doubled: ob:inbox:mail.orders.placed:" in found
    assert "was handled without its claim" in found


def test_a_handler_that_writes_past_its_tx_writes_twice() -> None:
    def not_idempotent(world: World) -> None:
        placing(world, [Placed(order=1), Placed(order=2)])
        shop = Bus("shop", settings=CONSUMING)
        written: list[int] = []

        @shop.on(Placed)
        async def write(order: Placed, tx: Tx) -> None:
            written.append(order.order)
            await tx.execute("insert into payment", (order.order,))

        def each_once() -> None:
            assert len(written) == len(set(written)), f"written: {written}"

        world.process(shop)
        world.invariant(each_once)

    assert "invariant: written: [1, " in caught(not_idempotent)


def test_an_inbox_that_lets_everything_pass_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    async def enter(self: MemoryStore, transaction: MemoryTransaction, entry: Any) -> Verdict:
        transaction.entered[entry.event_id, entry.consumer] = entry.body_hash
        return Verdict.NEW

    monkeypatch.setattr(MemoryStore, "_enter", enter)

    assert "was handled 2 times by shop.orders" in caught(effects)


def test_events_that_are_there_before_the_commit_are_ghosts(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = MemoryTransaction.commit

    async def insert_first(self: MemoryTransaction, deferred: Any, emitted: Any, forget: Any = ()) -> None:
        self._store.outbox.insert(emitted)
        await commit(self, deferred, (), forget)

    monkeypatch.setattr(MemoryTransaction, "commit", insert_first)

    assert "ghost: " in caught(effects)


def test_two_unconfirmed_events_of_a_key_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "first_per_key", lambda rows, waiting=(): [row for row in rows if row.key not in waiting])

    assert "was published after a later one of its key" in caught(ordered)


def test_an_outbox_that_is_read_backwards_publishes_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    read = MemoryOutbox.read

    async def backwards(self: MemoryOutbox, *wanted: Any, **more: Any) -> OutboxPage:
        page = await read(self, *wanted, **more)
        return OutboxPage(page.rows[::-1], page.xmin, 0)

    monkeypatch.setattr(MemoryOutbox, "read", backwards)

    assert "was published after a later one of its key" in caught(ordered)


def test_an_ordered_handler_that_does_not_wait_handles_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyOrder, "add", AnyOrder.add)

    assert "disordered: shop.orders" in caught(ordered)


def test_a_missing_server_that_counts_as_a_failure_parks_innocents(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Session._failed

    def count_all(self: Session, work: Any, error: Exception, leaving: Any) -> None:
        failed(self, work, RuntimeError(str(error)), leaving)

    monkeypatch.setattr(Session, "_failed", count_all)

    assert "innocent: orders.p" in caught(effects)


def test_a_drain_that_acks_what_it_has_not_begun_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def ack(self: Session, work: Any) -> None:
        self._subscription.settle(work.incoming, Settlement.ACK)

    def busy(world: World) -> None:
        placing(world, [Placed(order=order) for order in range(6)])
        shop = Bus("shop", settings=CONSUMING)

        @shop.on(Placed, concurrency=1)
        async def pay(order: Placed, tx: Tx) -> None:
            await anyio.sleep(0.5)
            await tx.execute("insert into payment", (order.order,))

        world.process(shop)

    monkeypatch.setattr(Session, "_give_back", ack)

    assert "was neither handled nor parked" in caught(busy)


def test_a_consumer_that_forgets_what_it_has_received_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "_wait", lambda self, work, delay_s: None)

    assert "stuck: " in caught(effects)


async def consumers_never_done(run: Any, done: anyio.Event) -> None:
    await run()
    if not isinstance(run.__self__, Consumer):
        done.set()


def test_a_consumer_that_never_says_that_it_is_done_drains_uncleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_ending", consumers_never_done)

    found = caught(effects)

    assert "unclean: the drain of process shop was not clean after " in found


def test_a_consumer_that_goes_on_receiving_drains_only_with_the_grace_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "stop", lambda self: None)

    assert "unclean: the drain of process shop took its grace time of 20 s, though nothing ran" in caught(effects)


def test_a_drain_that_waits_without_an_end_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    async def without_a_limit(self: Engine) -> int:
        for consumer, _ in self._consumers:
            consumer.stop()
        for _, done in self._consumers:
            await done.wait()
        return 0

    def idle(world: World) -> None:
        shop = Bus("shop", settings=CONSUMING)

        @shop.on(Placed)
        async def pay(order: Placed, tx: Tx) -> None: ...

        world.process(shop)

    monkeypatch.setattr(engine, "_ending", consumers_never_done)
    monkeypatch.setattr(Engine, "_stop_work", without_a_limit)

    assert "there is work left: none in the queues; 0 in the outbox; told to end, and still here: shop" in caught(idle)
