"""The states of a delivery: settled once, and acknowledged only when that is safe."""

from itertools import product
from uuid import UUID

import pytest
from hypothesis import given, strategies as st

from orderbus import Batch, Delivery, Event, InvariantError, Item, Park, RetryLater
from orderbus._core.delivery import TRANSITIONS, State, Step, step


class Placed(Event, topic="orders.placed"):
    order: str


FINAL = {State.ACKED, State.RELEASED, State.REJECTED, State.DEAD_LETTERED}


@pytest.mark.parametrize(("state", "taken"), sorted(product(State, Step), key=str))
def test_what_is_not_in_the_table_is_a_bug_and_said_so(state: State, taken: Step) -> None:
    if (state, taken) in TRANSITIONS:
        assert step(state, taken) is TRANSITIONS[state, taken]
    else:
        with pytest.raises(InvariantError, match=f"a delivery that is {state.value} can't {taken.value}"):
            step(state, taken)


@given(st.lists(st.sampled_from(Step), max_size=20))
def test_no_way_through_the_table_settles_twice(steps: list[Step]) -> None:
    state, settled = State.QUEUED, 0
    for taken in steps:
        if (state, taken) in TRANSITIONS:
            state = step(state, taken)
            settled += state in FINAL

    assert settled <= 1


def test_final_states_are_final_and_every_other_one_can_be_given_back() -> None:
    for state in State:
        ways = {taken for from_state, taken in TRANSITIONS if from_state is state}
        assert ways == set() if state in FINAL else Step.GIVE_BACK in ways


def test_only_what_ran_or_was_confirmed_elsewhere_is_acknowledged() -> None:
    assert {state for (state, _), to in TRANSITIONS.items() if to is State.ACKED} == {State.RUNNING, State.LEAVING}


def items_of(count: int) -> list[Item[Placed]]:
    delivery = Delivery(UUID(int=1), "orders.placed", None, 1, {}, 0.0)
    return [Item(Placed(order=str(n)), delivery) for n in range(count)]


def test_a_batch_is_its_items_in_their_order() -> None:
    items = items_of(3)
    batch = Batch(items)

    assert [item.event.order for item in batch] == ["0", "1", "2"]
    assert list(batch) == items
    assert len(batch) == 3
    assert batch.events == [item.event for item in items]
    assert all(item.delivery.topic == "orders.placed" for item in batch)


def test_an_item_succeeds_unless_the_handler_says_otherwise() -> None:
    (item,) = items_of(1)
    assert item.outcome is None

    item.park("no stock")
    assert isinstance(item.outcome, Park)
    assert item.outcome.reason == "no stock"


@pytest.mark.parametrize("delay", [5, 0.25])
def test_an_item_is_retried_after_a_time(delay: float) -> None:
    (item,) = items_of(1)
    item.retry(delay)

    assert isinstance(item.outcome, RetryLater)
    assert item.outcome.delay_s == delay
    assert item.outcome.counted


def test_an_item_is_retried_as_the_policy_says_for_an_exception() -> None:
    (item,) = items_of(1)
    error = KeyError("x")
    item.retry(error)

    assert item.outcome is error
