"""The tables: applied once by whoever comes first, checked, kept in partitions of a day, and emptied of what is too old."""

from __future__ import annotations

import asyncio
import datetime
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID, uuid4

import psycopg
import pytest

from orderbus._core.ids import uuid7
from orderbus.abc import InboxEntry, Verdict
from orderbus.adapters.postgres import PostgresStore, apply, open_store, partitions, schema_sql
from orderbus.adapters.postgres.partitions import create_partitions, partition_bounds
from orderbus.errors import TransientError, UnavailableError, UsageError
from tests.postgres.conftest import ALL, Sql, row
from tests.postgres.wire import open_postgres_wire

pytestmark = [pytest.mark.anyio, pytest.mark.servers]

DAY_S = 86_400
PARTITIONS = """select relname from pg_inherits join pg_class on oid = inhrelid
    where inhparent = 'orderbus.inbox'::regclass and relname <> 'inbox_default' order by 1"""

CONSTRAINTS = "select conname from pg_constraint where conrelid = 'orderbus.inbox_default'::regclass and contype = 'c'"
DROPPING = "lock table only orderbus.inbox in access exclusive mode"
WAITS = "select 1 from pg_stat_activity where application_name = 'tests' and wait_event_type = 'Lock'"


async def handle(store: PostgresStore, *ids: UUID) -> list[Verdict]:
    transaction = await store.begin([InboxEntry(event_id, "c", 1) for event_id in ids])
    await transaction.commit([], [])
    return list(transaction.verdicts)


def today(query: Sql) -> datetime.date:
    found: datetime.date = query("select (now() at time zone 'utc')::date")[0][0]
    return found


def an_id(day: datetime.date) -> UUID:
    return uuid7((partition_bounds(day)[0].int >> 80) + 3_600_000, 7)


async def test_appliers_take_turns_and_the_second_finds_nothing_to_do(url: str) -> None:
    async with open_store(url, name="tests") as store:
        with pytest.raises(UsageError, match=r"is missing; run `orderbus schema apply`"):
            await store.check()

        applied = await asyncio.gather(*(store.apply_schema() for _ in range(4)))

        assert sorted(applied) == [[], [], [], [1]]
        await store.check()


@pytest.mark.parametrize("by", ["store", "connection"])
async def test_a_database_made_without_a_locale_holds_any_text(postgres_url: str, by: str) -> None:
    """initdb in the locale C makes it SQL_ASCII, in which psycopg gives text as bytes unless it is told otherwise."""
    name = f"orderbus_test_{uuid4().hex[:12]}"
    url = urlunsplit(urlsplit(postgres_url)._replace(path=f"/{name}"))
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f"create database {name} encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0")
    try:
        async with open_store(url, name="tests") as store:
            if by == "store":
                await store.apply_schema()
            else:
                async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                    await apply(connection)
            await store.check()
            transaction = await store.begin([InboxEntry(uuid4(), "Käufer", 1)])
            await transaction.commit([], [row(1, key="größe")])
            page = await store.outbox.read(list(ALL), 0, 10, 1 << 20)
            assert [found.key for found in page.rows] == ["größe"]
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as server:
            server.execute(f"drop database {name} with (force)")


async def test_the_printed_sql_makes_the_same_schema(url: str, query: Sql) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(schema_sql())
    async with open_store(url, name="tests") as store:
        await store.check()
        assert await handle(store, uuid4()) == [Verdict.NEW]
        await store.maintain(7 * DAY_S)
    assert len(query(PARTITIONS)) == 9


async def test_a_database_of_a_newer_orderbus_is_refused(store: PostgresStore, query: Sql) -> None:
    query("insert into orderbus.schema_version values (999)")
    for call in (store.check, store.apply_schema):
        with pytest.raises(UsageError, match="is of version 999"):
            await call()


async def test_an_older_database_is_told_the_command(store: PostgresStore, query: Sql) -> None:
    query("update orderbus.schema_version set version = 0")
    with pytest.raises(UsageError, match="orderbus schema apply"):
        await store.check()


async def test_partitions_are_there_from_today_to_eight_days_ahead(store: PostgresStore, query: Sql) -> None:
    first = today(query)
    days = [first + datetime.timedelta(days=ahead) for ahead in range(9)]

    assert query(PARTITIONS) == [(day.strftime("inbox_%Y%m%d"),) for day in days]
    await handle(store, an_id(days[0]), an_id(days[8]), an_id(days[8] + datetime.timedelta(days=1)), uuid4())
    where = [name for (name,) in query("select tableoid::regclass::text from orderbus.inbox order by 1")]
    assert where == [
        days[0].strftime("orderbus.inbox_%Y%m%d"),
        days[8].strftime("orderbus.inbox_%Y%m%d"),
        "orderbus.inbox_default",
        "orderbus.inbox_default",
    ]


