"""`orderbus run --workers` and `--reload`: processes that are started, replaced, and stopped together."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from orderbus.cli.exits import ExitCode
from orderbus.cli.workers import Workers
from tests.cli.conftest import Project, ended, lines_until

SHOP = """
    import os
    from collections.abc import AsyncIterator
    from orderbus import Bus

    bus = Bus("shop")

    class Here: ...

    @bus.resource
    async def here() -> AsyncIterator[Here]:
        print("{word}", os.getpid(), flush=True)
        yield Here()
"""


@pytest.fixture
def served(project: Project, vhost_url: str) -> Project:
    project.write(SHOP.format(word="open"))
    project.environment["ORDERBUS_BROKER_URL"] = vhost_url
    return project


def opened(process: subprocess.Popen[str], word: str = "open") -> int:
    """The process id of the next worker that has opened its bus."""
    assert process.stdout is not None
    return int(lines_until(process.stdout, word)[-1].split()[1])


def receipts(output: str) -> list[bool]:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [line["clean"] for line in lines if line["event"] == "drained"]


def running(process: subprocess.Popen[str], count: int) -> None:
    """Until so many workers take signals as they should."""
    assert process.stderr is not None
    for _ in range(count):
        lines_until(process.stderr, "running: shop")


@pytest.mark.servers
def test_workers_are_processes_that_a_signal_drains_together(served: Project) -> None:
    process = served.start("run", served.bus, "--workers", "2")
    first, second = opened(process), opened(process)
    assert len({first, second, process.pid}) == 3
    running(process, 2)
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    assert code == 0, errors
    assert receipts(output) == [True, True]


@pytest.mark.servers
@pytest.mark.crash
def test_a_worker_that_is_killed_is_replaced(served: Project) -> None:
    process = served.start("run", served.bus, "--workers", "2")
    pids = {opened(process), opened(process)}
    running(process, 2)
    os.kill(pids.pop(), signal.SIGKILL)
    assert process.stderr is not None
    assert "SIGKILL; another begins in its place" in lines_until(process.stderr, "another begins")[-1]
    assert opened(process) not in pids
    running(process, 1)
    process.send_signal(signal.SIGINT)
    code, output, _ = ended(process)
    assert (code, receipts(output)) == (0, [True, True])


@pytest.mark.servers
@pytest.mark.crash
@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_workers_drain_when_the_process_that_started_them_is_killed(served: Project, loop: str) -> None:
    process = served.start("run", served.bus, "--workers", "2", "--loop", loop)
    assert opened(process) != opened(process)
    running(process, 2)
    process.kill()
    _, output, errors = ended(process)  # its output ends when the last worker has ended
    assert receipts(output) == [True, True]
    assert errors.count("the process that started this worker is gone") == 2


def test_a_worker_that_can_not_start_stops_all_with_its_exit_code(project: Project) -> None:
    project.write(SHOP.format(word="open"))
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    code, output, errors = project.finish("run", project.bus, "--workers", "2")
    assert (code, receipts(output)) == (4, [])
    assert "could not start (exit code 4): stopping all" in errors
    assert "can't connect to RabbitMQ at" in errors
    assert "secret" not in errors
    assert "Traceback" not in errors


def test_a_server_that_does_not_answer_ends_it_as_one_that_refuses_does(project: Project) -> None:
    """Though the worker has waited for ten seconds, and so lived longer than one that has failed at once."""
    project.write(SHOP.format(word="open"))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        project.environment["ORDERBUS_BROKER_URL"] = f"amqp://guest:guest@127.0.0.1:{silent.getsockname()[1]}/"
        code, _, errors = project.finish("run", project.bus, "--workers", "2")
    assert code == 4
    assert "could not start (exit code 4): stopping all" in errors


def test_a_program_that_fails_at_its_start_ends_it() -> None:
    workers = Workers([sys.executable, "-c", "raise SystemExit(1)"], 1, reload=False)
    assert anyio.run(workers.run) is ExitCode.UNCLEAN


def test_a_worker_that_dies_again_and_again_is_replaced_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("orderbus.cli.workers.PAUSE_S", 0.01)
    dies = """
