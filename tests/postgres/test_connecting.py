"""Servers that are away, wrong addresses, and what the errors say: host, port and database, never the password."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from urllib.parse import urlencode

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from orderbus.adapters.postgres import open_store
from orderbus.adapters.postgres.errors import classify, first_error
from orderbus.errors import UnavailableError, UsageError
from tests.postgres.conftest import Sql
from tests.servers import free_port

pytestmark = pytest.mark.anyio


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port where connections are accepted and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def test_a_server_that_is_down_is_named_without_its_password() -> None:
    port = free_port()
    with pytest.raises(UnavailableError) as raised:
        async with open_store(f"postgresql://ann:hunter2@127.0.0.1:{port}/shop", name="t"):
            pass

    assert f"PostgreSQL at 127.0.0.1:{port}/shop" in str(raised.value)
    assert "hunter2" not in f"{raised.value!r} {raised.value.__cause__!r}"


async def test_a_server_that_does_not_answer_is_given_up(silent_port: int) -> None:
    with pytest.raises(UnavailableError, match=rf"127\.0\.0\.1:{silent_port}/shop: no answer within 0\.1 s"):
        async with open_store(f"postgresql://ann:hunter2@127.0.0.1:{silent_port}/shop", name="t", connect_s=0.1):
            pass


@pytest.mark.servers
async def test_of_two_hosts_the_one_that_is_there_and_takes_writes_is_used(database_url: str) -> None:
    there = conninfo_to_dict(database_url)
    hosts = {"host": f"127.0.0.1,{there['host']}", "port": f"{free_port()},{there.get('port') or 5432}"}
    url = f"postgresql://?{urlencode({**there, **hosts, 'target_session_attrs': 'read-write'})}"
    async with open_store(url, name="t") as store:
        transaction = await store.begin()
        assert (await transaction.execute("select 1", ()))[0] == [(1,)]
        await transaction.rollback()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2%ZZ@127.0.0.1/shop",
        "postgresql://ann:hunter2@127.0.0.1:port/shop",
        "postgresql://ann:hunter2@127.0.0.1/shop?wrong=hunter2",
        "mysql://ann:hunter2@127.0.0.1/shop",
    ],
)
async def test_a_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises((UsageError, UnavailableError)) as raised:
        async with open_store(url, name="t"):
            pass

    assert "hunter2" not in f"{raised.value!r} {raised.value.__cause__!r}"


async def test_a_pool_without_places_is_refused() -> None:
    with pytest.raises(UsageError, match="pool_size=0: at least 1"):
        async with open_store("postgresql://127.0.0.1/shop", name="t", pool_size=0):
            pass


@pytest.mark.servers
async def test_the_servers_own_limits_are_set_and_the_url_goes_before(url: str, query: Sql) -> None:
    with_options = psycopg.conninfo.make_conninfo(url, options="-c lock_timeout=77")
    async with open_store(with_options, name="limits", statement_timeout_ms=4_000, idle_in_transaction_ms=9_000) as store:
        transaction = await store.begin()
        rows, _ = await transaction.execute(
            "select current_setting(name) from unnest(%s::text[]) as name",
            (["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "application_name"],),
        )
        await transaction.rollback()

    assert [value for (value,) in rows] == ["4s", "77ms", "9s", "limits"]


@pytest.mark.servers
async def test_a_statement_over_its_time_is_the_statements_own_error(url: str) -> None:
    async with open_store(url, name="t", statement_timeout_ms=500) as store:
        transaction = await store.begin()
        with pytest.raises(psycopg.errors.QueryCanceled):
            await transaction.execute("select pg_sleep(60)", ())
        await transaction.rollback()
        await (await store.begin()).rollback()


@pytest.mark.servers
async def test_a_transaction_left_idle_is_ended_by_the_server(url: str, query: Sql) -> None:
    async with open_store(url, name="idle-one", idle_in_transaction_ms=1) as store:
        transaction = await store.begin()
        async with asyncio.timeout(20):
            while await asyncio.to_thread(query, "select 1 from pg_stat_activity where application_name = 'idle-one'"):
                pass
        with pytest.raises(UnavailableError):
            await transaction.commit([], [])


@pytest.mark.servers
async def test_a_server_without_a_free_connection_is_unavailable(url: str, query: Sql) -> None:
    name = query("select current_database()")[0][0]
    query("drop role if exists orderbus_test_few; create role orderbus_test_few login")
    try:
        query(f"alter database {name} connection limit 0")
        async with asyncio.timeout(20):
            with pytest.raises(UnavailableError, match="too many connections"):
                async with open_store(psycopg.conninfo.make_conninfo(url, user="orderbus_test_few"), name="t"):
                    pass
    finally:
        query(f"alter database {name} connection limit -1")
        query("drop role orderbus_test_few")


@pytest.mark.servers
@pytest.mark.parametrize(
    ("state", "text", "is_waited_for"),
    [
        ("53000", "insufficient resources", True),
        ("53100", "could not extend file: No space left on device", True),
        ("53200", "out of memory", True),
        ("53400", "too many replication slots", True),
        ("53400", "temporary file size exceeds temp_file_limit (64kB)", False),
        ("58000", "system error", True),
        ("58030", "could not read block 0", True),
        ("54000", "index row size 3000 exceeds btree version 4 maximum 2704", False),
        ("54001", "stack depth limit exceeded", False),
        ("54011", "tables can have at most 1600 columns", False),
        ("XX000", "internal error", False),
    ],
)
async def test_a_server_in_trouble_is_waited_for_and_a_statement_that_is_too_much_is_not(
    url: str, state: str, text: str, is_waited_for: bool
) -> None:
    async with open_store(url, name="t") as store:
        transaction = await store.begin()
        with pytest.raises(UnavailableError if is_waited_for else psycopg.errors.lookup(state), match=re.escape(text)):
            await transaction.execute(f"do $$ begin raise '%%', '{text}' using errcode = '{state}'; end $$", ())
        await transaction.rollback()


@pytest.mark.parametrize("file", ["varsup.c", "multixact.c"])
def test_a_server_that_stops_before_its_ids_wrap_around_is_waited_for_in_any_language(file: str) -> None:
    told = {psycopg.pq.DiagnosticField.SOURCE_FILE: file.encode()}
    stopped = psycopg.errors.ProgramLimitExceeded("die Datenbank nimmt keine Befehle an", info=told)

    assert isinstance(classify(stopped, "here"), UnavailableError)


def test_the_error_behind_an_aborted_pipeline_is_found() -> None:
    aborted = psycopg.errors.PipelineAborted("pipeline aborted")
    aborted.__context__ = psycopg.errors.PipelineAborted("pipeline aborted")
    aborted.__context__.__context__ = cause = psycopg.errors.UniqueViolation("first")

    assert first_error(aborted) is cause
    assert classify(cause, "here") is None
