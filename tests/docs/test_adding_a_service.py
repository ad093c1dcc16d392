"""docs/adding-a-service.md, followed to the letter in a copy of the repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.docs.following import follow
from tests.programs import ROOT

FOLDERS = ("services", "tests/services")
FILES = ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/servers.py")


@pytest.mark.servers
def test_the_page_works_as_it_is_written(tmp_path: Path, database_url: str, vhost_url: str) -> None:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "orderbus").symlink_to(ROOT / "orderbus")  # compiled already
    environment = {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": database_url, "PYTHONPATH": str(tmp_path)}

    follow(ROOT / "docs" / "adding-a-service.md", tmp_path, environment)
