"""The wheel, as `make dist` makes it: all of the library, nothing of its tests, and what an index wants to know."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import orderbus
from tests.programs import ROOT

PLUGIN = "orderbus_pytest.py"
"""For the tests of users."""
SOURCES = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "orderbus").rglob("*") if path.suffix in {".py", ".sql", ".typed"}
}

CORE = {"anyio", "msgspec", "opentelemetry_api", "sniffio"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built from a copy: a build in the checkout would keep what an earlier one left in build/."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "orderbus", source / "orderbus", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", PLUGIN):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", f"from setuptools import build_meta; build_meta.build_wheel({str(source / 'dist')!r})"],
        cwd=source,
        capture_output=True,
        check=True,
    )
    (built,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(built) as opened:
        yield opened


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(_read(wheel, "METADATA"))


def test_the_wheel_has_every_source_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert names == SOURCES | {PLUGIN}
    assert {"orderbus/py.typed", "orderbus/adapters/postgres/schema/0001_outbox_and_inbox.sql"} <= names


def test_the_wheel_runs_on_every_python_from_3_11_on_and_says_so(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert Path(str(wheel.filename)).name == f"orderbus-{orderbus.__version__}-py3-none-any.whl"
    assert metadata["Requires-Python"] == ">=3.11"
    pythons = [line.rpartition(" ")[2] for line in metadata.get_all("Classifier", []) if "Python :: 3." in line]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]


def test_the_wheel_needs_four_packages_and_all_has_every_extra_but_other_peoples_frameworks(metadata: Message) -> None:
    needs = metadata.get_all("Requires-Dist", [])
    extras = set(metadata.get_all("Provides-Extra", []))

    assert {re.split(r"\W", line.replace("-", "_"))[0] for line in needs if "extra ==" not in line} == CORE
    frameworks = {path.stem for path in (ROOT / "orderbus" / "ext").glob("*.py")}
    assert extras >= {"rabbitmq", "postgres", "redis", "embedded", "cli", "trio", "uvloop", "otel", "all"}
    (everything,) = [line for line in needs if line.startswith("orderbus[")]
    assert set(everything.partition("[")[2].partition("]")[0].split(",")) == extras - {"all"} - frameworks


def test_the_wheel_has_its_license_its_links_its_text_and_its_command(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["License-Expression"] == "MIT"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert _read(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert {"Changelog", "Documentation", "Issues", "Source"} <= set(links)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "orderbus = orderbus.cli:main" in _read(wheel, "entry_points.txt")


def _read(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(f"orderbus-{orderbus.__version__}.dist-info/{name}").decode()
