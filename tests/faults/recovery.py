"""`python -m tests.faults.recovery`: how long the load took to flow again, as a Markdown table made from build/faults.json."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests.faults.scenario import BUILD, Result

HEAD = "| scenario | runs | recovered in, p50 | worst |\n|---|---:|---:|---:|"


def table(results: Sequence[Result]) -> str:
    """A row for each scenario that passed; those in which nothing had to recover are left out."""
    times: dict[str, list[float]] = {}
    for result in results:
        if result.passed and result.recovery_s is not None:
            times.setdefault(result.name, []).append(result.recovery_s)
    rows = [f"| {name} | {len(took)} | {statistics.median(took):.1f} s | {max(took):.1f} s |" for name, took in times.items()]
    return "\n".join([HEAD, *rows])


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else BUILD.parent / "faults.json"
    print(table(msgspec.json.decode(path.read_bytes(), type=list[Result])))
