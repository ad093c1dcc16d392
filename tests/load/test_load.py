"""The profiles and thresholds of the load tests, and one short run of a profile on real servers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from services.demo.figures import Figures
from tests.faults.world import ROOT
from tests.load.__main__ import broken
from tests.load.profiles import PROFILES

GOOD = Figures(
    mode="servers",
    seconds=10.0,
    orders_accepted=100,
    orders_completed=100,
    accepted_per_s=10.0,
    completed_per_s=10.0,
    api_p50_ms=5.0,
    api_p99_ms=200.0,
    e2e_p50_ms=50.0,
    e2e_p99_ms=2000.0,
    error_ratio=0.001,
    dlq_ratio=0.001,
    retries=0,
    lost=0,
    doubled=0,
    ghosts=0,
    oversold=0,
    money_off=0,
    cpu_us_per_order=500.0,
)


def test_what_keeps_to_the_targets_is_not_broken() -> None:
    assert broken(GOOD) == []


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"api_p99_ms": 201.0}, "API p99: 201 ms, more than 200 ms"),
        ({"e2e_p99_ms": 2001.0}, "end to end p99: 2001 ms, more than 2000 ms"),
        ({"error_ratio": 0.002}, "errors: 0.2 %, more than 0.1 %"),
        ({"dlq_ratio": 0.002}, "dead letters: 0.2 %, more than 0.1 %"),
        ({"lost": 1}, "lost: 1"),
        ({"orders_completed": 98}, "2 orders did not finish"),
        ({"orders_accepted": 0, "orders_completed": 0}, "no order was accepted"),
    ],
)
def test_a_threshold_that_is_not_kept_is_named(changed: dict[str, Any], says: str) -> None:
    assert broken(msgspec.structs.replace(GOOD, **changed)) == [says]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_a_share_at_every_moment(name: str) -> None:
    assert all(0 < PROFILES[name](at / 100) <= 1 for at in range(101))


def test_a_spike_is_five_times_what_is_before_and_after_it() -> None:
    spike = PROFILES["spike"]
    assert [spike(at) for at in (0.0, 0.39, 0.4, 0.59, 0.6, 1.0)] == [0.2, 0.2, 1.0, 1.0, 0.2, 0.2]


def test_a_ramp_never_falls() -> None:
    shares = [PROFILES["ramp"](at / 100) for at in range(101)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.1, 1.0)


@pytest.mark.servers
def test_a_profile_is_run_counted_and_reported() -> None:
    """Whether it keeps the thresholds is the machine's affair; that nothing is lost is ours."""
    report = ROOT / "build" / "load-ramp.html"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.load", "--profile", "ramp", "--rate", "60", "--seconds", "6", "--seed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    verdict = done.stdout[done.stdout.rindex("\nramp: ") :]
    assert done.returncode in (0, 1), done.stderr
    assert (done.returncode == 0) == ("all thresholds kept" in verdict)
    assert not any(word in verdict for word in ("lost:", "doubled:", "ghosts:", "did not finish")), verdict
    assert "<html" in report.read_text().lower()


def test_a_profile_that_there_is_not_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.load", "--profile", "burst"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "invalid choice: 'burst'" in done.stderr
