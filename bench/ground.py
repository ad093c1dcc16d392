"""The servers of a run: a vhost, a database and a prefix in Redis of its own on those of the environment, gone afterwards."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec
import psycopg
import redis

DEFAULTS = {
    "RabbitMQ": ("ORDERBUS_BROKER_URL", "amqp://guest:guest@127.0.0.1:5672/", 5672),
    "PostgreSQL": ("ORDERBUS_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres", 5432),
    "Redis": ("ORDERBUS_REDIS_URL", "redis://127.0.0.1:6379/", 6379),
}
_numbers = itertools.count(1)


class Missing(RuntimeError):
    """A server or program is not there; the text says which, and how to mend it."""


class Ground(msgspec.Struct, frozen=True):
    """Where a run may work."""

    broker_url: str
    database_url: str
    redis_url: str
    redis_prefix: str = ""

    def topic(self) -> str:
        """A name that no other job of this run has."""
        return f"t{next(_numbers)}"

    def execute(self, statement: str) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute(statement)

    def number(self, query: str) -> int:
        """The one number that a query answers."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            row = connection.execute(query).fetchone()
            return int(row[0]) if row else 0


@contextmanager
def ground(servers: frozenset[str]) -> Iterator[Ground]:
    """Make a corner on each of the named servers. Raises Missing."""
    urls = {name: os.environ.get(variable, default) for name, (variable, default, _) in DEFAULTS.items()}
    for name in sorted(servers):
        variable, _, port = DEFAULTS[name]
        parts = urlsplit(urls[name])
        try:
            socket.create_connection((parts.hostname or "127.0.0.1", parts.port or port), timeout=2).close()
        except OSError as error:
            raise Missing(
                f"{name} does not answer at {parts.hostname}:{parts.port or port} ({error}); start it, or set {variable}"
            ) from error
    with ExitStack() as stack:
        broker = stack.enter_context(_vhost(urls["RabbitMQ"])) if "RabbitMQ" in servers else ""
        database = stack.enter_context(_database(urls["PostgreSQL"])) if "PostgreSQL" in servers else ""
        if "Redis" not in servers:
            yield Ground(broker, database, "")
            return
        prefix = stack.enter_context(_redis_prefix(urls["Redis"]))
        yield Ground(broker, database, urls["Redis"], prefix)


@contextmanager
def _vhost(url: str) -> Iterator[str]:
    name = f"orderbus-bench-{os.getpid()}"
    _rabbitmqctl("add_vhost", name)
    try:
        _rabbitmqctl("set_permissions", "-p", name, urlsplit(url).username or "guest", ".*", ".*", ".*")
        yield urlunsplit(urlsplit(url)._replace(path=f"/{quote(name, safe='')}"))
    finally:
        _rabbitmqctl("delete_vhost", name)


@contextmanager
def _database(url: str) -> Iterator[str]:
    name = f"orderbus_bench_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"create database {name}")
    try:
        yield urlunsplit(urlsplit(url)._replace(path=f"/{name}"))
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"drop database {name} with (force)")


@contextmanager
def _redis_prefix(url: str) -> Iterator[str]:
    prefix = f"orderbus-bench-{os.getpid()}:"
    try:
        yield prefix
    finally:
        client: Any = redis.Redis.from_url(url, socket_timeout=5)
        with client:
            keys = iter(client.scan_iter(match=f"{prefix}*", count=5_000))
            while page := list(itertools.islice(keys, 5_000)):
                client.unlink(*page)


def _rabbitmqctl(*arguments: str) -> None:
    program = shutil.which("rabbitmqctl") or "/usr/sbin/rabbitmqctl"
    try:
        done = subprocess.run(
            [program, "-q", *arguments], capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise Missing("rabbitmqctl is not installed here, so the bench can't make itself a vhost") from error
    if done.returncode:
        raise Missing(f"rabbitmqctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
