"""docs/testing.md: each of its programs runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import anyio
import psycopg
import pytest

from orderbus.adapters.postgres import apply
from orderbus.testing import FaultName
from tests.programs import ROOT, run_tests

PAGE = (ROOT / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.DOTALL)
OWN = ("with_pytest_asyncio", "with_postgres")
ONLY_ANYIO = ("--disable-plugin-autoload", "-p", "anyio", "-p", "orderbus")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files."""
    for name, source in BLOCKS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def test_every_program_of_the_page_has_a_name_and_so_is_run() -> None:
    assert len(BLOCKS) == PAGE.count("```python")
    assert {Path(name).parts[0] for name, _ in BLOCKS if "/" in name} == set(OWN)


def test_the_page_lists_every_fault_in_order_and_no_other() -> None:
    table = PAGE.partition("## Faults by name")[2].partition("```python")[0]

    assert re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE) == list(get_args(FaultName))


def test_the_tests_of_the_page_pass_on_asyncio_and_trio(folder: Path) -> None:
    ignored = [f"--ignore={name}" for name in OWN]

    output = run_tests(folder, *ONLY_ANYIO, *ignored)

    assert "test_a_gateway_that_is_down_for_three_hours_loses_no_order[asyncio] PASSED" in output
    assert "test_a_gateway_that_is_down_for_three_hours_loses_no_order[trio] PASSED" in output
    assert "17 passed" in output


def test_the_tests_for_pytest_asyncio_pass(folder: Path) -> None:
    (folder / "conftest.py").unlink()
    arguments = ("--disable-plugin-autoload", "-p", "asyncio", "-o", "asyncio_default_fixture_loop_scope=function")

    assert "1 passed" in run_tests(folder, *arguments, "with_pytest_asyncio")


@pytest.mark.servers
def test_the_tests_on_a_real_database_pass(folder: Path, database_url: str) -> None:
    async def prepare() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await apply(connection)
            await connection.execute("create table stock (article text primary key, pieces int)")

    anyio.run(prepare)

    assert "1 passed" in run_tests(folder, *ONLY_ANYIO, "with_postgres", TEST_DATABASE_URL=database_url)
