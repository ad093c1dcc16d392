"""`make coverage`: the tests, and how many of the branches in orderbus/ they take, those of the programs that they start as well.

Fails below THRESHOLD where all tests ran. The pages in build/coverage/html show each branch that was not taken; a process that is
killed takes what it knew with it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.programs import ROOT

FOLDER = ROOT / "build" / "coverage"
THRESHOLD = 0.92
WORST = 15


def main() -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    tests = _coverage("run", "-m", "pytest", "-q", *sys.argv[1:])
    _coverage("combine", "--quiet")
    _coverage("html", "--quiet", "--directory", str(FOLDER / "html"))
    _coverage("json", "--quiet", "-o", str(FOLDER / "coverage.json"))
    found = json.loads((FOLDER / "coverage.json").read_text())
    files = {name: file["summary"] for name, file in found["files"].items()}
    print(f"\n{'branches not taken':<50} of all")
    for name, summary in sorted(files.items(), key=lambda file: -file[1]["missing_branches"])[:WORST]:
        print(f"{name:<50} {summary['missing_branches']:4d} of {summary['num_branches']}")
    taken, branches = found["totals"]["covered_branches"], found["totals"]["num_branches"]
    print(f"taken together: {taken} of {branches} branches, {taken / branches:.1%}")
    print(f"each of them:   {(FOLDER / 'html' / 'index.html').relative_to(ROOT)}")
    if tests or len(sys.argv) > 1:
        return tests
    return 0 if taken >= THRESHOLD * branches else 1


def _coverage(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
