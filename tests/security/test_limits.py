"""What the most that the limits let through costs in memory; `pytest tests/security/test_limits.py -s` prints the figures of docs/security.md."""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from orderbus import Event
from orderbus._core.codec import BodyDecoder
from orderbus._core.work import MOST_HEADER_BYTES, MOST_HEADERS
from orderbus.adapters.rabbitmq.content import DeliverySink
from orderbus.adapters.rabbitmq.encoder import MAX_BODY
from orderbus.adapters.rabbitmq.fields import decode_properties, encode_headers
from orderbus.adapters.rabbitmq.frames import FrameSplitter
from orderbus.errors import MessageError
from services.orders_api.http import Limits
from tests.faults.hostile import props
from tests.rabbitmq.hostile import deliver, frame, header
from tests.services.orders_api.served import LIMIT_S, served

MIB = 1 << 20
PREFETCH = 10_000
SLOW = 100
"""Connections that each send a body and do not finish it."""


class Worst(Event, topic="limits.worst"):
    """Of the shapes that an event may have, the one that makes the most of a byte: `{}` is 64 bytes and a pointer."""

    items: list[dict[str, int]]


def held(make: Callable[[], Any]) -> int:
    """Bytes that are there at most while it is made, and that it is not given back to."""
    gc.collect()
    tracemalloc.start()
    try:
        made = make()
        _, peak = tracemalloc.get_traced_memory()
        del made
    finally:
        tracemalloc.stop()
    return peak


def worst_body(size: int) -> bytes:
    count = (size - len(b'{"items":[]}') + 1) // 3
    return b'{"items":[' + b",".join([b"{}"] * count) + b"]}"


def test_a_body_of_the_worst_shape() -> None:
    body = worst_body(MIB)

    peak = held(lambda: BodyDecoder(Worst, limit_bytes=MIB).decode(body, None))

    print(f"\na body of 1 MiB, decoded: {peak / MIB:.0f} MiB")
    assert peak < 40 * MIB


def test_a_body_that_is_nothing_but_nesting() -> None:
    body = b'{"items":' + b"[" * (MIB - 9)

    def refused() -> None:
        with pytest.raises(MessageError):
            BodyDecoder(Worst, limit_bytes=MIB).decode(body, None)

    peak = held(refused)

    print(f"\na body of 1 MiB of nesting, refused: {peak / 1024:.0f} KiB beside it")
    assert peak < MIB


@pytest.mark.parametrize("levels", [1, 8])
def test_headers(levels: int) -> None:
    each = MOST_HEADER_BYTES // MOST_HEADERS - 20 - 10 * (levels - 1)
    table = encode_headers({f"header-{n:02d}": nested("x" * each, levels - 1) for n in range(MOST_HEADERS)})
    raw = b"\x20\x00" + len(table).to_bytes(4, "big") + table
    assert 0.8 * MOST_HEADER_BYTES < len(table) <= MOST_HEADER_BYTES

    peak = held(lambda: decode_properties(raw))

    print(f"\n{MOST_HEADERS} headers of {len(table)} bytes and {levels} levels, decoded: {peak / 1024:.0f} KiB")
    assert peak < 12 * MOST_HEADER_BYTES


def nested(value: Any, levels: int) -> Any:
    return {"n": nested(value, levels - 1)} if levels else value


def test_a_body_that_is_larger_than_any_may_be() -> None:
    size = MAX_BODY + MIB
    piece = frame(3, 1, bytes(1 << 16))

    def passed_over() -> DeliverySink:
        splitter = FrameSplitter()
        sink = DeliverySink("q", 1, decode_properties, lambda: None, MAX_BODY)
        splitter.routes[1] = sink
        splitter.feed(deliver(1, 1) + header(1, size, props(random.Random(1))))
        for _ in range(size >> 16):
            splitter.feed(piece)
        assert len(sink.arrived) == 1
        return sink

    peak = held(passed_over)

    print(f"\na body of {size // MIB} MiB, passed over: {peak / 1024:.0f} KiB")
    assert peak < MIB


def test_messages_in_hand() -> None:
    raw, body = props(random.Random(1)), b"x" * 250
    stream = b"".join(deliver(1, tag) + header(1, len(body), raw) + frame(3, 1, body) for tag in range(1, PREFETCH + 1))

    def receive() -> DeliverySink:
        splitter = FrameSplitter()
        sink = DeliverySink("q", 1, decode_properties, lambda: None, MAX_BODY)
        splitter.routes[1] = sink
        for start in range(0, len(stream), 1 << 16):
            splitter.feed(stream[start : start + (1 << 16)])
        for delivery in sink.arrived:
            _ = delivery.properties
        assert len(sink.arrived) == PREFETCH
        return sink

    peak = held(receive)

    print(f"\n{PREFETCH} messages of 250 bytes in hand, decoded: {peak / MIB:.0f} MiB")
    assert peak < 40 * MIB


@pytest.mark.anyio
@pytest.mark.servers
async def test_bodies_of_requests_that_never_end(database_url: str) -> None:
    limits = Limits()
    head = b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % limits.body_bytes
    async with served(database_url, limits) as api:
        assert (await api.client.get("/nothing")).status_code == 404  # its code is loaded
        before = rss()
        connections = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(SLOW)]
        idle = rss()
        for _, writer in connections:
            writer.write(head + bytes(limits.body_bytes - 1))
            await writer.drain()
        with anyio.move_on_after(LIMIT_S):
            while rss() - idle < 0.9 * SLOW * limits.body_bytes:  # noqa: ASYNC110 - memory does not tell
                await anyio.sleep(0.05)
        slow = rss()
        for _, writer in connections:
            writer.close()

    print(
        f"\na connection: {(idle - before) / SLOW / 1024:.0f} KiB; with a body of 1 MiB that does not end: {(slow - idle) / SLOW / MIB:.1f} MiB"
    )
    assert idle - before < SLOW * 256 * 1024
    assert slow - before < SLOW * 4 * MIB


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