async def test_rows_of_a_day_without_a_partition_move_into_it_and_stay_known(store: PostgresStore, query: Sql) -> None:
    day = today(query)
    query(f"drop table {day.strftime('orderbus.inbox_%Y%m%d')}")
    assert await handle(store, an_id(day)) == [Verdict.NEW]

    await store.maintain(7 * DAY_S)

    assert query("select tableoid::regclass::text from orderbus.inbox") == [(day.strftime("orderbus.inbox_%Y%m%d"),)]
    assert await handle(store, an_id(day)) == [Verdict.DUPLICATE]


async def _old_partition(query: Sql, days_ago: int) -> datetime.date:
    day = today(query) - datetime.timedelta(days=days_ago)
    first, next_first = partition_bounds(day)
    name = day.strftime("orderbus.inbox_%Y%m%d")
    query(f"create table {name} partition of orderbus.inbox for values from ('{first}') to ('{next_first}')")
    return day


async def test_a_past_day_is_dropped_only_when_nothing_in_it_was_handled_inside_the_window(
    store: PostgresStore, query: Sql
) -> None:
    late, old, recent = [await _old_partition(query, days_ago) for days_ago in (20, 10, 3)]
    await handle(store, an_id(late), an_id(old), an_id(recent), uuid4())
    query("update orderbus.inbox set handled_at = now() - interval '8 days' where event_id <> %s", an_id(late))

    await store.maintain(7 * DAY_S)

    kept = {name for (name,) in query(PARTITIONS)}
    assert late.strftime("inbox_%Y%m%d") in kept
    assert old.strftime("inbox_%Y%m%d") not in kept
    assert recent.strftime("inbox_%Y%m%d") in kept
    assert query("select event_id from orderbus.inbox order by 1") == [(an_id(late),), (an_id(recent),)]


async def test_a_busy_inbox_does_not_wait_for_maintenance_nor_the_other_way_round(store: PostgresStore, query: Sql) -> None:
    """An open transaction keeps an old partition from being dropped; it is emptied, and dropped the next time."""
    old = await _old_partition(query, 10)
    await handle(store, an_id(old))
    query("update orderbus.inbox set handled_at = now() - interval '9 days'")
    busy = await store.begin([InboxEntry(an_id(today(query)), "c", 1)])

    await store.maintain(7 * DAY_S)
    assert (old.strftime("inbox_%Y%m%d"),) in query(PARTITIONS)
    await busy.commit([], [])
    await store.maintain(7 * DAY_S)

    assert (old.strftime("inbox_%Y%m%d"),) not in query(PARTITIONS)
    assert await handle(store, an_id(today(query))) == [Verdict.DUPLICATE]


async def test_many_stale_days_cost_a_busy_inbox_one_wait(store: PostgresStore, url: str, query: Sql) -> None:
    for days_ago in (10, 11, 12):
        await handle(store, an_id(await _old_partition(query, days_ago)))
    query("update orderbus.inbox set handled_at = now() - interval '9 days'")
    busy = await store.begin([InboxEntry(an_id(today(query)), "c", 1)])

    async with open_postgres_wire(url) as wire, open_store(wire.url, name="tests") as upkeep:
        await upkeep.maintain(7 * DAY_S)
        assert [sum(words in text for text in wire.statements) for words in ("truncate", DROPPING)] == [3, 1]
        wire.clear()
        await upkeep.maintain(7 * DAY_S)
        assert [sum(words in text for text in wire.statements) for words in ("truncate", DROPPING)] == [0, 1]
        assert len(query(PARTITIONS)) == 12
        await busy.commit([], [])
        wire.clear()
        await upkeep.maintain(7 * DAY_S)
        assert sum(DROPPING in text for text in wire.statements) == 1

    assert len(query(PARTITIONS)) == 9


