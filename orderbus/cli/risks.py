"""What `orderbus run` warns of at the start: settings that work, and lose or show something when it matters."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from orderbus._core.handler import HOLD_LIMIT_S
from orderbus._core.settings import Settings, masked
from orderbus._runtime.bus import Bus
from orderbus._runtime.opening import scheme_of

PLAIN = {"amqp": "amqps://", "redis": "rediss://"}
HERE = ("localhost", "127.0.0.1", "::1")


def risks(bus: Bus, settings: Settings) -> Iterator[str]:
    """One sentence each: the setting, what may happen, what to write instead."""
    broker, database = settings.broker_url or "", settings.database_url
    if scheme_of(broker) == "memory":
        yield f"ORDERBUS_BROKER_URL is {broker}: what waits in its queues ends with this process; for tests and trials only"
    elif database is not None and scheme_of(database) == "memory":
        yield (
            f"ORDERBUS_DATABASE_URL is {database}: outbox and inbox end with this process, so events may be lost and effects doubled; "
            f"write postgresql://…"
        )
    if database is not None and settings.relay is False:
        yield (
            f"ORDERBUS_RELAY is off: what {bus.group} emits waits until another process relays this database; "
            f"`orderbus outbox stats` says which do"
        )
    for handler in bus.handlers:
        longest = handler.options.retry.longest_s
        if longest >= settings.dedupe_window_s and handler.options.guard in (None, "inbox"):
            yield (
                f"{handler.consumer} retries for {longest:g} s, ORDERBUS_DEDUPE_WINDOW_S is {settings.dedupe_window_s:g}: "
                f"the last tries come too late, and are parked as older-than-window; make one shorter or the other longer"
            )
    for handler in bus.handlers:
        options, most = handler.options, handler.most_prefetch
        if options.prefetch is not None and options.prefetch > most:
            rounds = -(-options.prefetch // (options.concurrency * options.fuse))
            yield (
                f"{handler.consumer} has prefetch={options.prefetch} and timeout={options.timeout_s:g}: were each of its {rounds} rounds to take "
                f"as long, the last would be done after {rounds * options.timeout_s:g} s, and RabbitMQ takes back what is held for 30 min; "
                f"use prefetch={most} or less, or a timeout of {int(HOLD_LIMIT_S * 1000 / rounds) / 1000:g} s or less"
            )
    for name, url in (("BROKER", settings.broker_url), ("REDIS", settings.redis_url)):
        if url is not None and (safe := PLAIN.get(scheme_of(url))) and not _is_here(url):
            yield f"ORDERBUS_{name}_URL is {masked(url)}: password and messages cross the network in clear; {safe} encrypts"
    if database is not None and "sslmode=disable" in urlsplit(database).query and not _is_here(database):
        yield f"ORDERBUS_DATABASE_URL is {masked(database)} with sslmode=disable: password and rows cross the network in clear"


def _is_here(url: str) -> bool:
    """Whether what it names is on this machine; so are PostgreSQL and Redis where it names no host, and a socket's path."""
    return all(host in HERE or host.startswith(("/", "%2f")) for host in _hosts(url))


def _hosts(url: str) -> Iterator[str]:
    """Of a URL that may name several: `amqp://user:password@one,two:5673/vhost`; libpq takes them in its query as well."""
    parts = urlsplit(url)
    if parts.scheme.startswith("postgres") and (hosts := parse_qs(parts.query).get("host")):
        yield from hosts[-1].split(",")
        return
    for host in parts.netloc.rpartition("@")[2].split(","):
        yield urlsplit(f"//{host}").hostname or "localhost"
