"""A database with the tables of orderbus and one of a user's, for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.databases import prepared_database


@pytest.fixture(scope="module")
def module_url(postgres_url: str) -> Iterator[str]:
    tables = "create table payment (number int primary key, cents int not null check (cents >= 0))"
    with prepared_database(postgres_url, "ext", tables) as url:
        yield url


@pytest.fixture
def db(module_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to look at what is there; everything is empty at first."""
    with psycopg.connect(module_url, autocommit=True) as connection:
        for table in ("payment", "orderbus.inbox", "orderbus.outbox", "orderbus.stuck", "orderbus.scheduled", "orderbus.lease"):
            connection.execute(f"delete from {table}")  # to truncate the inbox with its partitions takes half a second
        yield connection
