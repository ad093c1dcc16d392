"""The programs that are compared. Each is one readable file, tuned as its own documentation advises; see bench/README.md."""

from __future__ import annotations

import msgspec


class Peer(msgspec.Struct, frozen=True):
    """A peer's module and the packages that it needs, with what it stands for."""

    module: str
    packages: tuple[str, ...]
    what: str


PEERS = {
    "orderbus": Peer("orderbus", ("orderbus", "aiormq", "msgspec"), "orderbus on asyncio (uvloop)"),
    "orderbus-group-commit": Peer(
        "orderbus", ("orderbus", "psycopg"), "orderbus on asyncio (uvloop), writing through bus.group_commit"
    ),
    "orderbus-asyncio": Peer("orderbus_asyncio", ("orderbus",), "orderbus on asyncio's own loop"),
    "orderbus-trio": Peer("orderbus_trio", ("orderbus", "trio"), "orderbus on trio"),
    "orderbus-context": Peer(
        "orderbus_context",
        ("orderbus", "opentelemetry-api"),
        "orderbus without an SDK, a trace context in each message, none sampled",
    ),
    "orderbus-traced-0": Peer(
        "orderbus_traced_0", ("orderbus", "opentelemetry-sdk"), "orderbus with OpenTelemetry's SDK, and no message traced"
    ),
    "orderbus-traced-1": Peer(
        "orderbus_traced_1", ("orderbus", "opentelemetry-sdk"), "orderbus with OpenTelemetry's SDK, 1 % of the messages traced"
    ),
    "orderbus-traced-100": Peer("orderbus_traced_100", ("orderbus", "opentelemetry-sdk"), "the same with all messages traced"),
    "raw": Peer("raw", ("pamqp",), "the practical limit: a blocking socket and hand-made frames, no framework"),
    "aiormq": Peer("aiormq_", ("aiormq",), "aiormq used well: confirms in flight, multiple acknowledgements"),
    "aio-pika": Peer("aio_pika_", ("aio-pika",), "aio-pika"),
    "faststream": Peer("faststream_", ("faststream", "aio-pika"), "FastStream on RabbitMQ"),
    "celery": Peer("celery_", ("celery",), "Celery"),
    "taskiq": Peer("taskiq_", ("taskiq", "taskiq-aio-pika"), "taskiq with its aio-pika broker"),
    "dramatiq": Peer("dramatiq_", ("dramatiq",), "dramatiq on RabbitMQ"),
    "faststream-outbox": Peer(
        "faststream_outbox_", ("faststream-outbox", "faststream", "SQLAlchemy", "asyncpg"), "FastStream's outbox"
    ),
    "by-hand": Peer(
        "by_hand", ("faststream", "psycopg", "psycopg-pool"), "FastStream and psycopg by hand, as a good engineer writes it"
    ),
}
