"""`orderbus dlq purge`, `edit`, `export` and `import` on a real RabbitMQ; asking first, and writing down who did what."""

from __future__ import annotations

import base64
import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest
from typer.testing import Result

from orderbus import new_id
from orderbus._core.leaving import HANDLER, RAW_PROPERTIES, REASON
from orderbus._core.letter_record import edited_id, read_record
from orderbus._core.message import KEY
from orderbus.abc import InboxEntry
from orderbus.adapters.postgres import open_store
from orderbus.cli.dlq_files import writer
from orderbus.errors import UsageError
from tests.cli.conftest import LIMIT_S, ROOT, Project
from tests.cli.test_dlq import Letters, letters, lines
from tests.core.test_letter_record import incoming

__all__ = ["letters"]

pytestmark = pytest.mark.servers

HEADERS = {
    "tenant": "acme",
    "n": 7,
    "big": 1 << 40,
    "ok": True,
    "nothing": None,
    "raw": b"\x00\xff",
    "deep": {"list": [1, "a", b"\x01"]},
}


def audits(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]


class TestFilters:
    @pytest.mark.parametrize(
        "choice",
        [
            ["--key", "k1"],
            ["--key", "?1"],
            ["--header", "tenant=ac*"],
            ["--header", "tenant=acme", "--header", "n=7"],
            ["--header", "ok=true"],
        ],
        ids=" ".join,
    )
    def test_by_key_and_header(self, project: Project, letters: Letters, choice: list[str]) -> None:
        letters.park(2, {KEY: "k2", "tenant": "other", "n": 8})
        wanted = letters.park(1, {KEY: "k1", **HEADERS})
        assert [one["id"] for one in lines(project, "list", letters.queue, *choice)] == wanted

    def test_every_header_must_match(self, project: Project, letters: Letters) -> None:
        letters.park(1, HEADERS)
        assert lines(project, "list", letters.queue, "--header", "tenant=acme", "--header", "n=8") == []


