"""A closed store leaves nothing open."""

from __future__ import annotations

import gc

import pytest

from orderbus.adapters.postgres import open_store

pytestmark = [pytest.mark.anyio, pytest.mark.servers]


@pytest.mark.filterwarnings("error")
async def test_no_connection_of_a_closed_store_is_deleted_while_open(database_url: str) -> None:
    async with open_store(database_url, name="closing-test", pool_size=2) as store:
        first, second = await store.begin(), await store.begin()
        await first.rollback()
        await second.rollback()

    gc.collect()  # psycopg warns here of each connection that is still open
