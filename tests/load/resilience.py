"""`make resilience`: payment is killed under load and stays away; orders are taken and wait; it comes back, and they finish.

Exit code 0 when nothing was lost or doubled and every order finished.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import psycopg
from rich.console import Console

from services.demo.__main__ import measure
from services.demo.servers import real

EVERY_S = 0.5


class Watch(threading.Thread):
    """Counts orders twice a second: placed, and pending."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._over = threading.Event()
        self.seen: list[tuple[float, int, int]] = []

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._over.wait(EVERY_S):
                try:
                    row = connection.execute("select count(*), count(*) filter (where status = 'pending') from orders").fetchone()
                except psycopg.errors.UndefinedTable:
                    continue
                assert row is not None
                self.seen.append((time.monotonic(), row[0], row[1]))

    def end(self) -> None:
        self._over.set()
        self.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load.resilience", description=__doc__)
    parser.add_argument("--rate", type=float, default=500, help="orders a second (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=30, help="how long the load runs (default %(default)s)")
    parser.add_argument("--away", type=float, default=8, help="how long payment stays away, in seconds (default %(default)s)")
    options = parser.parse_args()
    if not 1 <= options.away <= 0.5 * options.seconds:
        parser.error("--away is from 1 s to half of --seconds")
    with real() as servers:
        watch = Watch(servers.database_url)
        watch.start()
        figures = measure(
            servers, Console(stderr=True), rate=options.rate, seconds=options.seconds, seed=1, kill="payment", away_s=options.away
        )
        watch.end()
    most_at, _, most = max(watch.seen, key=lambda one: one[2])
    calm_s = next((at - most_at for at, _, pending in watch.seen if at > most_at and pending <= options.rate), None)
    print(f"\npayment was away for {options.away:g} s under {options.rate:g} orders/s")
    print(f"  orders that waited, at most: {most}")
    print(f"  errors that clients saw: {figures.error_ratio:.3%}")
    print(f"  from the most to less than a second's worth of waiting: {'never' if calm_s is None else f'{calm_s:.1f} s'}")
    print(f"  lost {figures.lost}, doubled {figures.doubled}, finished {figures.orders_completed} of {figures.orders_accepted}")
    is_well = (
        figures.consistent and figures.orders_completed == figures.orders_accepted and most > options.rate and calm_s is not None
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
