"""Programs of the examples and the docs, run as a user runs them: a process of its own, with no setting but its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUN_S = 120.0


def run_program(path: Path, folder: Path, **settings: str) -> str:
    """What a program prints on stdout; `settings` are in its environment. Fails where it ends with an error, or does not end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORDERBUS_")}
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=folder,
        env={**environment, **settings, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
