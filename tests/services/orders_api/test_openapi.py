"""openapi.json says what the API does: schemathesis makes hundreds of requests from it and looks at the answers."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import anyio
import msgspec
import pytest

from services.orders_api.orders import NewOrder
from tests.services.orders_api.served import Served

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
RUN = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
OPTIONS = ["--max-examples", "30", "--checks", "all", "--generation-deterministic", "--no-color"]


async def test_the_api_does_what_its_document_says(api: Served, tmp_path: Path) -> None:
    done = await anyio.run_process(
        [sys.executable, "-c", RUN, "run", f"http://127.0.0.1:{api.port}/openapi.json", *OPTIONS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.services.orders_api.schemathesis_hooks"},
        check=False,
    )

    assert done.returncode == 0, done.stdout.decode()
    assert await api.rows("select count(*) > 0 from orders") == [(True,)]


async def test_the_document_is_made_from_the_types(api: Served) -> None:
    document = (await api.client.get("/openapi.json")).json()

    _, made = msgspec.json.schema_components([NewOrder], ref_template="#/components/schemas/{name}")
    assert document["openapi"].startswith("3.1.")
    assert msgspec.json.decode(msgspec.json.encode(made)).items() <= document["components"]["schemas"].items()


async def test_the_docs_page_needs_nothing_from_elsewhere(api: Served) -> None:
    page = await api.client.get("/docs")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", page.text)
