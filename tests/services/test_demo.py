"""The demo as it is run for the first time: nothing is there that an earlier run has made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec

from services.demo import queues
from services.demo.curves import CHARTS
from services.demo.figures import Figures
from services.demo.shop import SERVICES
from tests.programs import ROOT

OF_EVERY_RUN = {
    "Orders per second",
    "Orders finished per second, by status",
    "Revenue per second, cents",
    "API answers per second, by status",
    "API latency, ms",
    "End to end, ms",
    "Handled per second, by consumer",
    "Lag p99, ms, by consumer",
    "Stock, pieces of all articles",
    "Stock, pieces of the scarcest article",
}
"""Whatever the machine is like. What waits or fails may be nothing."""


def test_the_demo_runs_in_a_folder_where_nothing_was_built(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORDERBUS_")}
    done = subprocess.run(
        [sys.executable, "-m", "services.demo", "--rate", "50", "--seconds", "3", "--seed", "1"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    figures = msgspec.json.decode((tmp_path / "build" / "demo.json").read_bytes(), type=Figures)
    assert figures.orders_accepted > 0
    assert figures.consistent
    page = (tmp_path / "build" / "demo.html").read_text()
    drawn = re.findall(r"<h2>([^<]*)</h2>(?:<p>[^<]*</p>)?<svg", page)
    left_out = re.findall(r"<li>(.*?): (.*?)</li>", page)
    assert sorted([*drawn, *(title for title, _ in left_out)]) == sorted(chart.title for chart in CHARTS)
    assert set(drawn) >= OF_EVERY_RUN
    lines = (tmp_path / "build" / "demo-logs" / "together.out").read_bytes().splitlines()
    told = queues.told(msgspec.json.decode(line) for line in lines)
    assert told
    assert all(depths.keys() == set(queues.consumed(SERVICES)) for depths in told.values())
