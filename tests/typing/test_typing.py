"""What users write is checked by their type checker: good.py passes mypy --strict, bad.py fails on exactly the lines that say so.

Pyright, which many editors run, says the same of each line. It comes as basedpyright, whose wheels bring their own Node.js.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mypy import api

from tests.programs import ROOT

HERE = Path(__file__).parent
MARK = "  # E: "


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("mypy"))


def complaints(path: Path, cache: str) -> list[tuple[int, str]]:
    """(line, code) of each error in a file."""
    options = [
        "--strict",
        "--show-error-codes",
        "--no-pretty",
        "--no-error-summary",
        "--hide-error-context",
        "--cache-dir",
        cache,
    ]
    output, errors, _ = api.run([*options, str(path)])
    assert not errors
    found = re.findall(r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$", output, re.MULTILINE)
    assert {Path(name).name for name, _, _ in found} <= {path.name}, output
    return sorted((int(line), code) for _, line, code in found)


def test_good_uses_pass_with_the_types_that_they_assert(cache: str) -> None:
    assert complaints(HERE / "good.py", cache) == []


def test_bad_uses_are_refused_and_nothing_else_is(cache: str) -> None:
    path = HERE / "bad.py"
    expected = [
        (number, code.strip())
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if MARK in line
        for code in line.partition(MARK)[2].split(",")
    ]

    assert complaints(path, cache) == sorted(expected)


def test_pyright_agrees_with_mypy_on_every_line(tmp_path: Path) -> None:
    """In its standard mode, without what basedpyright adds."""
    settings = {
        "include": [str(HERE / "good.py"), str(HERE / "bad.py")],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "standard",
        "pythonVersion": "3.11",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))

    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )

    found = json.loads(done.stdout)
    lines = (HERE / "bad.py").read_text().splitlines()
    assert found["summary"]["filesAnalyzed"] == 2
    assert {(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in found["generalDiagnostics"]} == {
        ("bad.py", number) for number, line in enumerate(lines, 1) if MARK in line
    }


def test_what_is_asserted_is_true_when_it_runs_too() -> None:
    """The good file can be imported: no decorator refuses at run time what the checker lets through."""
    import tests.typing.good as good

    assert len(good.bus.handlers) == 8
    assert len(good.bus.plans()) == 8
