"""The how-tos work as they are written: the Python of a page is one program, and its last text block is what that prints."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from orderbus.adapters.postgres import schema_sql
from tests.programs import ROOT, run_program

pytestmark = pytest.mark.servers

BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = ["django", "fastapi", "large-bodies", "outside-api", "sqlalchemy"]


@pytest.mark.parametrize("page", PAGES)
def test_the_program_of_a_page_prints_what_the_page_says(page: str, tmp_path: Path, database_url: str) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "howto" / f"{page}.md").read_text())
    program = tmp_path / "program.py"
    program.write_text("\n\n".join(code for kind, code in blocks if kind == "python"))
    with psycopg.connect(database_url) as connection:
        connection.execute(schema_sql().encode())

    said = run_program(program, tmp_path, ORDERBUS_DATABASE_URL=database_url, ORDERBUS_BROKER_URL="memory://")

    assert said == blocks[-1][1]