async def test_the_first_old_day_that_is_in_use_is_waited_for_alone(store: PostgresStore, url: str, query: Sql) -> None:
    days = [await _old_partition(query, days_ago) for days_ago in (13, 12, 11, 10)]
    await handle(store, *map(an_id, days))
    query("update orderbus.inbox set handled_at = now() - interval '9 days'")
    with psycopg.connect(url) as reader:
        reader.execute(days[1].strftime("select from only orderbus.inbox_%Y%m%d").encode())

        async with open_postgres_wire(url) as wire, open_store(wire.url, name="tests") as upkeep:
            await upkeep.maintain(7 * DAY_S)
            assert sum('lock table "orderbus"."inbox_' in text for text in wire.statements) == 2
        kept = [name for (name,) in query(PARTITIONS)][:3]

    assert kept == [day.strftime("inbox_%Y%m%d") for day in days[1:]]
    await store.maintain(7 * DAY_S)
    assert len(query(PARTITIONS)) == 9


async def test_what_was_handled_within_a_day_beyond_the_window_stays(store: PostgresStore, query: Sql) -> None:
    """Whether an event is older than the window, consumers tell by clocks of their own."""
    old, foreign = an_id(await _old_partition(query, 10)), uuid4()
    await handle(store, old, foreign)
    query("update orderbus.inbox set handled_at = now() - interval '7 days 23 hours'")
    await store.maintain(7 * DAY_S)
    assert await handle(store, old, foreign) == [Verdict.DUPLICATE] * 2

    query("update orderbus.inbox set handled_at = now() - interval '8 days 1 minute'")
    await store.maintain(7 * DAY_S)
    assert query("select event_id from orderbus.inbox") == []


async def test_the_longest_window_in_use_counts_whoever_does_the_upkeep(store: PostgresStore, url: str, query: Sql) -> None:
    async with open_store(url, name="long", dedupe_window_s=30 * DAY_S) as patient:
        old, foreign = an_id(await _old_partition(query, 25)), uuid4()
        await handle(patient, old, foreign)
        query("update orderbus.inbox set handled_at = now() - interval '24 days'")

        await store.maintain(3600)
        assert await handle(patient, old, foreign) == [Verdict.DUPLICATE] * 2

        query("update orderbus.consumer set seen_at = now() - interval '30 days 23 hours'")
        await store.maintain(3600)
        assert len(query("select 1 from orderbus.inbox")) == 2

        query("update orderbus.consumer set seen_at = now() - interval '40 days'")
        await patient.maintain(30 * DAY_S)  # tells that it is there
        await store.maintain(3600)
        assert len(query("select 1 from orderbus.inbox")) == 2

    query("update orderbus.consumer set seen_at = now() - interval '31 days 1 minute'")
    await store.maintain(3600)
    assert query("select 1 from orderbus.inbox") == []


async def test_a_window_that_is_shortened_counts_at_once(url: str, store: PostgresStore, query: Sql) -> None:
    for window_s in (30 * DAY_S, 3600):
        async with open_store(url, name="tests", dedupe_window_s=window_s) as one:
            await handle(one, uuid4())
    query("update orderbus.inbox set handled_at = now() - interval '2 days'")

    await store.maintain(3600)

    assert query("select 1 from orderbus.inbox") == []


async def test_a_day_ahead_is_attached_without_reading_the_default_partition(url: str, store: PostgresStore, query: Sql) -> None:
    """Nor is a constraint left over. An id of that day that was there already moves along."""
    last, beyond = [today(query) + datetime.timedelta(days=ahead) for ahead in (8, 9)]
    query(f"drop table {last.strftime('orderbus.inbox_%Y%m%d')}")
    await handle(store, an_id(last), an_id(beyond), *(uuid4() for _ in range(100)))
    said: list[str] = []
    debug = "-c client_min_messages=debug1"
    async with await psycopg.AsyncConnection.connect(url, autocommit=True, options=debug) as upkeep:
        upkeep.add_notice_handler(lambda notice: said.append(str(notice.message_primary)))
        assert await create_partitions(upkeep) == [last.strftime("inbox_%Y%m%d")]

    assert [text for text in said if "inbox_default" in text and "implied by existing constraints" in text] != []
    assert query(CONSTRAINTS) == []
    assert query("select tableoid::regclass::text from orderbus.inbox where event_id = %s", an_id(last)) == [
        (last.strftime("orderbus.inbox_%Y%m%d"),)
    ]
    assert await handle(store, an_id(last), an_id(beyond)) == [Verdict.DUPLICATE] * 2


