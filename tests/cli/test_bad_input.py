"""Whatever is wrong with what a person typed, or with a server: one clear line, an exit code that is not 0, and nothing changed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
import pytest

from orderbus import new_id
from orderbus.cli.exits import ExitCode
from tests.cli.conftest import Project, stranger
from tests.cli.test_dlq import Letters, letters
from tests.cli.test_outbox import Outbox, outbox
from tests.servers import Rabbit

__all__ = ["letters", "outbox"]

pytestmark = pytest.mark.servers

ID = str(new_id())
CHANGES = {
    "replay": ["--all", "--yes"],
    "purge": ["--all", "--yes"],
    "edit": [ID, "--body", "body.json", "--yes"],
}
LOOKS: dict[str, list[str]] = {"list": [], "export": [], "show": [ID]}
LETTER_VERBS = {**CHANGES, **LOOKS}


@pytest.fixture
def files(project: Project) -> None:
    Path(project.folder, "body.json").write_text('{"n":2}')
    Path(project.folder, "broken.jsonl").write_text("\n{}\n")
    exported(project, "foreign.jsonl", "shop.orders")
    Path(project.folder, "empty.jsonl").write_text("")


def exported(project: Project, name: str, queue: str) -> None:
    Path(project.folder, name).write_text(
        f'{{"kind":"orderbus-dead-letter-1","queue":"{queue}","exchange":"","routing_key":"","message_id":null,"type":null,'
        '"content_type":null,"timestamp_s":null,"headers":{},"body":"","raw_properties":""}\n'
    )


def one_line(project: Project, *arguments: str, code: ExitCode, says: str) -> None:
    result = project.run(*arguments)
    assert result.exit_code == code, result.output
    words = " ".join(result.stderr.replace("│", " ").split())
    assert says in words, result.stderr
    assert "Traceback" not in result.output
    if result.stderr.startswith("orderbus:"):
        assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("verb", LETTER_VERBS)
@pytest.mark.parametrize(
    ("target", "says"),
    [
        (["--queue", "nobody.knows"], "there is no queue 'nobody.knows.dlq' at"),
        (["nobody:bus"], "there is no module 'nobody' in"),
        ([], "name a bus as MODULE:BUS"),
    ],
    ids=["queue", "module", "nothing"],
)
def test_an_unknown_queue(project: Project, letters: Letters, files: None, verb: str, target: list[str], says: str) -> None:
    one_line(project, "dlq", verb, *LETTER_VERBS[verb], *target, code=ExitCode.USAGE, says=says)


@pytest.mark.parametrize("verb", ["replay", "purge"])
def test_one_unknown_queue_among_others_keeps_all_as_they_are(project: Project, letters: Letters, verb: str) -> None:
    letters.park(1)
    arguments = ["dlq", verb, "--queue", letters.queue, "--queue", "nobody.knows", "--all", "--yes"]
    one_line(project, *arguments, code=ExitCode.USAGE, says="there is no queue 'nobody.knows.dlq'")
    assert letters.depths() == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dlq", "list", "q", "--header", "tenant"], "'tenant' names no header and value; write --header tenant=acme"),
        (["dlq", "list", "q", "--since", "yesterday"], "'yesterday' is no time"),
        (["dlq", "export", "q", "--limit", "0"], "greater than or equal to 1"),
        (["dlq", "purge", "q", "--all", "--reason", "x", "--yes"], "or --all, without any"),
        (["dlq", "purge", "q", "--yes"], "say which letters"),
        (["dlq", "replay", "q", "--all", "--yes", "--rate", "fast"], "'fast' is no rate"),
        (["dlq", "edit", ID, "q", "--yes", "--unknown"], "No such option: --unknown"),
        (["dlq", "import", "missing.jsonl", "--yes"], "missing.jsonl can't be read: No such file or directory"),
        (["dlq", "import", "broken.jsonl", "--yes"], "line 2: is no dead letter that `orderbus dlq export` wrote"),
        (["dlq", "import", "foreign.jsonl", "--yes"], "line 1: names the queue 'shop.orders', which is not a dead letter queue"),
        (["dlq", "import", "empty.jsonl", "--yes"], "none of its 0 lines is a letter that was asked for"),
        (["outbox", "list", "--state", "lost"], "'lost' is no state; write waiting, scheduled, stuck"),
        (["outbox", "list", "--id", "7"], "'7' is no event id; write a UUID"),
        (["outbox", "list", "--older-than", "old"], "'old' is no age; write 90s, 15m, 2h or 3d"),
        (["outbox", "retry", "--yes"], "say which events"),
        (["outbox", "discard", "--all", "--topic", "x", "--yes"], "or --all, without any"),
        (["explain", "7"], "'7' is no event id; write a UUID"),
        (["explain", ID, "nobody:bus"], "there is no module 'nobody' in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_filter_or_a_file_that_can_not_be_read(project: Project, files: None, arguments: list[str], says: str) -> None:
    project.environment["COLUMNS"] = "300"
    one_line(project, *arguments, code=ExitCode.USAGE, says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["outbox", "discard", "--id", ID, "--yes"], "nothing that was asked for is in the outbox; nothing was changed"),
        (["outbox", "retry", "--id", ID], "nothing that was asked for is in the outbox; nothing was changed"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_an_event_that_is_not_in_the_outbox(project: Project, outbox: Outbox, arguments: list[str], says: str) -> None:
    one_line(project, *arguments, code=ExitCode.FINDINGS, says=says)


def test_a_letter_that_is_not_there(project: Project, letters: Letters, files: None) -> None:
    for arguments in (["edit", ID, letters.queue, "--body", "body.json", "--yes"], ["show", ID, letters.queue]):
        one_line(project, "dlq", *arguments, code=ExitCode.FINDINGS, says=f"no dead letter of event '{ID}' in {letters.dlq}")


# Servers


@pytest.mark.parametrize("verb", LETTER_VERBS)
def test_a_broker_that_is_away(project: Project, files: None, verb: str) -> None:
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    one_line(
        project, "dlq", verb, *LETTER_VERBS[verb], "--queue", "q", code=ExitCode.UNAVAILABLE, says="can't connect to RabbitMQ at"
    )


def test_an_import_into_a_broker_that_is_away(project: Project, files: None) -> None:
    exported(project, "letter.jsonl", "q.dlq")
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    arguments = ["dlq", "import", "letter.jsonl", "--yes"]
    one_line(project, *arguments, code=ExitCode.UNAVAILABLE, says="can't connect to RabbitMQ at")


OUTBOX_VERBS = {"list": [], "stats": [], "retry": ["--all", "--yes"], "discard": ["--all", "--yes"]}


@pytest.mark.parametrize("verb", OUTBOX_VERBS)
@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("postgresql://someone:secret@127.0.0.1:1/shop", ExitCode.UNAVAILABLE, "PostgreSQL at 127.0.0.1:1/shop"),
        ("memory://", ExitCode.USAGE, "its rows live inside the process that runs the bus"),
        ("", ExitCode.USAGE, "ORDERBUS_DATABASE_URL is not set"),
        ("mysql://x/y", ExitCode.USAGE, "must begin with one of postgresql://"),
    ],
    ids=["away", "memory", "unset", "scheme"],
)
def test_a_database_that_is_away(project: Project, verb: str, url: str, code: ExitCode, says: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = url
    result = project.run("outbox", verb, *OUTBOX_VERBS[verb])
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == (3 if "wrong settings" in result.stderr else 1)  # which are a list
    assert "secret" not in result.output


@pytest.mark.parametrize("verb", OUTBOX_VERBS)
def test_a_database_without_the_schema(project: Project, database_url: str, verb: str) -> None:
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    one_line(project, "outbox", verb, *OUTBOX_VERBS[verb], code=ExitCode.USAGE, says="run `orderbus schema apply`")


# Rights


@pytest.fixture
def powerless_url(rabbit: Rabbit, vhost_url: str) -> Iterator[str]:
    """A user of the vhost who may do nothing in it."""
    name = f"powerless-{secrets.token_hex(4)}"
    parts = urlsplit(vhost_url)
    rabbit.ctl("add_user", name, "secret")
    rabbit.ctl("set_permissions", "-p", unquote(parts.path[1:]), name, "^$", "^$", "^$")
    yield urlunsplit(parts._replace(netloc=f"{quote(name)}:secret@{parts.hostname}:{parts.port or 5672}"))
    rabbit.ctl("delete_user", name)


def test_an_import_without_permission(project: Project, letters: Letters, files: None, powerless_url: str) -> None:
    letters.park(1)
    exported(project, "letter.jsonl", letters.dlq)
    project.environment["ORDERBUS_BROKER_URL"] = powerless_url
    result = project.run("dlq", "import", "letter.jsonl", "--yes")
    assert result.exit_code in (ExitCode.USAGE, ExitCode.UNAVAILABLE), result.output
    assert "ACCESS_REFUSED" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    letters.settled_at(0, 1)


@pytest.mark.parametrize("verb", LETTER_VERBS)
def test_a_broker_user_without_permission(project: Project, letters: Letters, files: None, powerless_url: str, verb: str) -> None:
    [one] = letters.park(1)
    project.environment["ORDERBUS_BROKER_URL"] = powerless_url
    arguments = [one if argument == ID else argument for argument in LETTER_VERBS[verb]]
    result = project.run("dlq", verb, *arguments, "--queue", letters.queue)
    assert result.exit_code in (ExitCode.USAGE, ExitCode.UNAVAILABLE), result.output
    assert "ACCESS_REFUSED" in result.stderr
    assert letters.dlq in result.stderr
    assert len(result.stderr.splitlines()) == 1
    letters.settled_at(0, 1)


def test_a_broker_user_who_may_read_but_not_write(project: Project, letters: Letters, rabbit: Rabbit, powerless_url: str) -> None:
    parts = urlsplit(powerless_url)
    rabbit.ctl("set_permissions", "-p", unquote(parts.path[1:]), unquote(parts.username or ""), "^$", "^$", ".*")
    letters.park(3)
    project.environment["ORDERBUS_BROKER_URL"] = powerless_url
    result = project.run("dlq", "replay", letters.queue, "--all", "--yes")
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert "the user has no permission to write to amq.default" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    letters.settled_at(0, 3)


@pytest.mark.parametrize("verb", OUTBOX_VERBS)
def test_a_role_without_rights(project: Project, outbox: Outbox, verb: str) -> None:
    with stranger(outbox.url) as (name, url), psycopg.connect(outbox.url, autocommit=True) as connection:
        before = connection.execute("select * from orderbus.stuck order by id").fetchall()
        project.environment["ORDERBUS_DATABASE_URL"] = url
        arguments = ["outbox", verb, *OUTBOX_VERBS[verb]]
        one_line(project, *arguments, code=ExitCode.USAGE, says="permission denied for schema orderbus; have its owner grant")
        connection.execute(f"grant usage on schema orderbus to {name}")  # type: ignore[arg-type]
        connection.execute(f"grant select on all tables in schema orderbus to {name}")  # type: ignore[arg-type]
        if verb in ("retry", "discard"):
            one_line(project, *arguments, code=ExitCode.USAGE, says="permission denied for table stuck")
        else:
            assert project.run(*arguments).exit_code == 0
        assert connection.execute("select * from orderbus.stuck order by id").fetchall() == before
