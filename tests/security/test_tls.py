"""Encrypted connections to each server: the right certificate works; another host's, an expired one, and one that nobody knows
are refused, by one error that names the server and not the password, in bounded time."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import pytest

from orderbus.abc import ClaimState
from orderbus.adapters.postgres import open_store
from orderbus.adapters.postgres.version import server_version as postgres_version
from orderbus.adapters.rabbitmq import open_broker
from orderbus.adapters.rabbitmq.version import server_version as rabbitmq_version
from orderbus.adapters.redis import open_claims
from orderbus.adapters.redis.version import server_version as redis_version
from orderbus.errors import UnavailableError, UsageError
from tests.faults.servers import POSTGRES_USER, PostgresServer, Server, say
from tests.rabbitmq.test_hard_times import round_trip, tls_in_front_of
from tests.security.certificates import EXPIRED, Authority, Certificate
from tests.servers import free_port

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

PASSWORD = "hunter2"
LIMIT_S = 15.0

Url = Callable[[str, Path], str]
"""The URL of a server, by the host name that is asked for and the file of the authority that is trusted."""


class Kind(NamedTuple):
    """A kind of server: how an error names it, how to have one with a certificate, how to use it, and how `orderbus check` does."""

    named: str
    serving: Callable[[Certificate, str, Path], AbstractAsyncContextManager[Url]]
    use: Callable[[str], Awaitable[None]]
    check: Callable[[str], Awaitable[str]]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Readable by the user that PostgreSQL runs as, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory(prefix="orderbus-tls-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder / "ours")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder / "theirs")


@pytest.fixture(scope="module")
def right(authority: Authority) -> Certificate:
    return authority.issue("localhost")


@pytest.fixture(scope="module")
def expired(authority: Authority) -> Certificate:
    return authority.issue("localhost", EXPIRED)


def causes(error: BaseException | None) -> list[BaseException]:
    """An error and all that it came from: what a traceback would show."""
    return [] if error is None else [error, *causes(error.__cause__ or error.__context__)]


async def refused(kind: Kind, url: str, why: str) -> None:
    """Both to use it and to check it fail with one line that names the server and the reason, and the password nowhere."""
    parts = urlsplit(url)
    for connect in (kind.use, kind.check):
        with anyio.fail_after(LIMIT_S), pytest.raises(UnavailableError) as raised:
            await connect(url)
        text = str(raised.value)
        assert kind.named.format(place=f"{parts.hostname}:{parts.port}") in text
        assert re.search(why, text), text
        assert "\n" not in text
        assert not [error for error in causes(raised.value) if (parts.password or "") in f"{error!s} {error!r}"]


@pytest.fixture(params=["amqps", "postgresql", "rediss"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param == "rediss" and shutil.which("redis-server") is None:
        pytest.skip("SERVER MISSING: redis-server is not installed")
    return KINDS[request.param]


async def test_the_right_certificate_is_accepted(
    kind: Kind, vhost_url: str, folder: Path, authority: Authority, right: Certificate
) -> None:
    async with kind.serving(right, vhost_url, folder) as url:
        await kind.use(url("localhost", authority.file))
        assert await kind.check(url("localhost", authority.file))


async def test_another_host_s_certificate_is_refused(kind: Kind, vhost_url: str, folder: Path, authority: Authority) -> None:
    async with kind.serving(authority.issue("elsewhere.example"), vhost_url, folder) as url:
        await refused(kind, url("localhost", authority.file), "certificate.*localhost")


async def test_an_address_that_the_certificate_does_not_name_is_refused(
    kind: Kind, vhost_url: str, folder: Path, authority: Authority, right: Certificate
) -> None:
    async with kind.serving(right, vhost_url, folder) as url:
        await refused(kind, url("127.0.0.1", authority.file), r"certificate.*127\.0\.0\.1")


async def test_an_expired_certificate_is_refused(kind: Kind, vhost_url: str, folder: Path, authority: Authority) -> None:
    async with kind.serving(authority.issue("localhost", EXPIRED), vhost_url, folder) as url:
        await refused(kind, url("localhost", authority.file), "certificate (has expired|verify failed)")


async def test_a_certificate_of_an_unknown_issuer_is_refused(
    kind: Kind, vhost_url: str, folder: Path, stranger: Authority, right: Certificate
) -> None:
    async with kind.serving(right, vhost_url, folder) as url:
        await refused(kind, url("localhost", stranger.file), "certificate verify failed")


async def test_a_redis_url_that_would_not_check_is_refused(authority: Authority) -> None:
    for option in ("ssl_cert_reqs=none", "ssl_cert_reqs=optional", "ssl_check_hostname=false"):
        with pytest.raises(UsageError, match="ssl_ca_certs=") as raised:
            await redis_version(f"rediss://:{PASSWORD}@localhost:1/?{option}&ssl_ca_certs={authority.file}")
        assert PASSWORD not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "url"),
    [
        ("amqps", "amqps://test:hunter2@localhost:1/?cafile=/nowhere.pem"),
        ("rediss", "rediss://:hunter2@localhost:1/?ssl_ca_certs=/nowhere.pem"),
    ],
    indirect=["kind"],
)
async def test_an_issuer_s_file_that_is_not_there_is_named(kind: Kind, url: str) -> None:
    for connect in (kind.use, kind.check):
        with pytest.raises(UsageError, match=r"localhost.*/nowhere\.pem") as raised:
            await connect(url)
        assert PASSWORD not in str(raised.value)


async def talk_to_rabbitmq(url: str) -> None:
    async with open_broker(url, name="test") as broker:
        await round_trip(broker)


async def talk_to_postgres(url: str) -> None:
    async with open_store(url, name="test") as store:
        await store.apply_schema()


async def talk_to_redis(url: str) -> None:
    async with open_claims(url) as claims:
        (answer,) = await claims.claim([(secrets.token_hex(8), "f")], "token", 1000)
        assert answer.state is ClaimState.GRANTED


@asynccontextmanager
async def rabbitmq_with(certificate: Certificate, vhost_url: str, folder: Path) -> AsyncIterator[Url]:
    """TLS is ended in front of the real one, which speaks plain AMQP."""
    parts = urlsplit(vhost_url)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.file, certificate.key)
    async with tls_in_front_of(parts.hostname or "", parts.port or 5672, context) as port:
        yield lambda host, trusted: f"amqps://{parts.username}:{parts.password}@{host}:{port}{parts.path}?cafile={trusted}"


@asynccontextmanager
async def postgres_with(certificate: Certificate, vhost_url: str, folder: Path) -> AsyncIterator[Url]:
    if os.geteuid() == 0:
        shutil.chown(certificate.key, POSTGRES_USER)
    files = f"ssl_cert_file = '{certificate.file}'\nssl_key_file = '{certificate.key}'"
    server = PostgresServer(folder, name=f"postgres-{secrets.token_hex(4)}", settings=f"ssl = on\n{files}")
    async with running(server):
        options = "sslmode=verify-full&sslrootcert="
        yield lambda host, trusted: f"postgresql://postgres:{PASSWORD}@{host}:{server.port}/postgres?{options}{trusted}"


@asynccontextmanager
async def redis_with(certificate: Certificate, vhost_url: str, folder: Path) -> AsyncIterator[Url]:
    port, tls_port = free_port(), free_port()
    files = ["--tls-cert-file", str(certificate.file), "--tls-key-file", str(certificate.key), "--tls-auth-clients", "no"]
    ports = ["--bind", "127.0.0.1", "--port", str(port), "--tls-port", str(tls_port)]
    arguments = ["redis-server", *ports, *files, "--save", "", "--requirepass", PASSWORD]
    name = f"redis-{secrets.token_hex(4)}"
    async with running(Server(name, folder, arguments, lambda: b"NOAUTH" in say(port, b"PING\r\n"))):
        yield lambda host, trusted: f"rediss://:{PASSWORD}@{host}:{tls_port}/?ssl_ca_certs={trusted}"


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[None]:
    await anyio.to_thread.run_sync(server.start)
    try:
        yield
    finally:
        server.kill()


KINDS = {
    "amqps": Kind("RabbitMQ at amqps://{place}", rabbitmq_with, talk_to_rabbitmq, rabbitmq_version),
    "postgresql": Kind("PostgreSQL at {place}/postgres", postgres_with, talk_to_postgres, postgres_version),
    "rediss": Kind("Redis at {place}/0", redis_with, talk_to_redis, redis_version),
}
