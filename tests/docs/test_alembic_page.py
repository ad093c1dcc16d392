"""The page on Alembic, followed literally: its files, its commands, on a real Alembic and a real PostgreSQL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.programs import ROOT

pytestmark = pytest.mark.servers

PAGE = (ROOT / "docs" / "howto" / "alembic.md").read_text()
CONSOLE = re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CONFIGURE = "connection=connection, target_metadata=target_metadata"


@pytest.fixture
def folder(tmp_path: Path, database_url: str) -> Path:
    """A project that has migrations, and none yet."""
    run("$ alembic init migrations", tmp_path, database_url)
    settings = tmp_path / "alembic.ini"
    url = database_url.replace("postgresql:", "postgresql+psycopg:")
    settings.write_text(re.sub("^sqlalchemy.url = .*$", f"sqlalchemy.url = {url}", settings.read_text(), flags=re.MULTILINE))
    program = tmp_path / "migrations" / "env.py"
    program.write_text(
        program.read_text().replace("target_metadata = None", "from sqlalchemy import MetaData\ntarget_metadata = MetaData()")
    )
    return tmp_path


def run(block: str, folder: Path, database_url: str) -> None:
    """Each line after `$` as bash runs it; fails where one does."""
    script = "\n".join(line.removeprefix("$ ") for line in block.splitlines())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "ORDERBUS_DATABASE_URL": database_url}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_a_migration_makes_the_tables_and_alembic_leaves_them_alone(folder: Path, database_url: str) -> None:
    freeze, upgrade, look, newer = CONSOLE
    migration, include_name = PYTHON
    program = folder / "migrations" / "env.py"
    wide = f"{CONFIGURE}, include_schemas=True, include_name=include_name"
    assert wide in include_name
    program.write_text(f"{include_name}\n{program.read_text().replace(CONFIGURE, wide)}")

    run(freeze, folder, database_url)
    (folder / "migrations" / "versions" / "orderbus_1.py").write_text(migration)
    run(f"{upgrade}{look}{newer}alembic downgrade base", folder, database_url)

    with psycopg.connect(database_url) as connection:
        assert connection.execute("select to_regnamespace('orderbus')").fetchone() == (None,)