import os, pathlib, signal
lives = pathlib.Path("lives")
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
os.kill(os.getppid() if len(lives.read_text()) == 4 else os.getpid(), signal.SIGTERM if len(lives.read_text()) == 4 else signal.SIGKILL)
"""
    monkeypatch.chdir(tmp_path)
    assert anyio.run(Workers([sys.executable, "-c", dies], 1, reload=False).run) is ExitCode.FINE
    assert [record.message for record in caplog.records if "SIGKILL" in record.message] == [
        f"worker 0 ended with SIGKILL; another begins in its place in {pause_s} s" for pause_s in ("0.02", "0.04", "0.08")
    ]


def test_where_no_process_can_be_started_in_the_place_of_one_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("orderbus.cli.workers.PAUSE_S", 0.01)
    monkeypatch.chdir(tmp_path)
    command = Path("command")
    command.write_text(f"""#!{sys.executable}
import os, pathlib, signal, sys
def drained(*_): pathlib.Path("drained").touch(); sys.exit()
if sys.argv[-1] == "0":
    while not pathlib.Path("waits").exists(): pass
    os.unlink("command")
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, drained)
pathlib.Path("waits").touch()
signal.pause()
""")
    command.chmod(0o755)

    class Stopped(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "no process can be started" in record.getMessage():
                os.kill(os.getpid(), signal.SIGTERM)

    handler = Stopped()
    logging.getLogger("orderbus").addHandler(handler)
    try:
        anyio.run(Workers(["./command"], 2, reload=False).run)
    finally:
        logging.getLogger("orderbus").removeHandler(handler)
    assert "No such file" in caplog.text
    assert Path("drained").exists()


def test_a_change_of_a_file_drains_and_begins_again_and_a_mistake_in_it_waits_for_the_next(project: Project) -> None:
    project.write(SHOP.format(word="open"))
    process = project.start("run", project.bus, "--reload")
    first = opened(process)
    assert process.stderr is not None
    lines_until(process.stderr, "running: shop")

    project.write("bus = (")
    lines_until(process.stderr, "begins again when a file changes")
    project.write(SHOP.format(word="mended"))
    assert opened(process, "mended") != first
    lines_until(process.stderr, "running: shop")
    process.send_signal(signal.SIGTERM)
    code, output, _ = ended(process)
    assert (code, receipts(output)) == (0, [True])


def test_a_folder_that_can_not_be_watched_stops_all(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def awatch(*_: object, **__: object) -> AsyncIterator[None]:
        raise RuntimeError("OS file watch limit reached")
        yield

    monkeypatch.setattr("watchfiles.awatch", awatch)
    workers = Workers([sys.executable, "-c", "import sys; sys.stdin.read()"], 1, reload=True)

    assert anyio.run(workers.run) is ExitCode.UNCLEAN
    assert "this folder can't be watched for changes: OS file watch limit reached; stopping all" in caplog.text


def test_a_signal_ends_a_reload_that_waits_for_a_change(project: Project) -> None:
    Path(project.folder, "bad.py").write_text("import os, sys\nfrom orderbus import Bus\nbus = Bus('shop')\n")
    process = project.start("run", "bad:bus", "--reload")
    assert process.stderr is not None
    lines_until(process.stderr, "running: shop")
    Path(project.folder, "bad.py").write_text("bus = (")
    lines_until(process.stderr, "begins again when a file changes")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0


# Bad input


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--workers", "0"], {}, "greater than or equal to 1"),
        (["--workers", "65"], {}, "less than or equal to 64"),
        (["--workers", "many"], {}, "valid integer"),
        (["--workers", "2"], {}, "ORDERBUS_BROKER_URL is memory://, which each process would have for itself"),
        (
            ["--workers", "2"],
            {"ORDERBUS_BROKER_URL": "amqp://a:secret@127.0.0.1:1/", "ORDERBUS_DATABASE_URL": "memory://"},
            "ORDERBUS_DATABASE_URL is memory://",
        ),
        (
            ["--workers", "2"],
            {"ORDERBUS_BROKER_URL": "amqp://a:secret@127.0.0.1:1/", "OTEL_METRICS_EXPORTER": "prometheus"},
            "OTEL_METRICS_EXPORTER=prometheus serves one process",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_workers_that_can_not_be(project: Project, arguments: list[str], environment: dict[str, str], says: str) -> None:
    project.write(SHOP.format(word="open"))
    project.environment |= environment | {"COLUMNS": "200"}
    result = project.run("run", project.bus, *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "secret" not in result.output


def test_reload_names_the_package_that_it_needs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write(SHOP.format(word="open"))
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    result = project.run("run", project.bus, "--reload")
    assert result.exit_code == 2
    assert "--reload needs the package watchfiles: pip install 'orderbus[cli]'" in result.stderr
