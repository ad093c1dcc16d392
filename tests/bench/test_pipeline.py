"""The pipeline workload: how it searches, what it calls broken, and what it reports. Nothing is started."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from bench.ground import Ground
from bench.knee import LEAST, MOST, PRECISION, Knee, find_knee, hold
from bench.results import Round
from bench.running import Failed, run
from bench.workloads import Variant, Workload, pipeline
from bench.workloads.pipeline import Trial, as_round, steady_per_s
from services.demo.figures import Figures

GOOD = Figures(
    mode="servers",
    seconds=15.0,
    orders_accepted=14_900,
    orders_completed=14_900,
    accepted_per_s=993.0,
    completed_per_s=980.0,
    api_p50_ms=10.0,
    api_p99_ms=200.0,
    e2e_p50_ms=300.0,
    e2e_p99_ms=2000.0,
    error_ratio=0.001,
    dlq_ratio=0.001,
    retries=5,
    lost=0,
    doubled=0,
    ghosts=0,
    oversold=0,
    money_off=0,
    cpu_us_per_order=900.0,
)
CPU = {"payment": 100.0, "orders_api": 200.0, "postgres": 150.0, "beam.smp": 90.0, "redis-server": 10.0, "load": 300.0}


def trial(completed_per_s: float = 980.0, asked: int = 1000, **figures: Any) -> Trial:
    return Trial(asked, msgspec.structs.replace(GOOD, **figures), completed_per_s, CPU, 400.0)


def asked_of(limit: int) -> tuple[list[int], Callable[[int], bool]]:
    rates: list[int] = []

    def held(rate: int) -> bool:
        rates.append(rate)
        return rate <= limit

    return rates, held


def test_the_search_steps_up_until_a_rate_breaks_and_halves_what_is_between() -> None:
    rates, held = asked_of(1700)

    knee = find_knee(800, held)

    assert rates == [800, 1000, 1250, 1563, 1954, 1748, 1653]
    assert knee == Knee(1653, 1748)


def test_the_search_steps_down_where_the_first_rate_breaks() -> None:
    rates, held = asked_of(300)

    knee = find_knee(800, held)

    assert rates[:6] == [800, 640, 512, 409, 327, 261]
    assert knee.held <= 300 < (knee.broke or 0)


@given(limit=st.integers(LEAST, MOST - 1), first=st.integers(LEAST, MOST))
def test_the_knee_is_found_to_within_its_precision_and_no_rate_is_asked_twice(limit: int, first: int) -> None:
    rates, held = asked_of(limit)

    knee = find_knee(first, held)

    assert knee.broke is not None
    assert knee.held <= limit < knee.broke
    assert knee.broke <= max(knee.held * PRECISION, knee.held + 1)
    assert len(rates) == len(set(rates))
    assert all(LEAST <= rate <= MOST for rate in rates)


@given(limit=st.integers(0, LEAST - 1), first=st.integers(LEAST, MOST))
def test_what_holds_nothing_is_told_by_a_knee_of_0(limit: int, first: int) -> None:
    assert find_knee(first, asked_of(limit)[1]) == Knee(0, LEAST)


def test_what_never_breaks_ends_at_the_most_that_is_asked() -> None:
    assert find_knee(800, asked_of(MOST)[1]) == Knee(MOST, None)


def test_the_hold_goes_down_until_a_rate_is_held_for_longer() -> None:
    rates, held = asked_of(900)

    assert hold(Knee(1000, 1050), held) == Knee(889, 943)
    assert rates == [1000, 943, 889]


def test_a_hold_that_nothing_passes_leaves_a_knee_of_0() -> None:
    assert hold(Knee(1000, 1050), lambda rate: False).held == 0


def test_a_knee_that_is_held_keeps_the_rate_that_broke_before() -> None:
    assert hold(Knee(1000, 1050), lambda rate: True) == Knee(1000, 1050)


def test_targets_are_kept_at_their_limits() -> None:
    assert trial().broken == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"api_p99_ms": 201.0}, "API p99 201 ms"),
        ({"e2e_p99_ms": 2001.0}, "end to end p99 2001 ms"),
        ({"error_ratio": 0.002}, "errors 0.20%"),
        ({"dlq_ratio": 0.002}, "dead letters 0.20%"),
        ({"completed_per_s": 979.0}, "completed 979/s"),
        ({"lost": 1}, "lost 1"),
        ({"doubled": 1}, "doubled 1"),
        ({"ghosts": 1}, "ghosts 1"),
        ({"oversold": 1}, "oversold 1"),
        ({"money_off": 1}, "money off 1"),
    ],
)
def test_each_missed_target_breaks_a_trial_and_is_named(changed: dict[str, Any], words: str) -> None:
    assert trial(**changed).broken == [words]


def test_the_completed_rate_leaves_out_the_start_and_what_follows_the_load() -> None:
    latencies = [None, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0, None]
    completed = [1, 20, 60, 70, 100, 110, 90, 400]

    assert steady_per_s(latencies, completed) == 105


def test_a_load_too_short_to_be_counted_completes_nothing() -> None:
    assert steady_per_s([None, None], [0, 1]) == 0
    assert steady_per_s([5.0, 5.0, 5.0], [10, 10, 10]) == 0


def test_a_round_has_the_figures_of_the_last_trial_and_the_losses_of_all() -> None:
    found = as_round([trial(lost=2, doubled=1), trial(ghosts=1), trial(asked=1100, completed_per_s=1090.0)], broke=1200)

    assert (found.messages_per_s, found.more["asked"], found.more["broke_at"]) == (1090.0, 1100, 1200)
    assert (found.client_cpu_us, found.server_cpu_us, found.more["load_cpu_us"]) == (300.0, 250.0, 300.0)
    assert (found.p50_ms, found.p99_ms, found.more["e2e_p99_ms"]) == (10.0, 200.0, 2000.0)
    assert (found.lost, found.doubled, found.more["ghosts"]) == (2, 1, 1)


def test_a_rate_breaks_only_when_it_breaks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def one(variant: str, peer: str, rate: int, seconds: int) -> Trial:
        asked.append((rate, seconds))
        hiccup = asked.count((rate, seconds)) == 1
        return trial(asked=rate, completed_per_s=rate, api_p99_ms=900.0 if hiccup or rate > 1000 else 50.0)

    monkeypatch.setattr(pipeline, "trial", one)
    told: list[str] = []

    found = pipeline.measure(Variant("servers", 0), "orderbus", 1.0, told.append)

    assert asked[:6] == [(800, 15), (800, 15), (1000, 15), (1000, 15), (1250, 15), (1250, 15)]
    assert asked[-2:] == [(1000, 60), (1000, 60)]
    assert found.more["asked"] == 1000
    assert told[-1] == "pipeline, servers, orderbus: 1000/s for 60 s: held"


def test_a_shop_that_loses_orders_fails_and_is_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(pipeline, "trial", lambda variant, peer, rate, seconds: trial(asked=rate, lost=1))

    with pytest.raises(Failed, match=r"does not hold 10 orders a second: .*lost 1"):
        pipeline.measure(Variant("servers", 0), "by-hand", 1.0, told.append)

    assert told[-1] == "! pipeline, servers, by-hand: 10/s for 15 s: lost 1"


def test_a_workload_that_measures_itself_is_run_for_the_peers_that_a_variant_has() -> None:
    calls: list[tuple[str, str, float]] = []

    def measure(variant: Variant, peer: str, scale: float, tell: Callable[[str], None]) -> Round:
        calls.append((variant.name, peer, scale))
        return Round(1.0, 100, 100.0 if peer == "orderbus" else 20.0, 1.0, 1.0, 1.0, None, None, 0, 0, 0)

    both, alone = Variant("servers", 0), Variant("embedded", 0, peers=("orderbus",))
    workload = Workload(name="w", what="", peers=("orderbus", "raw"), variants=(both, alone), measure=measure)
    found = list(run(workload, workload.peers, Ground("", "", ""), rounds=2, scale=0.5, tell=lambda text: None))

    assert calls[:4] == [("servers", "orderbus", 0.5), ("servers", "raw", 0.5)] * 2
    assert calls[4:] == [("embedded", "orderbus", 0.5)] * 2
    assert [(one.variant, one.peer, one.messages_per_s) for one in found] == [
        ("servers", "orderbus", 100.0),
        ("servers", "raw", 20.0),
        ("embedded", "orderbus", 100.0),
    ]


def test_the_shop_by_hand_uses_nothing_of_orderbus_and_of_the_services() -> None:
    shop = Path(pipeline.__file__).parent.parent / "by_hand_shop"
    imported: set[str] = set()
    for path in shop.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")

    assert "faststream" in imported
    assert {name for name in imported if name.split(".")[0] in ("orderbus", "services")} == set()
    assert {name for name in imported if name.startswith("bench") and not name.startswith("bench.by_hand_shop.")} == set()
