"""What stops or kills a server reaches all of it."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest

from tests.faults.servers import Servers

pytestmark = [pytest.mark.servers, pytest.mark.crash]

QUIET_S = 0.3
ANSWER_S = 5.0


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(stack)


def test_a_frozen_database_answers_on_no_open_connection_until_it_is_thawed(servers: Servers) -> None:
    with closing(psycopg.connect(servers.postgres.url)) as connection:
        servers.postgres.freeze()
        try:
            connection.pgconn.send_query(b"select 1")
            answers_while_frozen = _answers_within(connection, QUIET_S)
        finally:
            servers.postgres.thaw()

        assert (answers_while_frozen, _answers_within(connection, ANSWER_S)) == (False, True)


def test_of_a_killed_database_no_backend_is_left(servers: Servers) -> None:
    with closing(psycopg.connect(servers.postgres.url)) as connection:
        backend = connection.info.backend_pid
        servers.postgres.kill()

    stat = Path(f"/proc/{backend}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()


def _answers_within(connection: psycopg.Connection[tuple[object, ...]], limit_s: float) -> bool:
    return bool(select.select([connection.pgconn.socket], [], [], limit_s)[0])
