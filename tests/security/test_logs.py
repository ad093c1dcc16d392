"""What must stay secret is planted, everything is made to fail on real servers, and then the log is searched at its lowest level."""

from __future__ import annotations

import enum
import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import anyio
import anyio.to_thread
import psycopg
import pytest
from redis.asyncio import Redis

from orderbus import Bus, Event, Retry, Settings, Tx, new_id
from orderbus._core.codec import encode
from orderbus._core.message import KEY, Incoming, Outgoing, Receipt
from orderbus._core.topology import EVENTS_EXCHANGE, bucket_of, routing_key
from orderbus.adapters.postgres import open_store
from orderbus.adapters.rabbitmq import open_broker
from orderbus.errors import OrderbusError
from tests.rabbitmq.conftest import have_closed
from tests.runtime.world import Log
from tests.servers import Rabbit, free_port

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

SUFFIX = secrets.token_hex(8)
PASSWORD, BODY, HEADER, ORDER_KEY = (f"planted-{what}-{SUFFIX}" for what in ("password", "body", "header", "key"))
MARKERS = (PASSWORD, BODY, HEADER, ORDER_KEY)


class Mood(enum.Enum):
    GOOD = "good"


class Told(Event, topic="secrets.told", key="order"):
    order: str
    text: str
    mood: Mood = Mood.GOOD


class Whispered(Event, topic="secrets.whispered", key="order"):
    order: str
    text: str


class Shown(logging.Handler):
    """All that any formatter could show: the message, its arguments, its traceback, and what was added to the record."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {self.format(record)} {record.__dict__!r}")


@pytest.fixture
def log() -> Iterator[Shown]:
    """Every logger's records from DEBUG up."""
    shown, root = Shown(), logging.getLogger()
    level = root.level
    root.addHandler(shown)
    root.setLevel(logging.DEBUG)
    yield shown
    root.removeHandler(shown)
    root.setLevel(level)


@pytest.fixture
async def settings(rabbit: Rabbit, vhost_url: str, database_url: str, redis_url: str) -> AsyncIterator[Settings]:
    """Real servers, each with a user whose password is a marker."""
    name = f"secret_{secrets.token_hex(4)}"
    vhost = urlsplit(vhost_url).path[1:]
    rabbit.ctl("add_user", name, PASSWORD)
    rabbit.ctl("set_permissions", "-p", vhost, name, ".*", ".*", ".*")
    async with open_store(database_url, name="test") as store:
        await store.apply_schema()
    with psycopg.connect(database_url) as connection:
        connection.execute("create table told (text text primary key)")
        connection.execute(f"create role {name} superuser login password '{PASSWORD}'")
    async with Redis.from_url(redis_url) as redis:
        await redis.acl_setuser(name, enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], commands=["+@all"])
        yield Settings(
            broker_url=as_user(vhost_url, name),
            database_url=as_user(database_url, name),
            redis_url=as_user(redis_url, name),
            redis_prefix=f"{name}:",
        )
        await redis.acl_deluser(name)
    rabbit.ctl("delete_user", name)
    with psycopg.connect(database_url) as connection:
        connection.execute(f"drop role {name}")


def as_user(url: str, name: str, password: str = PASSWORD) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{name}:{password}@{parts.netloc.rpartition('@')[2]}"))


def leaks(texts: list[str], markers: tuple[str, ...] = MARKERS) -> list[str]:
    return [text for text in texts if any(marker in text for marker in markers)]


def message(event: Event, body: bytes | None = None, **changes: Any) -> Outgoing:
    topic = type(event).__event_type__.topic
    event_id = changes.pop("event_id", None) or str(new_id())
    return Outgoing(
        EVENTS_EXCHANGE, routing_key(topic, bucket_of(ORDER_KEY)), encode(event, limit_bytes=1 << 20) if body is None else body,
        event_id, topic, headers={KEY: ORDER_KEY, "x-customer": HEADER}, **changes,
    )  # fmt: skip


