"""`make mutants`: change `orderbus/_core` in many small ways, and see whether tests/core notices each.

Prints how many of each file's mutants were killed, and fails where they are fewer than THRESHOLD of all. The survivors are listed
by `mutmut results`, and shown by `mutmut show NAME`. mutmut keeps its copy of the project in mutants/, but each run tries all
mutants of its files again: about ten in a second.

Left as they are: what a decorator wraps (properties, cached functions) and `__new__`, which mutmut never changes, and the line that
counts stack frames, since a function that mutmut changes is called through two frames of its own (pyproject.toml).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.programs import ROOT

MUTMUT = str(Path(sys.executable).with_name("mutmut"))
FILES = tuple(sorted(path.stem for path in (ROOT / "orderbus" / "_core").glob("[!_]*.py")))
THRESHOLD = 0.85
KILLED = {"killed", "timeout", "segfault", "caught by type check"}
LINE = re.compile(r"^\s*orderbus\._core\.(\w+)\.\S+: (.+)$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(FILES), help="modules of orderbus/_core, with commas")
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="stop after so long; what was not tried then counts as alive"
    )
    options = parser.parse_args()
    files = options.only.split(",")
    try:
        subprocess.run(
            [MUTMUT, "run", *(f"orderbus._core.{name}.*" for name in files)], cwd=ROOT, timeout=options.seconds, check=True
        )
    except subprocess.TimeoutExpired:
        print(f"\nstopped after {options.seconds:g} s; give it longer with --seconds, or fewer files with --only")
    listed = subprocess.run([MUTMUT, "results", "--all", "true"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = Counter((name, outcome in KILLED) for name, outcome in LINE.findall(listed))
    print(f"\n{'file':<18} killed  of all")
    for name in files:
        if found[name, True] + found[name, False] > 0:  # a file may hold nothing but records
            _print_row(f"{name}.py", found[name, True], found[name, False])
    killed, alive = (sum(found[name, is_killed] for name in files) for is_killed in (True, False))
    _print_row("together", killed, alive)
    return 0 if killed >= THRESHOLD * (killed + alive) > 0 else 1


def _print_row(name: str, killed: int, alive: int) -> None:
    print(f"{name:<18} {killed:6d}  {killed + alive:6d}  {killed / max(killed + alive, 1):4.0%}")


if __name__ == "__main__":
    sys.exit(main())
