"""Hostile messages for the queues of `faults.placed`: what must be parked and why, and what only looks odd and is handled."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID

import msgspec

from orderbus._core.ids import uuid7
from tests.faults.ledger import PLACED
from tests.rabbitmq.strangers import (
    APP,
    CLUSTER,
    CONTENT_TYPE,
    CORRELATION,
    ENCODING,
    HEADERS,
    MESSAGE_ID,
    REPLY_TO,
    TIMESTAMP,
    TYPE,
    number,
    properties,
    short,
    text,
)

TOPIC = "faults.placed"
KEY = "stranger"
JSON = "application/json"
DEDUPE_WINDOW_S = 7 * 86_400
MIB = 1 << 20
NO_UTF8 = b"\xff\xfe"
DEEP = 100_000
EXHAUSTED = "retries-exhausted"
DROPPED = "rejected"
"""The reason of a letter that the broker has moved: the body was too large to be kept, and was rejected."""


class Hostile(NamedTuple):
    """What is sent. `reason` is that of its letter; None: it is handled as the event `n`."""

    name: str
    properties: bytes
    body: bytes
    reason: str | None
    n: int

    def is_for(self, queue: str) -> bool:
        """What only a column refuses goes to one queue only: others have other columns, or none, and other policies."""
        return self.reason != EXHAUSTED or queue == PLACED


def event_id(rng: random.Random, ago_s: float = 0.0) -> UUID:
    return uuid7(int((time.time() - ago_s) * 1000), rng.getrandbits(80))


def props(rng: random.Random, **changes: bytes | None) -> bytes:
    """Those of a healthy event, some exchanged or (None) left out."""
    parts = {CONTENT_TYPE: short(JSON), MESSAGE_ID: short(str(event_id(rng))), TYPE: short(TOPIC), HEADERS: text("ob-key", KEY)}
    for name, value in changes.items():
        flag = int(name[1:])
        if value is None:
            del parts[flag]
        else:
            parts[flag] = value
    return properties(parts)


def body(n: int, /, **changes: object) -> bytes:
    return msgspec.json.encode({"n": n, "key": KEY, "seq": 1, "does": ""} | changes)


def nested(kind: bytes, levels: int) -> bytes:
    """An entry of a header table: tables in tables, or arrays in arrays."""
    name, inner = b"" if kind == b"A" else b"\x01n", b""
    for _ in range(levels):
        inner = name + kind + struct.pack(">I", len(inner)) + inner
    return (b"" if name else b"\x01n") + inner


def all_of(rng: random.Random, first: int) -> list[Hostile]:
    """One of each kind; numbers from `first` on."""
    made: list[Hostile] = []

    def add(name: str, reason: str | None, raw: bytes, content: Callable[[int], bytes] = body) -> None:
        n = first + len(made)
        made.append(Hostile(name, raw, content(n), reason, n))

    def one(flag: int, value: bytes | None) -> bytes:
        return props(rng, **{f"_{flag}": value})

    def headers(entries: bytes) -> bytes:
        return one(HEADERS, entries)

    malformed = "malformed-properties"
    for flag, what in ((CONTENT_TYPE, "content type"), (MESSAGE_ID, "message id"), (TYPE, "type")):
        add(f"bad UTF-8 in the {what}", malformed, one(flag, short(NO_UTF8)))
    for flag, what in (
        (ENCODING, "encoding"),
        (CORRELATION, "correlation id"),
        (REPLY_TO, "reply to"),
        (APP, "app"),
        (CLUSTER, "cluster"),
    ):
        add(f"bad UTF-8 in the {what}, which nobody reads", None, one(flag, short(NO_UTF8)))
    add("bad UTF-8 in a header's name", malformed, headers(text(NO_UTF8, "x")))
    add("bad UTF-8 in a header's value", None, headers(text("x", NO_UTF8)))
    for stamp in (253402300800, 1 << 62, (1 << 64) - 1):
        add(f"timestamp {stamp}", malformed, one(TIMESTAMP, struct.pack(">Q", stamp)))
    add("timestamp of 1970", None, one(TIMESTAMP, struct.pack(">Q", 0)))
    for kind in (b"F", b"A"):
        for levels in (9, 500):
            add(f"headers nested {levels} deep in {kind.decode()}", malformed, headers(nested(kind, levels)))
    for count, reason in ((48, None), (49, "too-many-headers"), (63, "too-many-headers"), (64, malformed), (3000, malformed)):
        add(f"{count} headers", reason, headers(b"".join(number(f"h{n}", n) for n in range(count)) + text("ob-key", KEY)))
    add("headers of 14 KiB", "headers-too-large", headers(text("x", b"x" * 14_000)))

    for forged in (-1, 1_000_000, -(1 << 63), (1 << 63) - 1):
        add(f"attempt {forged}", "malformed-attempt", headers(number("ob-attempt", forged)))
    add("attempt of text", "malformed-attempt", headers(text("ob-attempt", "1")))
    add("attempt 3, which may be", None, headers(number("ob-attempt", 2)))
    add(
        "first failed in the year 292 billion, and not before it",
        None,
        headers(number("ob-first-failed-at", (1 << 63) - 1) + number("ob-not-before", (1 << 63) - 1)),
    )
    add("a version that nobody knows", None, headers(text("ob-version", "999")))

    add("no event id", "no-event-id", one(MESSAGE_ID, None))
    add("an event id that is none", "no-event-id", one(MESSAGE_ID, short("1; drop table orderbus.inbox")))
    add("an id from before the window", "older-than-window", one(MESSAGE_ID, short(str(event_id(rng, 3 * DEDUPE_WINDOW_S)))))
    add("an id from the year 10889", None, one(MESSAGE_ID, short(str(uuid7((1 << 48) - 1, rng.getrandbits(80))))))
    add("another topic", "unknown-topic", one(TYPE, short("faults.unheard-of")))
    add("no topic", None, one(TYPE, None))
    add("another content type", "unknown-content-type", one(CONTENT_TYPE, short("text/xml")))
    add("no content type", None, one(CONTENT_TYPE, None))

    healthy = lambda: props(rng)  # noqa: E731
    for what, reason, content in (
        ("empty", "undecodable", lambda n: b""),
        ("truncated", "undecodable", lambda n: body(n)[:-3]),
        ("two events", "undecodable", lambda n: body(n) * 2),
        ("UTF-16", "undecodable", lambda n: body(n).decode().encode("utf-16")),
        ("bad UTF-8", "undecodable", lambda n: body(n).replace(KEY.encode(), NO_UTF8)),
        ("half a surrogate", "undecodable", lambda n: body(n).replace(KEY.encode(), b"\\ud800")),
        ("a million brackets", "wrong-type", lambda n: b"[" * MIB),
        ("a nesting bomb in a field that nobody knows", "undecodable", lambda n: body(n)[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}"),
        ("a list", "wrong-type", lambda n: b"[%d]" % n),
        ("null", "wrong-type", lambda n: b"null"),
        ("a number as text", "wrong-type", lambda n: body(n, n=str(n))),
        ("a fraction", "wrong-type", lambda n: body(n, n=n + 0.5)),
        ("a field is missing", "wrong-type", lambda n: b'{"n":%d}' % n),
        ("over the limit", "body-too-large", lambda n: body(n, does="x" * MIB)),
        ("15 MiB", "body-too-large", lambda n: body(n, does="x" * 15 * MIB)),
        ("17 MiB", DROPPED, lambda n: body(n, does="x" * 17 * MIB)),
        ("a number twice, of which the last counts", None, lambda n: b'{"n":-1,' + body(n)[1:]),
        ("a field that nobody knows", None, lambda n: body(n, more={"x": [1, 2, 3]})),
        ("a number that no column takes", EXHAUSTED, lambda n: body(n, n=1 << 70)),
        ("a zero byte that no column takes", EXHAUSTED, lambda n: body(n, key="\0")),
    ):  # fmt: skip
        add(f"body: {what}", reason, healthy(), content)
    return made