class TestPurge:
    def test_the_chosen_are_gone_and_on_file(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        kept = letters.park(2)
        gone = letters.park(2, {REASON: "rare"})
        file = Path(tmp_path, "gone.jsonl")
        result = project.run("dlq", "purge", letters.queue, "--reason", "rare", "--yes", "--export", str(file))
        assert result.exit_code == 0, result.output
        assert "2 purged" in result.stdout
        assert [(one["audit"], one["outcome"], one["queue"], one["id"]) for one in audits(result)] == [
            ("dlq purge", "purged", letters.dlq, one) for one in gone
        ]
        letters.settled_at(0, 2)
        assert [json.loads(line)["message_id"] for line in file.read_text().splitlines()] == gone
        assert letters.taken(letters.dlq) == kept

    def test_a_file_that_is_there_is_not_overwritten(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        letters.park(1)
        file = Path(tmp_path, "gone.jsonl")
        file.write_text("precious")
        result = project.run("dlq", "purge", letters.queue, "--all", "--yes", "--export", str(file))
        assert (result.exit_code, file.read_text()) == (2, "precious")
        assert letters.depths() == (0, 1)

    def test_a_dry_run_removes_nothing_and_writes_no_file(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        letters.park(2)
        file = Path(tmp_path, "gone.jsonl")
        result = project.run("dlq", "purge", letters.queue, "--all", "--dry-run", "--export", str(file))
        assert (result.exit_code, audits(result), file.exists()) == (0, [], False)
        assert "2 would-purge" in result.stdout
        letters.settled_at(0, 2)


class TestFiles:
    def test_what_was_exported_comes_back_exactly(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        ids = letters.park(2, {KEY: "k", **HEADERS}, body=b"\xff\x00 not json")
        letters.park(1, {RAW_PROPERTIES: b"\x00\x80"})
        before = lines(project, "show", ids[0], letters.queue)
        letters.settled_at(0, 3)
        file = str(Path(tmp_path, "gone.jsonl"))
        assert project.run("dlq", "purge", letters.queue, "--all", "--yes", "--export", file).exit_code == 0
        letters.settled_at(0, 0)
        result = project.run("dlq", "import", file, "--yes")
        assert result.exit_code == 0, result.output
        assert {one["outcome"] for one in audits(result)} == {"imported"}
        assert len(lines(project, "list", letters.queue)) == 3
        letters.settled_at(0, 3)
        after = lines(project, "show", ids[0], letters.queue)
        assert strip(after) == strip(before)
        assert base64.b64decode(after[0]["body_base64"]) == b"\xff\x00 not json"

    def test_what_is_there_already_is_not_put_there_again(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        letters.park(3)
        file = str(Path(tmp_path, "copy.jsonl"))
        audit = Path(tmp_path, "audit.jsonl")
        assert project.run("dlq", "export", letters.queue, "--output", file, "--audit", str(audit)).exit_code == 0
        note = json.loads(audit.read_text())
        assert (note["audit"], note["outcome"], note["queue"], note["count"]) == ("dlq export", "exported", letters.dlq, 3)
        letters.settled_at(0, 3)
        (*_, done) = lines(project, "import", file, "--yes")
        assert (done["imported"], done["present"]) == (0, 3)
        letters.settled_at(0, 3)

    def test_stdout_holds_nothing_but_the_letters(self, project: Project, letters: Letters) -> None:
        ids = letters.park(3)
        result = project.run("dlq", "export", letters.queue, "--limit", "2")
        assert [json.loads(line)["message_id"] for line in result.stdout.splitlines()] == ids[:2]

    def test_filters_hold_for_an_import_too(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        letters.park(2)
        rare = letters.park(1, {REASON: "rare"})
        file = str(Path(tmp_path, "gone.jsonl"))
        project.run("dlq", "purge", letters.queue, "--all", "--yes", "--export", file)
        assert lines(project, "import", file, "--reason", "rare", "--yes")[-1]["imported"] == 1
        assert letters.taken(letters.dlq) == rare


def strip(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what the broker and the publisher write anew."""
    for one in found:
        one["headers"] = {name: value for name, value in one["headers"].items() if name not in ("ob-seq", "x-delivery-count")}
    return found


class TestEdit:
    def test_the_new_body_goes_out_as_a_new_event_and_the_letter_is_gone(
        self, project: Project, letters: Letters, tmp_path: Path
    ) -> None:
        (old,) = letters.park(1, {"mine": "kept"}, body=b'{"n":"x"}')
        body = write(tmp_path, '{"n":2}')
        result = project.run("dlq", "edit", old, project.bus, "--body", body, "--yes")
        assert result.exit_code == 0, result.output
        letters.settled_at(1, 0)
        new = str(edited_id(UUID(old), letters.dlq))
        assert f"event {new} is in {letters.queue}" in result.stdout
        [audit] = audits(result)
        assert (audit["outcome"], audit["id"], audit["new_id"], audit["to"]) == ("edited", old, new, letters.queue)
        assert letters.taken(letters.queue) == [new]

    def test_the_id_can_be_kept(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        (old,) = letters.park(1)
        assert (
            project.run("dlq", "edit", old, project.bus, "--body", write(tmp_path, '{"n":2}'), "--yes", "--keep-id").exit_code
            == 0
        )
        letters.settled_at(1, 0)
        assert letters.taken(letters.queue) == [old]

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ('{"n":"two"}', "its handler would park it again as wrong-type"),
            ("{", "its handler would park it again as undecodable"),
            ('{"n":1}', "the body is the same as before"),
        ],
    )
    def test_a_body_that_its_handler_could_not_read_is_refused(
        self, project: Project, letters: Letters, tmp_path: Path, body: str, said: str
    ) -> None:
        (old,) = letters.park(1)
        result = project.run("dlq", "edit", old, project.bus, "--body", write(tmp_path, body), "--yes")
        assert result.exit_code == 2
        assert said in result.stderr
        letters.settled_at(0, 1)

    def test_unchecked_sends_what_the_person_says(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        (old,) = letters.park(1)
        body = write(tmp_path, '{"n":"two"}')
        assert project.run("dlq", "edit", old, project.bus, "--body", body, "--yes", "--unchecked").exit_code == 0
        letters.settled_at(1, 0)

    def test_the_key_may_not_change(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        (old,) = letters.park(1, {KEY: "a"})
        result = project.run("dlq", "edit", old, project.bus, "--body", write(tmp_path, '{"n":2}'), "--yes")
        assert result.exit_code == 2
        assert "its key would change from 'a' to None" in result.stderr
        letters.settled_at(0, 1)

    def test_an_event_that_was_handled_is_not_sent_as_another(
        self, project: Project, letters: Letters, tmp_path: Path, database_url: str
    ) -> None:
        """It can lie there all the same: its process died after the commit, until the broker gave up."""
        (old,) = letters.park(1, {HANDLER: letters.queue})
        anyio.run(handle, database_url, old, letters.queue)
        project.environment["ORDERBUS_DATABASE_URL"] = database_url
        result = project.run("dlq", "edit", old, project.bus, "--body", write(tmp_path, '{"n":2}'), "--yes")
        assert result.exit_code == 2
        assert f"{letters.queue} has handled event {old}" in result.stderr
        letters.settled_at(0, 1)


async def handle(url: str, event_id: str, consumer: str) -> None:
    async with open_store(url, name="tests") as store:
        await store.apply_schema()
        transaction = await store.begin([InboxEntry(UUID(event_id), consumer, 1)])
        await transaction.commit([], [])


def write(folder: Path, text: str) -> str:
    file = Path(folder, "body.json")
    file.write_text(text)
    return str(file)


class TestAsking:
    @pytest.mark.parametrize(
        "arguments",
        [["replay", "--all"], ["purge", "--all"], ["import", "gone.jsonl"], ["edit", str(new_id()), "--body", "x"]],
        ids=lambda arguments: arguments[0],
    )
    def test_without_a_terminal_yes_must_be_said(self, project: Project, letters: Letters, arguments: list[str]) -> None:
        letters.park(1)
        queue = [] if arguments[0] == "import" else ["--queue", letters.queue]
        result = project.run("dlq", *arguments, *queue)
        assert result.exit_code == 2
        assert "say --yes; nothing was changed" in result.stderr
        assert letters.depths() == (0, 1)

    def test_a_single_letter_is_replayed_without_asking(self, project: Project, letters: Letters) -> None:
        (one,) = letters.park(1)
        assert project.run("dlq", "replay", letters.queue, "--id", one).exit_code == 0
        letters.settled_at(1, 0)

    @pytest.mark.parametrize(("answer", "code", "depths"), [("y", 0, (0, 2)), ("n", 1, (0, 3))])
    def test_at_a_terminal_it_says_how_many_and_waits_for_a_yes(
        self, project: Project, letters: Letters, answer: str, code: int, depths: tuple[int, int]
    ) -> None:
        letters.park(2)
        letters.park(1, {REASON: "rare"})
        ended, shown = at_a_terminal(project, answer, "dlq", "purge", letters.queue, "--reason", "rare")
        assert f"remove for good 1 of 3 letters in {letters.dlq}? [y/N]" in shown
        assert ended == code, shown
        letters.settled_at(*depths)

    def test_the_editor_opens_the_old_body(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        (old,) = letters.park(1, body=b'{"n":1}')
        editor = Path(tmp_path, "editor")
        editor.write_text('#!/bin/sh\nsed -i "s/1/42/" "$1"\n')
        editor.chmod(0o755)
        project.environment["EDITOR"] = str(editor)
        ended, shown = at_a_terminal(project, "y", "dlq", "edit", old, project.bus)
        assert ended == 0, shown
        letters.settled_at(1, 0)


def at_a_terminal(project: Project, answer: str, *arguments: str) -> tuple[int, str]:
    """The command line with a pseudo-terminal, at which somebody answers: its exit code, and what was to be seen."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "orderbus", *arguments],
        cwd=project.folder,
        env={**os.environ, **project.environment, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, answer.encode() + b"\n")
    shown = b""
    while True:
        try:
            shown += (more := os.read(ours, 65_536))
        except OSError:  # Linux says EIO when the other end is closed
            break
        if not more:
            break
    os.close(ours)
    return process.wait(LIMIT_S), shown.decode()


class TestAudit:
    def test_the_file_gets_a_line_for_each_letter_and_keeps_what_it_had(
        self, project: Project, letters: Letters, tmp_path: Path
    ) -> None:
        ids = letters.park(2)
        file = Path(tmp_path, "audit.log")
        file.write_text("before\n")
        assert project.run("dlq", "replay", letters.queue, "--all", "--yes", "--audit", str(file)).exit_code == 0
        before, *written = file.read_text().splitlines()
        found = [json.loads(line) for line in written]
        assert before == "before"
        assert [(one["audit"], one["id"], one["outcome"]) for one in found] == [("dlq replay", one, "replayed") for one in ids]
        assert set(found[0]) == {"audit", "time", "user", "queue", "to", "id", "outcome"}

    def test_where_it_can_not_be_written_nothing_is_changed(self, project: Project, letters: Letters, tmp_path: Path) -> None:
        letters.park(1)
        result = project.run("dlq", "replay", letters.queue, "--all", "--yes", "--audit", str(tmp_path))
        assert result.exit_code == 2
        assert "can't be written: Is a directory; nothing was changed" in result.stderr
        assert letters.depths() == (0, 1)


class TestDiskFull:
    def test_what_was_stored_before_stays_whole(self, tmp_path: Path) -> None:
        """Of letters that were purged already, the file is all that there is."""
        deliveries = [incoming(b"%d" % n * 200) for n in range(4)]
        file = Path(tmp_path, "letters.jsonl")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with writer(file) as keep:
            assert keep is not None
            keep(deliveries[:2])
            whole_bytes = file.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole_bytes + 100, before[1]))
            try:
                with pytest.raises(
                    UsageError, match=r"letters\.jsonl can't be written: File too large; what was stored there before"
                ):
                    keep(deliveries[2:])
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert file.stat().st_size == whole_bytes
        assert [read_record(line).body for line in file.read_bytes().splitlines()] == [one.body for one in deliveries[:2]]
