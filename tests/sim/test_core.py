"""The project's own core under thousands of schedules: 10,000 each time."""

from __future__ import annotations

import pytest

from orderbus.testing.sim import Scenario, explore
from tests.sim.core import claims, effects, ordered, overrun, retries

AT_ONCE = 500
SCHEDULES = {effects: 7_000, retries: 1_000, ordered: 1_000, claims: 500, overrun: 500}
assert sum(SCHEDULES.values()) == 10_000


@pytest.mark.parametrize(
    ("scenario", "first_seed"),
    [(scenario, first) for scenario, schedules in SCHEDULES.items() for first in range(0, schedules, AT_ONCE)],
)
def test_no_schedule_breaks_a_promise(scenario: Scenario, first_seed: int) -> None:
    explored = explore(scenario, AT_ONCE, first_seed=first_seed)

    assert explored.schedules == AT_ONCE
    assert explored.decisions > AT_ONCE
    print(explored)
