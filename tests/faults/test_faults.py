"""A few of the scenarios; `make faults` runs them all."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.__main__ import choose
from tests.faults.jobs import spread
from tests.faults.scenario import all_scenarios, run
from tests.faults.servers import Servers
from tests.faults.world import ROOT

SCENARIOS = all_scenarios()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


@pytest.mark.servers
@pytest.mark.crash
@pytest.mark.parametrize("name", [one.name for one in SCENARIOS.values() if one.is_quick])
def test_nothing_is_lost_doubled_disordered_or_wrongly_parked(servers: Servers, name: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(1_000_000))
    print(f"SEED={seed}")

    result = run(SCENARIOS[name], servers, seed, folder=tmp_path)

    assert result.passed, "\n".join(result.words)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_every_scenario_that_a_page_names_is_there(page: Path) -> None:
    for words in re.findall(r"ONLY=([\w,-]+)", page.read_text()):
        assert choose(SCENARIOS, words.split(","))


def test_a_word_that_chooses_nothing_is_named() -> None:
    with pytest.raises(SystemExit, match="no scenario has 'rely' in its name; there are: "):
        choose(SCENARIOS, ["relay", "rely"])


@pytest.mark.parametrize(("jobs", "order"), [(1, "abcde"), (2, "acbde"), (3, "abdce"), (9, "abcde")])
def test_jobs_begin_at_different_places_and_leave_nothing_out(jobs: int, order: str) -> None:
    assert spread("abcde", jobs) == list(order)