@pytest.mark.parametrize("ahead", [8, -3])
async def test_a_partition_that_was_begun_is_finished(store: PostgresStore, query: Sql, ahead: int) -> None:
    """Where it was begun so long ago that its day has come, too. Until then ids of that day are waited with."""
    day = today(query) + datetime.timedelta(days=ahead)
    name = day.strftime("orderbus.inbox_%Y%m%d")
    query(f"drop table if exists {name}")
    await handle(store, an_id(day))
    first, next_first = partition_bounds(day)
    query(f"alter table orderbus.inbox_default add constraint {day.strftime('inbox_default_without_%Y%m%d')} "
        f"check (event_id < '{first}' or event_id >= '{next_first}') not valid")  # fmt: skip
    query(f"create table {name} (like orderbus.inbox including all)")
    query(f"with moved as (delete from orderbus.inbox_default returning *) insert into {name} select * from moved")
    with pytest.raises(UnavailableError, match="violates check constraint") as raised:
        await handle(store, an_id(day))
    assert not isinstance(raised.value, TransientError)

    await store.maintain(7 * DAY_S)

    assert query(CONSTRAINTS) == []
    assert await handle(store, an_id(day)) == [Verdict.DUPLICATE]
    assert query("select tableoid::regclass::text from orderbus.inbox") == [(name,)]


async def test_today_stays_in_a_default_partition_that_is_too_long_to_be_read(
    store: PostgresStore, query: Sql, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "_READING_MS", 1)
    first, last = today(query), today(query) + datetime.timedelta(days=8)
    for day in (first, last):
        query(f"drop table {day.strftime('orderbus.inbox_%Y%m%d')}")
    query(
        "insert into orderbus.inbox (event_id, consumer, body_hash) select gen_random_uuid(), 1, n from generate_series(1, 300000) n"
    )
    await handle(store, an_id(first))

    await store.maintain(7 * DAY_S)

    present = [name for (name,) in query(PARTITIONS)]
    assert first.strftime("inbox_%Y%m%d") not in present
    assert last.strftime("inbox_%Y%m%d") in present
    assert await handle(store, an_id(first)) == [Verdict.DUPLICATE]


async def test_a_step_of_the_upkeep_that_fails_keeps_no_other_from_being_taken(store: PostgresStore, query: Sql) -> None:
    last = today(query) + datetime.timedelta(days=8)
    name = last.strftime("orderbus.inbox_%Y%m%d")
    query(f"drop table {name}")
    query(f"create table {name} (n integer)")
    await _old_partition(query, 10)
    await handle(store, uuid4())
    query("update orderbus.inbox set handled_at = now() - interval '9 days'")

    with pytest.raises(psycopg.Error):
        await store.maintain(7 * DAY_S)

    assert len(query(PARTITIONS)) == 8
    assert query("select 1 from orderbus.inbox") == []
    query(f"drop table {name}")
    await store.maintain(7 * DAY_S)
    assert len(query(PARTITIONS)) == 9


async def test_who_applies_the_schema_again_leaves_partitions_to_an_upkeep_that_is_at_work(
    url: str, store: PostgresStore, query: Sql
) -> None:
    query(f"drop table {(today(query) + datetime.timedelta(days=8)).strftime('orderbus.inbox_%Y%m%d')}")
    async with await psycopg.AsyncConnection.connect(url) as upkeep:
        await create_partitions(upkeep)
        assert await store.apply_schema() == []
        await upkeep.commit()
    assert len(query(PARTITIONS)) == 9


async def test_two_maintainers_do_not_collide(store: PostgresStore, query: Sql) -> None:
    query(f"drop table {today(query).strftime('orderbus.inbox_%Y%m%d')}")
    await asyncio.gather(*(store.maintain(7 * DAY_S) for _ in range(4)))
    assert len(query(PARTITIONS)) == 9


async def test_an_event_that_comes_while_the_partition_of_its_day_is_made_is_tried_again(
    url: str, store: PostgresStore, query: Sql
) -> None:
    """PostgreSQL had sent it to the default partition, which no longer takes it when its lock is free."""
    query(f"drop table {today(query).strftime('orderbus.inbox_%Y%m%d')}")
    async with await psycopg.AsyncConnection.connect(url) as upkeep:
        await create_partitions(upkeep)
        handling = asyncio.create_task(handle(store, an_id(today(query))))
        async with asyncio.timeout(10):
            while not query(WAITS):  # noqa: ASYNC110 - the server tells nobody that a lock is waited for
                await asyncio.sleep(0.001)
        await upkeep.commit()

        with pytest.raises(TransientError, match="violates partition constraint"):
            await handling

    assert await handle(store, an_id(today(query))) == [Verdict.NEW]


async def test_creating_partitions_again_creates_none(store: PostgresStore) -> None:
    transaction = await store.begin()
    assert await create_partitions(transaction.connection) == []
    await transaction.rollback()
