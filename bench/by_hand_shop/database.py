"""Connections, and the two tables that make messages reliable: what a statement needs of them, so that one round trip does it all."""

from __future__ import annotations

import os
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool

Connection = AsyncConnection[Any]
Pool = AsyncConnectionPool[Connection]

FRESH = "with fresh as (insert into inbox (consumer, event_id) values (%s, %s) on conflict do nothing returning event_id)"
"""How a statement begins that handles an event: what follows takes its values `from fresh`, where a duplicate has no row."""

OUTBOX = "insert into outbox (event_id, topic, body)"


def new_pool(size: int) -> Pool:
    """Of a fixed size, to be opened in the loop; 0 connects when it is used. In autocommit one statement needs no BEGIN and COMMIT."""
    url, options = os.environ["SHOP_DATABASE_URL"], {"autocommit": True}
    return AsyncConnectionPool(url, min_size=size, max_size=max(size, 1), timeout=10, kwargs=options, open=False)
