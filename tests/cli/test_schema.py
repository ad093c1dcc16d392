"""`orderbus schema`: printed, applied, checked."""

from __future__ import annotations

import json

import psycopg
import pytest

from tests.cli.conftest import Project, stranger

SHOP = """
    from orderbus import Bus, Event, Tx

    class Placed(Event, topic="orders.placed"):
        n: int

    bus = Bus("shop")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None: ...
"""


@pytest.mark.servers
def test_the_sql_needs_no_server_and_makes_what_check_wants(project: Project, database_url: str) -> None:
    printed = project.run("schema", "sql")
    assert printed.exit_code == 0
    with psycopg.connect(database_url) as connection:
        connection.execute(printed.stdout.encode())
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    assert project.run("schema", "check").exit_code == 0


def test_sql_since_the_newest_version_is_nothing_new(project: Project) -> None:
    assert "create table orderbus.outbox" in project.run("schema", "sql").stdout
    assert "create table orderbus.outbox" not in project.run("schema", "sql", "--since", "9999").stdout


@pytest.mark.servers
def test_apply_brings_it_up_to_date_and_may_run_again(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    before = project.run("schema", "check")
    assert before.exit_code == 1
    assert "run `orderbus schema apply`" in before.stderr
    assert json.loads(project.run("schema", "check", "--json").stdout)["ok"] is False
    assert json.loads(project.run("schema", "apply", "--json").stdout)["versions"]
    assert json.loads(project.run("schema", "apply", "--json").stdout)["versions"] == []
    assert project.run("schema", "apply").stdout.strip().endswith("is up to date")
    assert project.run("schema", "check").exit_code == 0


def test_no_password_is_printed(project: Project) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = "postgresql://someone:secret@127.0.0.1:1/shop"
    result = project.run("schema", "apply")
    assert result.exit_code == 4
    assert "127.0.0.1:1/shop" in result.stderr
    assert "secret" not in result.output


@pytest.mark.parametrize(
    ("url", "message"),
    [(None, "ORDERBUS_DATABASE_URL is not set"), ("memory://", "has no schema"), ("mysql://x/y", "must begin with one of")],
)
def test_a_database_that_can_have_no_schema(project: Project, url: str | None, message: str) -> None:
    if url is not None:
        project.environment["ORDERBUS_DATABASE_URL"] = url
    result = project.run("schema", "apply")
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_broker_need_not_be_known(project: Project) -> None:
    del project.environment["ORDERBUS_BROKER_URL"]
    result = project.run("schema", "check")
    assert "ORDERBUS_DATABASE_URL is not set" in result.stderr
    assert "BROKER" not in result.stderr


@pytest.mark.servers
def test_upkeep_needs_the_schema_and_makes_the_coming_days_partitions(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    before = project.run("schema", "upkeep")
    assert before.exit_code == 2
    assert "run `orderbus schema apply`" in before.stderr
    project.run("schema", "apply")
    with psycopg.connect(database_url) as connection:
        connection.execute("do $$ begin execute (select 'drop table orderbus.' || max(relname) from pg_class "
            "where relname like 'inbox_2%' and relkind = 'r'); end $$")  # fmt: skip
        connection.commit()
        count = "select count(*) from pg_inherits where inhparent = 'orderbus.inbox'::regclass"
        assert connection.execute(count).fetchone() == (9,)
        connection.commit()
        assert project.run("schema", "upkeep").stdout.strip().endswith("is kept up")
        assert connection.execute(count).fetchone() == (10,)


@pytest.mark.servers
@pytest.mark.parametrize(
    ("verb", "is_there", "needs"),
    [
        ("check", True, "usage on schema orderbus"),
        ("upkeep", True, "usage on schema orderbus"),
        ("apply", False, "create on the database"),
        ("apply", True, "what owns the schema orderbus"),
    ],
)
def test_a_role_without_rights_is_told_what_it_needs(
    project: Project, database_url: str, verb: str, is_there: bool, needs: str
) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    if is_there:
        project.run("schema", "apply")
    with stranger(database_url) as (_, url):
        project.environment["ORDERBUS_DATABASE_URL"] = url
        result = project.run("schema", verb)
    assert result.exit_code == (1 if verb == "check" else 2)
    [line] = result.stderr.splitlines()
    assert "permission denied" in line
    assert needs in line


@pytest.mark.servers
def test_a_service_without_rights_says_so_and_ends(project: Project, database_url: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    project.run("schema", "apply")
    with stranger(database_url) as (_, url):
        project.environment["ORDERBUS_DATABASE_URL"] = url
        project.write(SHOP)
        code, _, errors = project.finish("run", project.bus)
    assert code == 2, errors
    assert "Traceback" not in errors
    assert "permission denied for schema orderbus; the role needs usage on schema orderbus" in errors.splitlines()[-1]
