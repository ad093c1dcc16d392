"""`orderbus top`: on real servers, beside a bus that runs; at a terminal that is really one; and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from orderbus.adapters.postgres import open_store
from tests.cli.conftest import LIMIT_S, ROOT, Project, lines_until

SHOP = """
    from orderbus import Bus, Event, Park, Tx

    class Placed(Event, topic="{group}.placed"):
        n: int

    bus = Bus("{group}")

    @bus.on(Placed)
    async def pay(order: Placed, tx: Tx) -> None:
        if order.n == 3:
            raise Park("fraud")

    @bus.on(Placed, name="mail", guard="none")
    async def mail(order: Placed) -> None: ...

    @bus.every(0.1)
    async def place(tx: Tx) -> list[Placed]:
        place.n = getattr(place, "n", 0) + 1
        if place.n == 1:
            print("placing", flush=True)
        return [Placed(n=place.n)]
"""


class Shop:
    def __init__(self, project: Project) -> None:
        self.project = project
        self.group = f"top-{secrets.token_hex(4)}"
        project.write(SHOP.replace("{group}", self.group))

    def looked(self, *options: str) -> dict[str, Any]:
        code, output, errors = self.project.finish("top", self.project.bus, "--once", "--json", *options)
        assert (code, errors) == (0, "")
        found: dict[str, Any] = json.loads(output)
        return found


@pytest.fixture
def shop(project: Project, vhost_url: str, database_url: str) -> Iterator[Shop]:
    """A bus that places an order ten times a second, and takes them in."""

    async def prepare() -> None:
        async with open_store(database_url, name="tests") as store:
            await store.apply_schema()

    anyio.run(prepare)
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": database_url}
    shop = Shop(project)
    process = project.start("run", project.bus)
    assert process.stdout is not None
    lines_until(process.stdout, "placing")
    yield shop
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)


@pytest.mark.servers
def test_it_tells_what_flows_and_what_was_parked_and_why(shop: Shop) -> None:
    pay = mail = {}
    deadline = time.monotonic() + LIMIT_S
    while not (pay.get("parked") and pay["handled_per_s"] > 1):
        assert time.monotonic() < deadline, pay
        found = shop.looked("--reasons")
        pay, mail = found["consumers"]

    assert pay["consumer"] == pay["queue"] == f"{shop.group}.{shop.group}.placed"
    assert 0 <= pay["lag_p50_s"] <= pay["lag_p99_s"] < 60
    assert pay["parked"] == 1
    assert mail["consumer"] == f"{shop.group}.mail"
    assert mail["handled_per_s"] is None  # nothing writes it down
    assert found["buckets_held"] == 64
    assert found["outbox_stuck"] == 0
    assert found["reasons"] == {f"{pay['queue']}.dlq": {"fraud": 1}}
    assert found["away"] == []
    assert shop.looked()["reasons"] == {}


@pytest.mark.servers
def test_without_keys_to_read_it_goes_on_until_it_is_ended(shop: Shop) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "orderbus", "top", shop.project.bus],
        cwd=shop.project.folder,
        env={**os.environ, **shop.project.environment, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=slave,
        stderr=slave,
        preexec_fn=_heeds_sigint,
    )
    os.close(slave)
    shop.project.processes.append(process)  # type: ignore[arg-type]
    try:
        screen = Screen(master)
        screen.until("relays hold")
        process.send_signal(signal.SIGINT)
        assert screen.code_of(process) == 0
    finally:
        os.close(master)


@pytest.mark.servers
def test_at_a_terminal_it_goes_on_until_q_and_shows_reasons_on_r(shop: Shop) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "orderbus", "top", shop.project.bus, "--every", "0.5"],
        cwd=shop.project.folder,
        env={
            **os.environ,
            **shop.project.environment,
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm-256color",
            "COLUMNS": "120",
            "LINES": "40",
        },
        stdin=slave,
        stdout=slave,
        stderr=slave,
        close_fds=True,
    )
    os.close(slave)
    shop.project.processes.append(process)  # type: ignore[arg-type]
    screen = Screen(master)
    try:
        screen.until("relays hold 64 of 64 buckets")
        screen.until(r"placed +\d+ +\d+\.\d +\d+(\.\d)? m?s")
        os.write(master, b"r")
        screen.until(r"\.dlq: 1 fraud")
        os.write(master, b"q")
        assert screen.code_of(process) == 0
    finally:
        os.close(master)


def _heeds_sigint() -> None:
    """A shell's background job has it ignored, and so have its children: these tests may be such a job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Screen:
    """What a program has written to its terminal, without the codes that move and colour."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = ""

    def code_of(self, process: subprocess.Popen[Any]) -> int:
        """Its exit code. A terminal that nobody reads fills up, and then holds up who writes to it."""
        deadline = time.monotonic() + LIMIT_S
        while (code := process.poll()) is None:
            assert time.monotonic() < deadline, self._text[-2_000:]
            self._read(0.1)
        return code

    def _read(self, wait_s: float) -> None:
        if select.select([self._fd], [], [], wait_s)[0]:
            with contextlib.suppress(OSError):  # the other end is closed
                self._text += os.read(self._fd, 65_536).decode(errors="replace")

    def until(self, pattern: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not re.search(pattern, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._text)):
            assert time.monotonic() < deadline, self._text[-2_000:]
            self._read(1.0)


# What goes wrong


def test_a_memory_broker_can_not_be_looked_at_from_outside(project: Project) -> None:
    Shop(project)
    code, _, errors = project.finish("top", project.bus)
    assert code == 2
    assert "memory://: its messages live inside the process" in errors


@pytest.mark.servers
def test_a_memory_database_is_left_out(project: Project, vhost_url: str) -> None:
    Shop(project)
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}
    code, output, errors = project.finish("top", project.bus, "--once", "--json")
    assert (code, errors) == (0, "")
    assert json.loads(output)["outbox_waiting"] is None


def test_a_bus_without_handlers_has_nothing_to_show(project: Project) -> None:
    project.write('from orderbus import Bus\nbus = Bus("empty")')
    code, _, errors = project.finish("top", project.bus)
    assert (code, "has no handlers" in errors) == (2, True)


def test_buses_on_two_brokers_are_refused(project: Project) -> None:
    Shop(project)
    project.write(
        """
        from orderbus import Bus, Event, Settings

        class Other(Event, topic="other"):
            n: int

        bus = Bus("other", settings=Settings(broker_url="amqp://guest:guest@127.0.0.1:1/"))

        @bus.on(Other, guard="none")
        async def other(event: Other) -> None: ...
        """,
        "other",
    )
    code, _, errors = project.finish("top", project.bus, "other:bus")
    assert (code, "different brokers" in errors) == (2, True)


def test_servers_that_are_away_are_named(project: Project) -> None:
    Shop(project)
    project.environment |= {
        "ORDERBUS_BROKER_URL": "amqp://guest:guest@127.0.0.1:1/",
        "ORDERBUS_DATABASE_URL": "postgresql://nobody@127.0.0.1:2/none",
    }
    code, output, errors = project.finish("top", project.bus, "--once")
    assert (code, output) == (4, "")
    assert "127.0.0.1:1" in errors
    assert "127.0.0.1:2" in errors
