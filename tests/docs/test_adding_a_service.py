"""docs/adding-a-service.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.programs import ROOT

COPIED = ("services", "tests", "orderbus")


@pytest.mark.servers
def test_the_page_works_as_it_is_written(tmp_path: Path, database_url: str, vhost_url: str) -> None:
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": database_url, "PYTHONPATH": str(tmp_path)}

    follow(ROOT / "docs" / "adding-a-service.md", tmp_path, environment)
