"""A start without its servers: which, where, since when, what was tried. Real addresses, at which nothing listens."""

from __future__ import annotations

import re

import pytest

from orderbus import Bus, Settings, UnavailableError
from tests.servers import free_port

SINCE = r"tried once, for \d+\.\d s since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.anyio
async def test_a_broker_that_is_away_is_named_with_what_was_tried_and_since_when(anyio_backend: str) -> None:
    port = free_port()
    bus = Bus("shop", settings=Settings(broker_url=f"amqp://me:secret@127.0.0.1:{port}/"))

    with pytest.raises(UnavailableError) as raised:
        await bus.__aenter__()

    text = str(raised.value)
    assert re.match(rf"the bus 'shop' can't start: can't connect to RabbitMQ at amqp://127\.0\.0\.1:{port}: .+; {SINCE}: ", text)
    assert text.endswith("to connect to the broker")
    assert "secret" not in text
    assert raised.value.code == "OB801"
    assert bus.draining


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
@pytest.mark.anyio
async def test_a_database_that_is_away_is_named_with_what_was_tried_and_since_when(anyio_backend: str) -> None:
    port = free_port()
    settings = Settings(broker_url="memory://", database_url=f"postgresql://me:secret@127.0.0.1:{port}/shop")
    bus = Bus("shop", settings=settings)

    with pytest.raises(UnavailableError) as raised:
        await bus.__aenter__()

    text = str(raised.value)
    assert re.match(rf"the bus 'shop' can't start: PostgreSQL at 127\.0\.0\.1:{port}/shop: .+; {SINCE}: ", text)
    assert text.endswith("to connect to the database and to look at its schema")
    assert "secret" not in text
    assert bus.draining
