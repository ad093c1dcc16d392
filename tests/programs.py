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
    return _run([str(path)], folder, settings)


def run_tests(folder: Path, *arguments: str, **environment: str) -> str:
    """What pytest prints for the tests of a user's own in a folder. Fails where one of them does, or warns."""
    return _run(["-m", "pytest", "-v", "-W", "error", *arguments], folder, environment)


def _run(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ORDERBUS_", "PYTEST_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
