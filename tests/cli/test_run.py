"""`orderbus run` as a real process: signals, receipts, exit codes, and what it says when it can't start."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
from urllib.parse import unquote, urlsplit, urlunsplit

import pytest

from tests.cli.conftest import Project, ended, lines_until
from tests.servers import Rabbit

SHOP = """
    import anyio
    from orderbus import Bus, Event, Retry, Tx

    class Ticked(Event, topic="shop.ticked"):
        n: int

    bus = Bus("shop")

    @bus.every(0.01)
    async def tick() -> Ticked:
        return Ticked(n=1)

    @bus.on(Ticked, retry=Retry.exponential(attempts=3))
    async def hear(event: Ticked, tx: Tx) -> None:
        print("heard", flush=True)
"""

SLEEPER = SHOP.replace('print("heard", flush=True)', 'print("heard", flush=True); await anyio.sleep(3600)')


def open_and_heard(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    lines_until(process.stderr, "running: ")  # a handler may run before; a signal would then cancel the opening
    lines_until(process.stdout, "heard")


@pytest.mark.parametrize("loop", ["auto", "asyncio", "uvloop", "trio"])
def test_sigterm_drains_and_prints_a_receipt(project: Project, loop: str) -> None:
    project.write(SHOP)
    process = project.start("run", project.bus, "--loop", loop)
    open_and_heard(process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    assert code == 0, errors
    receipt = json.loads(output.splitlines()[-1])
    assert (receipt["event"], receipt["group"], receipt["clean"], receipt["cancelled"]) == ("drained", "shop", True, 0)
    assert receipt["stats"]["handled"] >= 1
    assert {"finished", "released", "seconds"} <= receipt.keys()


def test_sigint_drains_too(project: Project) -> None:
    project.write(SHOP)
    process = project.start("run", project.bus)
    open_and_heard(process)
    process.send_signal(signal.SIGINT)
    code, output, _ = ended(process)
    assert code == 0
    assert json.loads(output.splitlines()[-1])["event"] == "drained"


def test_work_that_outlasts_the_grace_time_makes_the_exit_code_3(project: Project) -> None:
    project.write(SLEEPER)
    project.environment["ORDERBUS_GRACE_S"] = "0.2"
    process = project.start("run", project.bus)
    open_and_heard(process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    assert code == 3, errors
    receipt = json.loads(output.splitlines()[-1])
    assert not receipt["clean"]
    assert receipt["cancelled"] >= 1


def test_a_periodic_function_that_outlasts_the_grace_time_makes_the_exit_code_3(project: Project) -> None:
    project.write(SHOP.replace("return Ticked(n=1)", 'print("heard", flush=True); await anyio.sleep(3600)'))
    project.environment["ORDERBUS_GRACE_S"] = "0.2"
    process = project.start("run", project.bus)
    open_and_heard(process)
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    assert code == 3, errors
    receipt = json.loads(output.splitlines()[-1])
    assert (receipt["clean"], receipt["cancelled"]) == (False, 1)


def test_a_signal_before_everything_is_open_ends_it_without_a_receipt(project: Project) -> None:
    project.write(
        SHOP
        + """
    from collections.abc import AsyncIterator

    class Slow: ...

    @bus.resource
    async def slow() -> AsyncIterator[Slow]:
        print("opening", flush=True)
        await anyio.sleep(3600)
        yield Slow()
    """
    )
    process = project.start("run", project.bus)
    assert process.stdout is not None
    lines_until(process.stdout, "opening")
    process.send_signal(signal.SIGTERM)
    code, output, errors = ended(process)
    assert (code, output) == (0, "")
    assert "not open yet" in errors


@pytest.mark.servers
def test_a_broker_user_who_may_not_read_the_queue_makes_the_exit_code_4(project: Project, rabbit: Rabbit, vhost_url: str) -> None:
    parts, name, group = urlsplit(vhost_url), f"deaf-{secrets.token_hex(4)}", f"shop-{secrets.token_hex(4)}"
    project.write(SHOP.replace('Bus("shop")', f'Bus("{group}")'))
    project.environment |= {"ORDERBUS_BROKER_URL": vhost_url, "ORDERBUS_DATABASE_URL": "memory://"}
    assert project.run("topology", "apply", project.bus, "--yes").exit_code == 0  # whoever may not read it can't make it
    deaf_url = urlunsplit(parts._replace(netloc=f"{name}:secret@{parts.hostname}:{parts.port or 5672}"))
    project.environment["ORDERBUS_BROKER_URL"] = deaf_url
    rabbit.ctl("add_user", name, "secret")
    try:
        rabbit.ctl("set_permissions", "-p", unquote(parts.path[1:]), name, ".*", ".*", f"^(?!{group}).*$")
        code, output, errors = project.finish("run", project.bus)
    finally:
        rabbit.ctl("delete_user", name)

    assert (code, output) == (4, "")
    assert f"the bus '{group}' can't start: consuming, queue '{group}.shop.ticked': " in errors
    assert "ACCESS_REFUSED" in errors
    assert "Traceback" not in errors


def test_the_banner_says_what_consumes_what(project: Project) -> None:
    project.write(SHOP)
    process = project.start("run", project.bus)
    assert process.stderr is not None
    banner = "".join(lines_until(process.stderr, "running: shop"))
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    row = next(line for line in banner.splitlines() if line.startswith(" hear"))
    assert row.split() == ["hear", "shop.ticked", "shop.shop.ticked", "3", "tries", "inbox"]


@pytest.mark.parametrize("columns", [60, 80])
def test_the_banner_fits_the_terminal(project: Project, columns: int) -> None:
    project.write(
        SHOP.replace("shop.ticked", "warehouse.shelves.recounted-after-the-night").replace("hear(", "hear_of_what_was_counted(")
    )
    project.environment["COLUMNS"] = str(columns)
    process = project.start("run", project.bus)
    assert process.stderr is not None
    banner = [line for line in lines_until(process.stderr, "running: shop") if line.startswith(" ")]
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0
    assert len(banner) > 3
    assert max(len(line.rstrip("\n")) for line in banner) <= columns


def test_json_logs_are_json_on_every_line(project: Project) -> None:
    project.write(SHOP)
    process = project.start("run", project.bus, "--log-json")
    assert process.stdout is not None
    output = [*lines_until(process.stdout, "running: shop"), *lines_until(process.stdout, "heard")]
    process.send_signal(signal.SIGTERM)
    code, rest, errors = ended(process)
    assert (code, errors) == (0, "")
    lines = [json.loads(line) for line in [*output, *rest.splitlines()] if "heard" not in line]
    receipt = lines.pop()
    assert receipt["event"] == "drained"
    assert {"running: shop", "received SIGTERM: draining"} <= {line["message"] for line in lines}
    assert {line["service.name"] for line in lines} == {"shop"}
    assert all({"@timestamp", "log.level", "log.logger", "ecs.version"} <= line.keys() for line in lines)


def test_several_buses_in_one_process_hear_each_other(project: Project) -> None:
    project.write(SHOP)
    project.write(
        f"""
        from orderbus import Bus
        from {project.module} import Ticked

        bus = Bus("listener")

        @bus.on(Ticked, guard="none")
        async def listen(event: Ticked) -> None:
            print("listened", flush=True)
        """,
        "listener",
    )
    project.environment["ORDERBUS_BROKER_URL"] = "memory://shared"
    process = project.start("run", project.bus, "listener:bus")
    assert process.stdout is not None
    assert process.stderr is not None
    lines_until(process.stderr, "running: ")
    lines_until(process.stdout, "listened")
    process.send_signal(signal.SIGTERM)
    code, output, _ = ended(process)
    assert code == 0
    receipts = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert {receipt["group"] for receipt in receipts} == {"shop", "listener"}


# What can't start says so in one message


def test_two_buses_on_a_memory_broker_each_are_refused(project: Project) -> None:
    project.write(SHOP)
    project.write('from orderbus import Bus\nbus = Bus("other")', "other")
    code, _, errors = project.finish("run", project.bus, "other:bus")
    assert code == 2
    assert "memory://NAME" in errors


def test_a_database_that_is_down(project: Project) -> None:
    project.write(SHOP)
    project.environment["ORDERBUS_DATABASE_URL"] = "postgresql://someone:secret@127.0.0.1:1/shop"
    code, output, errors = project.finish("run", project.bus)
    assert (code, output) == (4, "")
    assert "PostgreSQL at 127.0.0.1:1/shop" in errors
    assert "Traceback" not in errors
    assert "secret" not in errors


def test_a_broker_that_is_down(project: Project) -> None:
    project.write(SHOP)
    project.environment["ORDERBUS_BROKER_URL"] = "amqp://someone:secret@127.0.0.1:1/"
    code, output, errors = project.finish("run", project.bus)
    assert (code, output) == (4, "")
    assert "RabbitMQ at amqp://127.0.0.1:1" in errors
    assert "Traceback" not in errors
    assert "secret" not in errors


def test_all_wrong_settings_are_told_at_once(project: Project) -> None:
    project.write(SHOP)
    project.environment |= {"ORDERBUS_GRACE": "5", "ORDERBUS_POOL_SIZE": "many"}
    code, _, errors = project.finish("run", project.bus)
    assert code == 2
    assert "did you mean ORDERBUS_GRACE_S?" in errors
    assert "ORDERBUS_POOL_SIZE='many'" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{module}:buss", "did you mean {module}:bus?"),
        ("{module}:Ticked", "is a EventMeta, not an orderbus.Bus"),
        ("{module}", "is not MODULE:BUS"),
        ("{module}:", "is not MODULE:BUS"),
        ("nowhere:bus", "there is no module 'nowhere'"),
        ("{module}s:bus", "did you mean {module}?"),
        ("policy:bus", "attempts must be a whole number from 1 to 1000, not 0 ({folder}/policy.py:2) [OB315: https://"),
        ("{module}.below:bus", "there is no module '{module}.below'"),
        ("broken:bus", "module broken can't be imported: ZeroDivisionError: division by zero (" + "{folder}/broken.py:3)"),
        ("ending:bus", "module ending can't be imported: it ends the process (sys.exit(0))"),
        ("unparsed:bus", "module unparsed can't be imported: SyntaxError"),
        ("lacking:bus", "module lacking can't be imported: ModuleNotFoundError: No module named 'not_installed'"),
        ("wrong:bus", "must be an async function"),
    ],
)
def test_a_bus_that_can_not_be_had(project: Project, target: str, message: str) -> None:
    project.write(SHOP)
    project.write("bus = None\ndef f():\n    return 1 / 0\nf()", "broken")
    project.write("import sys\nsys.exit(0)", "ending")
    project.write("bus = (", "unparsed")
    project.write("import not_installed", "lacking")
    project.write("from orderbus import Retry\nRetry.fixed(1, attempts=0)", "policy")
    project.write(
        """
        from orderbus import Bus, Event

        class E(Event, topic="e"):
            n: int

        bus = Bus("wrong")

        @bus.on(E)
        def handle(event: E) -> None: ...
        """,
        "wrong",
    )
    names = {"module": project.module, "folder": str(project.folder)}
    code, _, errors = project.finish("run", target.format(**names))
    assert code == 2
    assert message.format(**names) in errors
    assert len(errors.splitlines()) == 1


def test_one_group_is_not_run_twice(project: Project) -> None:
    project.write(SHOP)
    code, _, errors = project.finish("run", project.bus, project.bus)
    assert code == 2
    assert "'shop' is named twice" in errors
