"""`make release-check`: the wheel in dist/, installed with every extra into a fresh environment on each Python that is here.

Away from the checkout, so that nothing of it can help: the version, the import and its time, the command's help, the first example.
It prints what it found, and what could not be tried; it fails where something is wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import orderbus
from tests.programs import ROOT
from tests.release.api import BEFORE, LISTING, first_entry, listing, untold

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
EXAMPLE = ROOT / "examples" / "01_hello.py"
IMPORT_MS = 60.0
LIMIT_S = 300.0
TIME_IMPORT = "import time; began = time.thread_time(); import orderbus; print((time.thread_time() - began) * 1000)"
"""By the CPU's clock: what else runs on the machine is no part of it."""
SAY_VERSION = "import importlib.metadata as m, orderbus; print(orderbus.__version__, m.version('orderbus'), orderbus.__file__)"


class WrongError(Exception):
    """The text is all that there is to say."""


def main() -> int:
    wrong = list(_wrong_here())
    wheels = list((ROOT / "dist").glob(f"orderbus-{orderbus.__version__}-*.whl"))
    if not wheels:
        wrong.append(f"dist/ has no wheel of {orderbus.__version__}; run `make dist`")
    tried = 0
    for version in PYTHONS if wheels else ():
        if (python := _find(version)) is None:
            print(f"Python {version}: not tried, for it is not here")
            continue
        tried += 1
        try:
            print(f"Python {version}: {_tried(python, wheels[0])}", flush=True)
        except WrongError as error:
            wrong.append(f"Python {version}: {error}")
    if wheels and not tried:
        wrong.append(f"none of Python {', '.join(PYTHONS)} is here")
    for text in wrong:
        print(f"WRONG: {text}")
    return 1 if wrong else 0


def _wrong_here() -> Iterator[str]:
    """What the checkout itself says of the release."""
    heading = first_entry().splitlines()[0]
    if heading.split()[1] != orderbus.__version__:
        yield f"CHANGELOG.md begins with {heading!r}, but the version is {orderbus.__version__}"
    if "not released" in heading:
        print(f"Before it is released, CHANGELOG.md's first heading wants its date instead of: {heading}")
    if listing() != LISTING.read_text():
        yield "docs/api.txt is not the public API; run `make api`"
    for name in untold(LISTING, BEFORE, first_entry()):
        yield f"CHANGELOG.md's first entry does not mention {name}"


def _find(version: str) -> str | None:
    """An interpreter of that version, on the path or of pyenv."""
    of_pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in (shutil.which(f"python{version}"), *map(str, of_pyenv)):
        if candidate is not None and not subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode:
            return candidate
    return None


def _tried(python: str, wheel: Path) -> str:
    """Install it, use it; says how that went. Raises WrongError."""
    with tempfile.TemporaryDirectory(prefix="orderbus-release-") as name:
        folder = Path(name)
        began = time.monotonic()
        _run([python, "-m", "venv", "venv"], folder)
        own, command = folder / "venv" / "bin" / "python", folder / "venv" / "bin" / "orderbus"
        pip = [str(own), "-m", "pip", "--disable-pip-version-check", "-qq"]
        _run([*pip, "install", "-c", str(ROOT / "constraints.txt"), f"{wheel}[all]"], folder)
        _run([*pip, "check"], folder)
        installed_s = time.monotonic() - began

        says = _run([str(own), "-c", SAY_VERSION], folder).split()
        if says[:2] != [orderbus.__version__] * 2 or not says[2].startswith(str(folder)):
            raise WrongError(f"version and place are {' '.join(says)}, not {orderbus.__version__} in {folder}")
        if " run " not in _run([str(command), "--help"], folder):
            raise WrongError("orderbus --help does not speak of `run`")
        shutil.copy(EXAMPLE, folder)
        if not _run([str(own), EXAMPLE.name], folder).strip():
            raise WrongError(f"{EXAMPLE.name} printed nothing")
        took_ms = min(float(_run([str(own), "-c", TIME_IMPORT], folder)) for _ in range(15))
        if took_ms > IMPORT_MS:
            raise WrongError(f"`import orderbus` takes {took_ms:.0f} ms at its best of 15, and may take {IMPORT_MS:g}")
        return f"installed in {installed_s:.0f} s; version, import in {took_ms:.0f} ms, --help and {EXAMPLE.name} are as they should be"


def _run(command: list[str], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORDERBUS_", "PYTHON"))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise WrongError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
