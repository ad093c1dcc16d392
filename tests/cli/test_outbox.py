"""`orderbus outbox` on a real PostgreSQL, with a relay that meets a real RabbitMQ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import anyio.to_thread
import pytest
from typer.testing import Result

from orderbus import Bus, Event, Settings, new_id
from orderbus._core.outbox_rows import HeldRow, RowsWanted
from orderbus.abc import OutboxRow, Stuck
from orderbus.adapters.postgres import PostgresDesk, PostgresStore, open_store
from tests.cli.conftest import LIMIT_S, ROOT, Project

pytestmark = pytest.mark.servers

ALL = tuple(range(64))


class Outbox:
    """The project's database: three events of one key that are stuck, one that is scheduled, one that waits."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stuck = [new_id() for _ in range(3)]
        self.scheduled = new_id()
        self.waiting = new_id()

    async def fill(self, store: PostgresStore) -> None:
        await store.apply_schema()
        await emit(store, [row(one, "k") for one in self.stuck])
        page = await store.outbox.read(ALL, 0, 100, 1 << 20)
        await store.outbox.set_aside([Stuck(page.rows[0], "unroutable", 300.0)])
        await store.outbox.read(ALL, 0, 100, 1 << 20)
        await emit(store, [row(self.waiting, "other", topic="orders.paid")])
        await emit(store, [row(self.scheduled, "k", due_at_ms=4_000_000_000_000)])

    def on_store(self, work: Callable[[PostgresStore], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            with anyio.fail_after(LIMIT_S):
                async with open_store(self.url, name="tests") as store:
                    return await work(store)

        return anyio.run(run)

    def due(self) -> list[UUID]:
        async def due(store: PostgresStore) -> list[UUID]:
            return [one.event_id for one in await store.outbox.due(ALL, 100, 1 << 20)]

        found: list[UUID] = self.on_store(due)
        return found


async def emit(store: PostgresStore, rows: Sequence[OutboxRow]) -> None:
    transaction = await store.begin()
    await transaction.commit([], rows)


def row(event_id: UUID, key: str | None, **changes: Any) -> OutboxRow:
    given: dict[str, Any] = {
        "topic": "orders.placed",
        "bucket": 7,
        "body": b"{}",
        "content_type": "application/json",
        "headers": {},
    }
    return OutboxRow(event_id=event_id, key=key, **{**given, **changes})


@pytest.fixture
def outbox(project: Project, database_url: str) -> Outbox:
    outbox = Outbox(database_url)
    outbox.on_store(outbox.fill)
    project.environment["ORDERBUS_DATABASE_URL"] = database_url
    return outbox


def lines(project: Project, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    result = project.run("outbox", *arguments, "--json")
    assert result.exit_code == code, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def ids(found: Sequence[dict[str, Any]]) -> list[UUID]:
    return [UUID(one["id"]) for one in found]


def audits(result: Result) -> list[tuple[str, str, str]]:
    found = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    return [(one["audit"], one["outcome"], one["id"]) for one in found]


class TestLooking:
    def test_all_that_has_not_gone_out_is_listed_with_its_reason(self, project: Project, outbox: Outbox) -> None:
        found = {UUID(one["id"]): one for one in lines(project, "list")}
        assert set(found) == {*outbox.stuck, outbox.scheduled, outbox.waiting}
        first, second = found[outbox.stuck[0]], found[outbox.stuck[1]]
        assert (first["state"], first["reason"], first["attempts"], first["waits_for"]) == ("stuck", "unroutable", 1, None)
        assert (second["reason"], second["waits_for"]) == ("behind", str(outbox.stuck[0]))
        assert found[outbox.scheduled]["due_at"] == "2096-10-02T07:06:40.000+00:00"

    @pytest.mark.parametrize(
        ("choice", "count"),
        [
            (["--state", "stuck"], 3),
            (["--state", "stuck", "--state", "waiting"], 4),
            (["--topic", "orders.*"], 5),
            (["--topic", "orders.paid"], 1),
            (["--key", "k"], 4),
            (["--reason", "unroutable"], 1),
            (["--older-than", "1h"], 0),
        ],
        ids=str,
    )
    def test_filters(self, project: Project, outbox: Outbox, choice: list[str], count: int) -> None:
        assert len(lines(project, "list", *choice)) == count

    def test_a_listing_fits_the_terminal_and_says_that_there_is_more(self, project: Project, outbox: Outbox) -> None:
        project.environment["COLUMNS"] = "60"
        result = project.run("outbox", "list", "--limit", "2")
        assert max(map(len, result.stdout.splitlines())) <= 60
        assert "there are more than 2; raise --limit" in result.stderr

    def test_stats(self, project: Project, outbox: Outbox) -> None:
        [stats] = lines(project, "stats")
        assert [(one["state"], one["topic"], one["count"]) for one in stats["held"]] == [
            ("waiting", "orders.paid", 1),
            ("stuck", "orders.placed", 3),
            ("scheduled", "orders.placed", 1),
        ]
        assert sorted((one["reason"], one["count"]) for one in stats["stuck"]) == [("behind", 2), ("unroutable", 1)]
        assert [(one["owner"], one["buckets"], one["waiting"]) for one in stats["holders"]] == [(None, 64, 1)]
        assert "nobody: these wait" in project.run("outbox", "stats").stdout


class TestRetry:
    def test_the_first_of_a_key_goes_now_and_those_behind_follow(self, project: Project, outbox: Outbox) -> None:
        assert outbox.due() == []
        result = project.run("outbox", "retry", "--all", "--yes")
        assert result.exit_code == 0, result.output
        assert sorted(audits(result)) == sorted(
            ("outbox retry", outcome, str(one))
            for one, outcome in zip(outbox.stuck, ("retried", "behind", "behind"), strict=True)
        )
        assert outbox.due() == outbox.stuck

    def test_one_behind_another_names_the_one_to_retry(self, project: Project, outbox: Outbox) -> None:
        result = project.run("outbox", "retry", "--id", str(outbox.stuck[2]))
        assert result.exit_code == 1
        assert f"it follows event {outbox.stuck[0]}" in result.stdout
        assert outbox.due() == []

    def test_a_dry_run_changes_nothing(self, project: Project, outbox: Outbox) -> None:
        assert [one["event"] for one in lines(project, "retry", "--all", "--dry-run")] == ["would-retry", "behind", "behind"]
        assert outbox.due() == []

    def test_of_several_one_that_is_not_there_is_named(self, project: Project, outbox: Outbox) -> None:
        missing = str(new_id())
        result = project.run("outbox", "retry", "--id", str(outbox.stuck[0]), "--id", missing, "--yes")
        assert result.exit_code == 1
        assert f"event {missing} is not there" in result.stderr
        assert outbox.due() == outbox.stuck


class TestDiscard:
    def test_of_several_one_that_is_not_there_is_named(self, project: Project, outbox: Outbox) -> None:
        missing = str(new_id())
        result = project.run("outbox", "discard", "--id", str(outbox.stuck[0]), "--id", missing, "--yes")
        assert result.exit_code == 1
        assert f"event {missing} is not there" in result.stderr
        assert audits(result) == [("outbox discard", "discarded", str(outbox.stuck[0]))]

    def test_all_that_is_discarded_is_in_the_audit_though_nobody_reads(
        self, project: Project, outbox: Outbox, tmp_path: Path
    ) -> None:
        file = tmp_path / "audit"
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "orderbus",
                *["outbox", "discard", "--all", "--state", "stuck", "--yes", "--json", "--audit"],
                str(file),
            ],
            cwd=project.folder,
            env={**os.environ, **project.environment, "PYTHONPATH": str(ROOT)},
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=LIMIT_S,
            check=False,
        )
        os.close(write)
        assert done.returncode == 1
        assert {json.loads(line)["id"] for line in file.read_text().splitlines()} == set(map(str, outbox.stuck))

    @pytest.mark.parametrize("name", ["null", "full"])
    def test_a_device_as_the_audit_file(self, project: Project, outbox: Outbox, name: str) -> None:
        result = project.run("outbox", "discard", "--all", "--state", "stuck", "--yes", "--audit", f"/dev/{name}")
        assert len(audits(result)) == 3
        assert result.exit_code == (2 if name == "full" else 0)
        assert ("lacks lines: No space left on device; all of them are on stderr" in result.stderr) == (name == "full")

    def test_the_next_of_its_key_goes_on(self, project: Project, outbox: Outbox) -> None:
        result = project.run("outbox", "discard", "--id", str(outbox.stuck[0]), "--yes")
        assert result.exit_code == 0, result.output
        assert audits(result) == [("outbox discard", "discarded", str(outbox.stuck[0]))]
        assert "2 later events of their keys are stuck behind them, and go out without them" in result.stderr
        assert outbox.due() == outbox.stuck[1:]

    def test_with_its_followers(self, project: Project, outbox: Outbox) -> None:
        assert ids(lines(project, "discard", "--id", str(outbox.stuck[1]), "--followers", "--yes")) == outbox.stuck[:0:-1]
        assert ids(lines(project, "list", "--state", "stuck")) == outbox.stuck[:1]

    def test_many_go_some_at_a_time_and_none_of_them_is_let_out_in_between(
        self, project: Project, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("orderbus.cli.outbox.AT_A_TIME", 1)
        firsts: list[list[UUID]] = []
        discard = PostgresDesk.discard

        async def watched(desk: PostgresDesk, rows: Sequence[HeldRow]) -> frozenset[UUID]:
            gone = await discard(desk, rows)
            left = await desk.rows(RowsWanted(states=("stuck",)))
            firsts.append([one.event_id for one in left if one.waits_for is None])
            return gone

        monkeypatch.setattr(PostgresDesk, "discard", watched)
        assert project.run("outbox", "discard", "--all", "--state", "stuck", "--yes").exit_code == 0
        assert firsts == [[outbox.stuck[0]], [outbox.stuck[0]], []]

    def test_a_scheduled_one(self, project: Project, outbox: Outbox) -> None:
        assert ids(lines(project, "discard", "--state", "scheduled", "--all", "--yes")) == [outbox.scheduled]
        assert ids(lines(project, "list", "--state", "scheduled")) == []

    def test_one_that_is_on_its_way_is_refused(self, project: Project, outbox: Outbox) -> None:
        [told] = lines(project, "discard", "--id", str(outbox.waiting), "--yes", code=1)
        assert told["event"] == "refused"
        assert ids(lines(project, "list", "--state", "waiting")) == [outbox.waiting]

    @pytest.mark.parametrize("arguments", [["discard", "--all"], ["retry", "--all"]], ids=lambda arguments: arguments[0])
    def test_without_a_terminal_yes_must_be_said(self, project: Project, outbox: Outbox, arguments: list[str]) -> None:
        before = lines(project, "list")
        result = project.run("outbox", *arguments)
        assert (result.exit_code, "say --yes; nothing was changed" in result.stderr) == (2, True)
        assert lines(project, "list") == before

    def test_a_dry_run_changes_nothing(self, project: Project, outbox: Outbox) -> None:
        before = lines(project, "list")
        assert project.run("outbox", "discard", "--key", "k", "--dry-run").exit_code == 0
        assert lines(project, "list") == before


class Placed(Event, topic="outbox-cli.placed", key="key"):
    key: str
    n: int


def test_a_key_goes_out_in_order_after_its_first_event_was_discarded(project: Project, database_url: str, vhost_url: str) -> None:
    """Nobody is bound; the relay sets the first aside, the rest behind it; one is discarded; a consumer comes, and gets the rest."""
    settings = Settings(broker_url=vhost_url, database_url=database_url)
    producer = Bus("outbox-cli-producer", settings=settings)
    consumer = Bus("outbox-cli-consumer", settings=settings)
    handled: list[int] = []

    @consumer.on(Placed, ordered=True)
    async def handle(event: Placed) -> None:
        handled.append(event.n)

    project.environment["ORDERBUS_DATABASE_URL"] = database_url

    async def run() -> None:
        async with open_store(database_url, name="tests") as store:
            await store.apply_schema()
        with anyio.fail_after(LIMIT_S):
            async with producer:
                for n in range(5):
                    async with producer.transaction() as tx:
                        tx.emit(Placed(key="k", n=n))
                while len(found := await listed()) < 5 or any(one["state"] != "stuck" for one in found):
                    pass
            await in_thread("discard", "--id", found[0]["id"], "--yes")
            await in_thread("discard", "--id", found[2]["id"], "--yes")
            async with consumer:
                while len(handled) < 3:
                    await listed()
            assert await listed() == []

    async def listed() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (await in_thread("list", "--json")).splitlines()]
        return sorted(found, key=lambda one: str(one["created_at"]))

    async def in_thread(*arguments: str) -> str:
        code, output, errors = await anyio.to_thread.run_sync(lambda: project.finish("outbox", *arguments))
        assert code == 0, errors
        return output

    anyio.run(run)
    assert handled == [1, 3, 4]
