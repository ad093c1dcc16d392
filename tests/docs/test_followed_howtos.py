"""The how-tos, followed to the letter on real servers: their files written, their commands typed, what they print compared."""

from __future__ import annotations

import ast
from pathlib import Path

import psycopg
import pytest

from orderbus.adapters.postgres import apply
from tests.docs.following import BLOCK, follow
from tests.programs import ROOT

HOWTO = ROOT / "docs" / "howto"
PAGES = ["ordered-consumers", "schedule", "several-relays", "upgrade", "from-faststream", "from-celery"]


@pytest.fixture
async def prepared_url(database_url: str) -> str:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await apply(connection)
    return database_url


@pytest.mark.servers
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("page", PAGES)
async def test_a_page_works_as_it_is_written(page: str, tmp_path: Path, prepared_url: str, vhost_url: str) -> None:
    follow(HOWTO / f"{page}.md", tmp_path, {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": prepared_url})


@pytest.mark.parametrize("page", sorted(HOWTO.glob("*.md")), ids=lambda page: page.stem)
def test_every_python_block_is_a_program_that_can_be_read(page: Path) -> None:
    for language, title, text in BLOCK.findall(page.read_text()):
        if language == "python":
            compile(text, f"{page.name}: {title}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
