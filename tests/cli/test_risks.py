"""`orderbus run` warns of settings that lose or show something when it matters, and of no others."""

from __future__ import annotations

import pytest

from orderbus import Bus, Event, Retry, Settings, Tx
from orderbus.cli.risks import risks
from tests.cli.conftest import Project, ended, lines_until

SAFE = {"broker_url": "amqps://a:secret@rabbit/shop", "database_url": "postgresql://a:secret@db/shop"}


class Placed(Event, topic="orders.placed"):
    n: int


def warned(retry: Retry | None = None, **given: object) -> list[str]:
    bus = Bus("shop")

    @bus.on(Placed, retry=retry or Retry.exponential(attempts=3))
    async def pay(order: Placed, tx: Tx) -> None: ...

    return list(risks(bus, Settings(**{**SAFE, **given})))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"broker_url": "amqp://guest:guest@127.0.0.1/", "redis_url": "redis://localhost:6379/0"},
        {"database_url": None, "relay": False},
        {"broker_url": "amqp://guest:guest@127.0.0.1,[::1]:5673/"},
        {"database_url": "embedded"},
        {"redis_url": "unix:///run/redis.sock"},
        {"redis_url": "redis:///0"},
        {"database_url": "postgresql://a:secret@localhost/shop?sslmode=disable"},
        {"database_url": "postgresql:///shop?sslmode=disable"},
        {"database_url": "postgresql://db/shop?sslmode=disable&host=/run/postgresql"},
        {"relay": True, "signing_keys": None},
    ],
)
def test_what_is_safe_is_not_warned_of(given: dict[str, object]) -> None:
    assert warned(**given) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"broker_url": "memory://"}, "what waits in its queues ends with this process"),
        ({"database_url": "memory://"}, "outbox and inbox end with this process"),
        ({"relay": False}, "waits until another process relays this database"),
        ({"broker_url": "amqp://a:secret@rabbit/shop"}, "amqp://a:***@rabbit/shop: password and messages cross the network in clear; amqps://"),
        ({"broker_url": "amqp://a:secret@127.0.0.1,other:5673/shop"}, "cross the network in clear"),
        ({"redis_url": "redis://:secret@cache/0"}, "password and messages cross the network in clear; rediss://"),
        ({"database_url": "postgresql://a:secret@db/shop?sslmode=disable"}, "@db/shop with sslmode=disable"),
        ({"database_url": "postgresql:///shop?sslmode=disable&host=db&password=secret"}, "with sslmode=disable"),
    ],
)  # fmt: skip
def test_what_is_risky_is_warned_of_without_its_password(given: dict[str, object], says: str) -> None:
    [warning] = warned(**given)
    assert says in warning
    assert "secret" not in warning


def test_retries_that_outlast_the_inbox_are_warned_of() -> None:
    [warning] = warned(Retry.fixed(3600, attempts=4), dedupe_window_s=3600.0)
    assert warning.startswith("shop.orders.placed retries for 10800 s, ORDERBUS_DEDUPE_WINDOW_S is 3600")


def test_a_run_says_its_risks_beside_the_banner(project: Project) -> None:
    project.write('from orderbus import Bus\nbus = Bus("shop")')
    process = project.start("run", project.bus)
    assert process.stderr is not None
    said = "".join(lines_until(process.stderr, "running: shop"))
    process.terminate()
    assert ended(process)[0] == 0
    assert "ORDERBUS_BROKER_URL is memory://: what waits in its queues ends with this process" in said


def test_a_prefetch_of_which_the_last_may_wait_too_long_is_warned_of_with_the_numbers() -> None:
    bus = Bus("shop")

    @bus.on(Placed, concurrency=3, fuse=2, timeout=400, prefetch=19)
    async def pay(order: Placed, tx: Tx) -> None: ...

    @bus.on(Placed, name="quick", timeout=20, prefetch=500)
    async def note(order: Placed, tx: Tx) -> None: ...

    (warning,) = risks(bus, Settings(**SAFE))  # type: ignore[arg-type]
    assert warning == (
        "shop.orders.placed has prefetch=19 and timeout=400: were each of its 4 rounds to take as long, the last would be done after 1600 s, "
        "and RabbitMQ takes back what is held for 30 min; use prefetch=18 or less, or a timeout of 375 s or less"
    )
