"""What is looked at while the load runs: once a second, with one query, for the machine that is watched is the one that watches."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import psycopg

_LOOK = """
select placed, finished, waiting, oldest_s, pieces, scarcest
from (select count(*) as placed, count(finished_at) as finished from orders) as counted,
    (select count(*) as waiting, coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 as oldest_s
     from orderbus.outbox) as outbox,
    (select coalesce(sum(available), 0)::bigint as pieces, coalesce(min(available), 0) as scarcest from stock) as shelves"""


class Sample(NamedTuple):
    placed: int
    finished: int
    outbox_rows: int
    outbox_age_s: float
    pieces: int
    scarcest: int


class Watcher:
    """`samples` are what it has seen, by second."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.samples: dict[int, Sample] = {}

    def look(self) -> Sample:
        """What there is in this second; the database is asked at its first look."""
        second = int(time.time())
        if second not in self.samples:
            row = self._connection.execute(_LOOK).fetchone()
            assert row is not None
            self.samples[second] = Sample(*row)
        return self.samples[second]
