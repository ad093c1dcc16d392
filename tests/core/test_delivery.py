"""The states of a delivery: settled once, and acknowledged only when that is safe."""

from itertools import product

import pytest
from hypothesis import given, strategies as st

from orderbus import InvariantError
from orderbus._core.delivery import TRANSITIONS, State, Step, step

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
