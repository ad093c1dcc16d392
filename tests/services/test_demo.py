"""The demo as it is run for the first time: nothing is there that an earlier run has made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from services.demo.figures import Figures
from tests.programs import ROOT


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
    assert "<svg" in (tmp_path / "build" / "demo.html").read_text()
