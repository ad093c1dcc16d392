"""Servers for the whole session, and a corner of them for each test that asks."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from tests.servers import Missing, Rabbit, find, program, start_postgres, start_rabbit, start_redis

T = TypeVar("T")


@pytest.fixture
def anyio_backend() -> str:
    """asyncio, unless a module or a test says otherwise: drivers speak nothing else."""
    return "asyncio"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A program under test may configure logging to its own stderr, which is gone when the test ends."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    root.handlers[:] = [handler for handler in root.handlers if type(handler).__module__.startswith("_pytest")]


@pytest.fixture(scope="session")
def server_stack() -> Iterator[ExitStack]:
    """Ends the private servers with the session."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="session")
def rabbit(server_stack: ExitStack) -> Rabbit:
    """A RabbitMQ server."""
    default = "amqp://guest:guest@127.0.0.1:5672/"
    node: list[Rabbit] = []

    def start(stack: ExitStack) -> str:
        node.append(start_rabbit(stack))
        return node[0].url

    url = _or_skip(lambda: find("ORDERBUS_TEST_BROKER_URL", default, start, server_stack))
    return node[0] if node else Rabbit(url, os.environ.get("ORDERBUS_TEST_RABBITMQ_NODE"))


@pytest.fixture(scope="session")
def vhost_url(rabbit: Rabbit) -> Iterator[str]:
    """The URL of a vhost that belongs to this session."""
    with ExitStack() as stack:
        yield _or_skip(lambda: stack.enter_context(rabbit.vhost(f"orderbus-test-{secrets.token_hex(4)}")))


@pytest.fixture(scope="session")
def postgres_url(server_stack: ExitStack) -> str:
    """A PostgreSQL server, as a superuser."""
    default = "postgresql://postgres@127.0.0.1:5432/postgres"
    return _or_skip(lambda: find("ORDERBUS_TEST_DATABASE_URL", default, start_postgres, server_stack))


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """An empty database of the test's own."""
    name = f"orderbus_test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        yield urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def prometheus_program() -> str:
    """Prometheus, with promtool beside it."""
    _or_skip(lambda: program("promtool", "prometheus"))
    return _or_skip(lambda: program("prometheus", "prometheus"))


@pytest.fixture(scope="session")
def redis_url(server_stack: ExitStack) -> str:
    """A Redis server; use a prefix of your own."""
    return _or_skip(lambda: find("ORDERBUS_TEST_REDIS_URL", "redis://127.0.0.1:6379/", start_redis, server_stack))


def _or_skip(get: Callable[[], T]) -> T:
    try:
        return get()
    except Missing as error:
        if os.environ.get("CI"):
            pytest.fail(f"a server is missing, and CI may not skip: {error}", pytrace=False)
        pytest.skip(f"SERVER MISSING: {error}")
