"""`make load PROFILE=steady|ramp|spike|soak`: the six services on real servers under a profile of load, with thresholds that fail the run.

With --url it is those that run already (in compose/: the profile `load`).
Exit code 0 when all thresholds are kept and everything adds up, else 1. build/load-PROFILE.html is locust's report.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from services.demo.__main__ import BUILD, measure
from services.demo.figures import Figures
from services.demo.servers import real
from tests.load.profiles import PROFILES
from tests.load.running import measure_running

API_P99_MS, END_TO_END_P99_MS = 200.0, 2_000.0
ERRORS, DEAD_LETTERS = 0.001, 0.001


def broken(figures: Figures) -> list[str]:
    """The thresholds that a run did not keep, each with what it measured."""
    found = []
    for name, value, most, unit in (
        ("API p99", figures.api_p99_ms, API_P99_MS, " ms"),
        ("end to end p99", figures.e2e_p99_ms, END_TO_END_P99_MS, " ms"),
        ("errors", 100 * figures.error_ratio, 100 * ERRORS, " %"),
        ("dead letters", 100 * figures.dlq_ratio, 100 * DEAD_LETTERS, " %"),
    ):
        if value > most:
            found.append(f"{name}: {value:g}{unit}, more than {most:g}{unit}")
    for name in ("lost", "doubled", "ghosts", "oversold", "money_off"):
        if count := getattr(figures, name):
            found.append(f"{name}: {count}")
    if not figures.orders_accepted:
        found.append("no order was accepted")
    if figures.orders_completed < figures.orders_accepted:
        found.append(f"{figures.orders_accepted - figures.orders_completed} orders did not finish")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load", description=__doc__)
    parser.add_argument("--profile", choices=sorted(PROFILES), default="steady")
    parser.add_argument("--rate", type=float, default=1500, help="orders a second of all users (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="how long the load runs (default %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument(
        "--url", help="of an API that runs already; its servers are those of ORDERBUS_BROKER_URL and _DATABASE_URL"
    )
    options = parser.parse_args()
    if not 1 <= options.rate <= 50_000 or not 5 <= options.seconds <= 86_400:
        parser.error("--rate is from 1 to 50000 orders a second, --seconds from 5 to 86400")
    console = Console(stderr=True)
    report = BUILD / f"load-{options.profile}.html"
    chosen: dict[str, Any] = {
        "rate": options.rate,
        "seconds": options.seconds,
        "seed": options.seed,
        "locustfile": Path(__file__).with_name("locustfile.py"),
        "shape": {"LOAD_PROFILE": options.profile, "LOAD_SECONDS": str(options.seconds)},
        "report": report,
    }
    if options.url:
        figures = measure_running(options.url, console, **chosen)
    else:
        with real() as servers:
            figures = measure(servers, console, **chosen)
    mistakes = broken(figures)
    print(f"\n{options.profile}: {'all thresholds kept' if not mistakes else 'FAILED'}; locust's report: {report}")
    print(*(f"  {mistake}" for mistake in mistakes), sep="\n")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