async def test_failures_of_every_kind_leave_nothing_secret_in_the_log(
    settings: Settings, rabbit: Rabbit, vhost_url: str, database_url: str, log: Shown
) -> None:
    group = f"secrets{secrets.token_hex(4)}"
    bus = Bus(group, settings=settings)
    whispered = Log()

    @bus.on(Told, retry=Retry.exponential(first=1.0, limit=1, attempts=2))
    async def tell(event: Told, tx: Tx) -> None:
        if event.text.endswith("unlucky"):
            raise RuntimeError("no luck")
        await tx.execute("insert into told values (%s)", (event.text,))  # the second one is refused, with the row's values

    @bus.on(Whispered, guard="claims", ordered=True, retry=Retry.none())
    async def whisper(event: Whispered) -> None:
        whispered(event.text)

    told = Told(order=ORDER_KEY, text=BODY)
    one = new_id()
    sent = [
        message(told, event_id=str(one)),
        message(Told(order=ORDER_KEY, text=f"{BODY} unlucky")),
        message(told),
        message(told, b'{"order": "%b", "text": 7, "mood": "good"}' % BODY.encode()),
        message(told, b'{"order": "x", "text": "x", "mood": "%b"}' % BODY.encode()),
        message(told, b'{"order": "%b' % BODY.encode()),
        message(told, b'"%b \xff"' % BODY.encode()),
        message(told, b"[" * 100_000 + BODY.encode()),
        message(told, BODY.encode(), content_type=f"text/{BODY}"),
    ]
    async with bus, open_broker(vhost_url, name="test") as broker:
        async with bus.transaction() as tx:
            tx.emit(Whispered(order=ORDER_KEY, text=BODY))
        await whispered.reached(1)
        assert set(await broker.publish(sent)) == {Receipt.CONFIRMED}
        await have_closed(rabbit, vhost_url, group)
        with psycopg.connect(database_url) as connection:
            connection.execute(
                "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()"
            )
        async with bus.transaction() as tx:
            tx.emit(Whispered(order=ORDER_KEY, text=BODY))
        await whispered.reached(2)
        letters = await parked(broker, f"{group}.secrets.told.dlq", len(sent) - 1)

    assert not leaks(log.lines)
    assert [line for line in log.lines if "parked" in line]
    assert not leaks([repr(settings), repr(bus), str(bus.receipt)])
    for letter in letters:
        headers = letter.properties.headers
        assert headers["x-customer"] == HEADER
        assert headers[KEY] == ORDER_KEY
        ours = {name: value for name, value in headers.items() if name not in ("x-customer", KEY, "ob-error-text")}
        assert not leaks([repr(ours)])
        assert not leaks([repr(headers["ob-error-text"])], (PASSWORD, HEADER, ORDER_KEY))


async def parked(broker: Any, queue: str, count: int) -> list[Incoming]:
    with anyio.fail_after(60):
        async with broker.subscribe(queue, prefetch=count) as subscription:
            letters: list[Incoming] = []
            while len(letters) < count:
                letters += await subscription.receive()
    return letters


@pytest.mark.parametrize("server", ["broker_url", "database_url", "redis_url"])
@pytest.mark.parametrize("how", ["away", "wrong password"])
async def test_a_server_that_refuses_is_told_of_without_the_password(
    server: str, how: str, settings: Settings, log: Shown
) -> None:
    urls = {name: getattr(settings, name) for name in ("broker_url", "database_url", "redis_url")}
    parts = urlsplit(urls[server])
    place = f"127.0.0.1:{free_port()}" if how == "away" else parts.netloc.rpartition("@")[2]
    urls[server] = urlunsplit(parts._replace(netloc=f"nobody:{PASSWORD}@{place}"))
    texts = []
    try:
        bus = Bus(f"secrets{secrets.token_hex(4)}", settings=Settings(**urls))
        async with bus:
            await bus.claims.claim([("k", "f")], "token", 1000)
    except OrderbusError as error:
        texts = chain(error)

    assert texts
    assert not leaks([*texts, *log.lines, repr(Settings(**urls))])


def chain(error: BaseException | None) -> list[str]:
    return [] if error is None else [str(error), repr(error), *chain(error.__cause__ or error.__context__)]


def test_settings_do_not_show_a_password_in_the_query_either() -> None:
    shown = repr(Settings(broker_url=f"amqp://u:{PASSWORD}@h/", database_url=f"postgresql://h/d?user=u&password={PASSWORD}"))
    assert PASSWORD not in shown
