"""Where a process dies, as the server sees it: numbers taken from a sequence stay taken, whether or not anybody commits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple, NoReturn

import psycopg
import pytest

from orderbus.abc import Deferred, InboxEntry
from orderbus.adapters.postgres import PostgresStore, open_store, transaction
from orderbus.adapters.postgres.transaction import PostgresTransaction
from tests.faults import failpoints
from tests.faults.failpoints import NTH
from tests.postgres.conftest import event_id, row

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

SEEN = """\
select (select count(*) from effect), (select last_value from effect_id_seq),
    (select count(*) from orderbus.outbox), (select last_value from orderbus.outbox_id_seq)"""


class Dead(Exception):
    """What the tests have instead of a SIGKILL."""


class Seen(NamedTuple):
    """Rows that are there for others, and rows that the server was told of."""

    effects: int
    effects_sent: int
    events: int
    events_sent: int


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[PostgresStore]:
    async with open_store(database_url, name="tests", lock_timeout_ms=2_000) as store:
        await store.apply_schema()
        begun = await store.begin()
        await begun.execute("create table effect (id bigint generated always as identity, n bigint)", ())
        await begun.commit([], [])
        yield store


@pytest.fixture
def at_death(database_url: str, monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """What the server says at the moment at which the process would die. Everything that failpoints patch is put back."""
    seen: list[Seen] = []

    def die() -> NoReturn:
        with psycopg.connect(database_url) as other:
            seen.extend(Seen(*found) for found in other.execute(SEEN))
        raise Dead

    monkeypatch.setattr(failpoints, "die", die)
    monkeypatch.setattr(failpoints, "writes_at_once", False)
    monkeypatch.setattr(transaction, "trip", transaction.trip)
    monkeypatch.setattr(PostgresTransaction, "execute", PostgresTransaction.execute)
    return seen


async def handle(store: PostgresStore) -> None:
    """One event after the other: its row in the inbox, its effect, and an event of its own."""
    insert = "insert into effect (n) select n from unnest(%s::bigint[]) g (n)"
    for n in range(2 * NTH):
        begun = await store.begin([InboxEntry(event_id(n), "handler", 1)])
        try:
            if failpoints.writes_at_once:
                await begun.execute(insert, [[n]])
            deferred = [] if failpoints.writes_at_once else [Deferred(insert, (n,), is_row=True)]
            await begun.commit(deferred, [row(n)])
        finally:
            await begun.rollback()


async def test_when_everything_is_sent_the_server_has_effect_and_event_and_nobody_sees_them(
    store: PostgresStore, at_death: list[Seen]
) -> None:
    failpoints.everything_sent()

    with pytest.raises(Dead):
        await handle(store)

    assert at_death == [Seen(effects=NTH - 1, effects_sent=NTH, events=NTH - 1, events_sent=NTH)]


async def test_when_the_effect_is_written_the_server_has_it_and_no_event(store: PostgresStore, at_death: list[Seen]) -> None:
    failpoints.effect_written()

    with pytest.raises(Dead):
        await handle(store)

    assert at_death == [Seen(effects=NTH - 1, effects_sent=NTH, events=NTH - 1, events_sent=NTH - 1)]
