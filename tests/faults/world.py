"""What a scenario works with: a corner of private servers, processes that may be broken, a load that flows, and the count at the end."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import aiormq
import msgspec
import psycopg

from orderbus.adapters.postgres import apply
from tests.faults.ledger import PRODUCED_BELOW, REMINDED_EVERY, Facts, Letter, Place, Source
from tests.faults.program import PARKED, QUEUES, READY, UNCLEAN
from tests.faults.proxy import Proxy
from tests.faults.servers import Servers

ROOT = Path(__file__).parent.parent.parent
POLL_S = 0.1
"""How often a condition is looked at: more often, and looking is a load of its own."""
LIMIT_S = 60.0
"""For anything that must happen: a start, a recovery, the way to quiet."""
STOP_S = 30.0
GRACE_S = 2 * STOP_S
"""A drain that hangs is still at it when its time to stop is over: it doesn't end by giving up."""
NODE_LOG_BYTES = 200_000
NAME = 32
"""So much of the scenario's name is in that of its vhost and database, which may have 63 bytes."""
DEAD = (".dlq", "ob.lost")
LEAST = 10_000
"""Events of a run."""
FIRST_STEP = 1_000_000_000
"""The numbers of a producer's next life begin so much higher: more than it commits in a day."""
RECOVERED_S = 0.5
"""A backlog of so many seconds of load, or less, is full rate again."""

Which = Literal["broker", "database", "redis"]
TABLES = """
create table source (n bigint primary key, key text not null, seq bigint not null, does text not null);
create table key (key text primary key, seq bigint not null);
create table doomed (n bigint not null references source deferrable initially deferred);
create table effect (n bigint not null, which text not null);
create table trail (id bigint generated always as identity primary key, key text not null, seq bigint not null, n bigint not null);
"""
REMINDED = (
    "select (select count(*) from source where n %% %s = 0 and n < %s) - (select count(*) from effect where which = 'later')"
)
HANDLED = "select name, count(event_id) from orderbus.consumer left join orderbus.inbox on consumer = id group by name"


_worlds = itertools.count()
"""Part of each one's name: what one leaves behind is in no other's way."""


class Broken(AssertionError):
    """The scenario itself did not go as it must: what was to happen did not."""


class Process:
    """A role of tests/faults/program.py in a process of its own."""

    def __init__(self, name: str, log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.role = name.partition("-")[0]
        self.log_path = log
        self.must_run = False
        """From READY on, until somebody kills it, stops it, or waits for its failpoint: it may not end by itself meanwhile."""
        self._is_asked = False
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"tests.faults.{'clocked' if 'FAULTS_CLOCK' in environment else 'program'}", self.role],
                env=environment, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL."""
        if self.runs:
            self.must_run = False
        self.process.kill()
        self.process.wait(STOP_S)

    def end(self) -> None:
        """SIGKILL where it still runs."""
        if self.runs:
            self.kill()

    def check(self) -> None:
        """Raises Broken where it must run and doesn't."""
        if self.must_run and not self.runs:
            raise Broken(f"{self.name} has ended by itself, with {self.process.returncode}; see {self.log_path}")

    def freeze(self) -> None:
        """SIGSTOP. Raises Broken where it has ended."""
        if not self.runs:
            raise Broken(f"{self.name} was to be frozen, and has ended with {self.process.returncode}; see {self.log_path}")
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def hurry(self) -> None:
        """A producer: from now on as fast as it can."""
        if self.runs:
            self.process.send_signal(signal.SIGUSR1)

    def ask_to_stop(self) -> None:
        """SIGTERM, once: a second one would not wait for the first."""
        if self.runs and not self._is_asked:
            self._is_asked, self.must_run = True, False
            self.process.send_signal(signal.SIGTERM)

    def stop(self, *, may_be_unclean: bool = False) -> None:
        """SIGTERM, and a clean drain. Raises Broken where it is none, or where it has ended before.

        `may_be_unclean`: a server may be away, so that what was done can't be settled with it; it must stop in time all the same.
        """
        self.ask_to_stop()
        self.check()
        try:
            code = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Broken(f"{self.name} did not stop within {STOP_S:g} s of its SIGTERM; see {self.log_path}") from None
        if code and not (may_be_unclean and code == UNCLEAN):
            raise Broken(f"{self.name} ended with {code}; see {self.log_path}")

    def wait_killed(self) -> None:
        """Until a failpoint has killed it."""
        code = self.process.wait(LIMIT_S)
        if code != -signal.SIGKILL:
            raise Broken(f"{self.name} was to be killed at its failpoint, and ended with {code}; see {self.log_path}")
        self.must_run = False


class World:
    """A vhost, a database and a prefix on the servers, and everything that happens there. A context manager."""

    def __init__(self, servers: Servers, name: str, seed: int, folder: Path, rate: float) -> None:
        self.servers = servers
        self.rng = random.Random(seed)
        self.rate = rate
        self.recovery_s: float | None = None
        self.strangers: Mapping[Place, int] = {}
        """Letters that the scenario itself has provoked: where they must lie, and how many."""
        self.most_repeated: int | None = None
        """So many letters and outside effects may come again; None: none where nobody has lost the broker, else any number."""
        self.least_repeated = 0
        """So many must."""
        self.roles: list[Process] = []
        self._folder = folder
        self._name = name
        self._seed = seed
        self._lives = 0
        self._connections: set[str] | None = None
        """Those to the broker when the load first flowed."""
        self._mended_at: float | None = None
        self._proxies: list[Proxy] = []
        self._at_end: list[Callable[[], object]] = []
        self._stack = ExitStack()
        self._connection: psycopg.Connection[Any] | None = None
        self._connected_to = ""

    def __enter__(self) -> World:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        name = f"faults_{os.getpid()}_{next(_worlds)}_{self._name.replace('-', '_')[:NAME]}"
        try:
            self.broker_url = self._stack.enter_context(self.servers.rabbit.vhost(name))
            self.database_url = self._stack.enter_context(self.servers.postgres.database(name))
            self._prepare()
        except BaseException:
            self._stack.close()
            raise
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("ORDERBUS_", "FAULTS_"))},
            "PYTHONPATH": str(ROOT),
            "ORDERBUS_BROKER_URL": self.broker_url,
            "ORDERBUS_DATABASE_URL": self.database_url,
            "ORDERBUS_REDIS_PREFIX": f"{name}:",
            "ORDERBUS_RELAY_LEASE_S": "1",
            "ORDERBUS_GRACE_S": str(GRACE_S),
            "FAULTS_NOTES": str(self._folder / "notes"),
            "FAULTS_RATE": str(self.rate),
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Processes, proxies, what the scenario asked for, servers, database and vhost: each has its turn, whichever fails."""
        with self._stack, ExitStack() as stack:
            stack.callback(self.servers.start_all)
            stack.callback(self._keep_node_log)
            stack.callback(self._disconnect)
            for call in (*(role.end for role in self.roles), *(proxy.close for proxy in self._proxies), *self._at_end)[::-1]:
                stack.callback(call)

    # The scenario's own words

    def begin(self, *names: str) -> None:
        """Start these roles (all but `notify`, unless named), then the load, and return when it flows from end to end."""
        for role in [self.start(name, is_awaited=False) for name in names or ("service", "trail", "relay")]:
            self._await_ready(role)
        self.start("producer")
        self.flow()

    def start(self, name: str, *, failpoint: str = "", is_awaited: bool = True, **settings: str) -> Process:
        """A process for a role, which is the name up to its first dash; `settings` are more variables of its environment."""
        life = {}
        if name.startswith("producer"):
            life = {"FAULTS_FIRST": str(self._lives * FIRST_STEP), "FAULTS_SEED": str(self._seed + self._lives)}
            self._lives += 1
        if name.startswith("notify") and "ORDERBUS_REDIS_URL" not in self.environment:
            self.environment["ORDERBUS_REDIS_URL"] = self.servers.redis.url
        environment = self.environment | life | settings | {"FAULTS_FAILPOINT": failpoint}
        log = self._folder / f"{len(self.roles):02d}-{name}.log"
        role = Process(name, log, environment)
        self.roles.append(role)
        if is_awaited:
            self._await_ready(role)
        return role

    def role(self, name: str) -> Process:
        """The latest process of that name."""
        return next(role for role in reversed(self.roles) if role.name == name)

    def restart(self, name: str, **settings: str) -> Process:
        """SIGKILL where it still runs, and a new one in its place. Whether it was to run is looked at by `settle`."""
        self.role(name).end()
        return self.start(name, **settings)

    def proxy(self, which: Which, *, to_port: int | None = None) -> Proxy:
        """From now on, roles reach that server through a proxy of their own."""
        variable = f"ORDERBUS_{which.upper()}_URL"
        url = self.servers.redis.url if which == "redis" else self.environment[variable]
        parts = urlsplit(url)
        proxy = Proxy(to_port or parts.port or 0, self.rng)
        self._proxies.append(proxy)
        at = f"{parts.username}{f':{parts.password}' if parts.password else ''}@" if parts.username else ""
        self.environment[variable] = urlunsplit(parts._replace(netloc=f"{at}127.0.0.1:{proxy.port}"))
        return proxy

    def pause(self, least_s: float, most_s: float) -> None:
        """A random while, in which the world goes on."""
        time.sleep(self.rng.uniform(least_s, most_s))

    def flow(self, count: int = 500) -> None:
        """Until so many more have been applied."""
        target = self.applied() + count
        self.until(lambda: self.applied() >= target, f"{count} more events to be applied")
        if self._connections is None:
            self._connections = set(self.connections())

    def mended(self) -> None:
        """The fault is over: from here the recovery is timed, and it must come while the load goes on."""
        self._mended_at = time.monotonic()

    def until(self, is_true: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not is_true():
            if time.monotonic() > deadline:
                raise Broken(f"waited {limit_s:g} s for {what}; see {self._folder}")
            time.sleep(POLL_S)

    # The end

    def settle(self) -> Facts:
        """Until no backlog is left and 10,000 events are committed, the last of them in a hurry; then quiet, a clean stop, the facts."""
        self._check_all()
        if self._mended_at is not None:
            self.until(lambda: self.lag() <= self.rate * RECOVERED_S, "the backlog to be worked off", 3 * LIMIT_S)
            self.recovery_s = time.monotonic() - self._mended_at
        producers = [role for role in self.roles if role.role == "producer"]
        for role in producers:
            role.hurry()
        self.until(lambda: self.committed() >= LEAST, f"{LEAST} events to be committed", 2 * LIMIT_S + LEAST / self.rate)
        if self.most_repeated is None and not self._has_lost_the_broker():
            self.most_repeated = 0
        self._stop(*producers)
        with suppress(Broken):  # the count says what is missing
            self.until(self._is_quiet, "quiet")
        self._check_all()
        self._stop(*self.roles)
        return self._facts()

    def committed(self) -> int:
        return self.number("select count(*) from source")

    def applied(self) -> int:
        return self.number("select count(*) from effect where which = 'applied'")

    def noted(self) -> list[int]:
        """The outside effects of `notify`, in their order."""
        path = self._folder / "notes"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def lag(self) -> int:
        """Events that were committed and not yet applied, those that get parked left out."""
        return self.number(
            "select (select count(*) from source where does <> all (%s)) - (select count(*) from effect where which = 'applied')",
            list(PARKED),
        )

    def ready(self) -> dict[str, int]:
        """How many messages each queue of this run holds for its consumers, unacknowledged ones left out."""
        return asyncio.run(_ready(self.broker_url, self._queues()))

    @property
    def vhost(self) -> str:
        return urlsplit(self.broker_url).path[1:]

    def on_channel(self, call: Callable[[aiormq.abc.AbstractChannel], Awaitable[object]]) -> None:
        """Something that only AMQP can do to a broker."""
        asyncio.run(_on_channel(self.broker_url, call))

    def connections(self) -> list[str]:
        """The pids of this run's connections to the broker, ours left out."""
        lines = self.servers.rabbit.ctl("list_connections", "pid", "vhost").splitlines()
        return [pid for pid, _, vhost in (line.partition("\t") for line in lines) if vhost == self.vhost]

    @property
    def database_name(self) -> str:
        return urlsplit(self.database_url).path[1:]

    def at_end(self, call: Callable[[], object]) -> None:
        """Called after the count, whatever it was."""
        self._at_end.append(call)

    def again(self, statement: str) -> None:
        """Until it succeeds: locks of the load may be in its way."""
        self.until(lambda: self._has_done(statement), statement)

    def letters(self) -> list[Letter]:
        """What the dead letter queues hold now."""
        return asyncio.run(_letters(self.broker_url, {queue: n for queue, n in self.ready().items() if queue.endswith(DEAD)}))

    def execute(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """On the database itself, never through a proxy; over one connection, as long as it lasts."""
        had_one = self._connection is not None
        try:
            return self._execute(statement, arguments)
        except psycopg.OperationalError:
            if not had_one or self._connection is not None:
                raise
        return self._execute(statement, arguments)

    # Behind it

    def _execute(self, statement: str, arguments: Sequence[object]) -> list[tuple[Any, ...]]:
        if self._connection is None or self._connected_to != self.database_url:
            self._disconnect()
            self._connection = psycopg.connect(self.database_url, autocommit=True, connect_timeout=5)
            self._connected_to = self.database_url
        try:
            cursor = self._connection.execute(statement, arguments)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []
        finally:
            if self._connection.closed:
                self._connection = None

    def _keep_node_log(self) -> None:
        (self._folder / "rabbitmq.log").write_text(self.servers.rabbit.node_log()[-NODE_LOG_BYTES:])

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _prepare(self) -> None:
        async def migrate() -> None:
            async with await psycopg.AsyncConnection.connect(self.database_url, autocommit=True) as connection:
                await apply(connection)
                await connection.execute(TABLES)

        asyncio.run(migrate())

    def _await_ready(self, role: Process) -> None:
        self.until(lambda: READY in role.log() or not role.runs, f"{role.name} to be ready")
        if READY not in role.log():
            raise Broken(f"{role.name} ended with {role.process.returncode} before it was ready; see {role.log_path}")
        role.must_run = True

    def _has_lost_the_broker(self) -> bool:
        """Whether a process has: it was killed, stopped or cut off; behind a proxy any connection may have been."""
        return bool(self._proxies) or self._connections is None or not self._connections <= set(self.connections())

    def _check_all(self) -> None:
        for role in self.roles:
            role.check()

    def _stop(self, *roles: Process) -> None:
        running = [role for role in roles if role.runs]
        for role in running:
            role.ask_to_stop()
        for role in running:
            role.stop()

    def _has_done(self, statement: str) -> bool:
        try:
            self.execute(statement)
        except psycopg.OperationalError:
            return False
        return True

    def number(self, query: str, *arguments: object) -> int:
        """What a query answers; asked again and again while the database is away."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                return int(self.execute(query, *arguments)[0][0])
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _queues(self) -> list[str]:
        started = {role.role for role in self.roles}
        own = [queue for role in sorted(started & QUEUES.keys()) for queue in QUEUES[role]]
        return ["ob.lost", *own, *(f"{queue}.dlq" for queue in own)]

    def _is_quiet(self) -> bool:
        if self.lag() or self._unpublished():
            return False
        started = {role.role for role in self.roles}
        if "trail" in started and self.number("select count(*) from trail") < self.committed():
            return False
        if self.number(REMINDED, REMINDED_EVERY, PRODUCED_BELOW):
            return False
        if "notify" in started and len(set(self.noted())) < self.committed():
            return False
        if sum(count for queue, count in self.ready().items() if not queue.endswith(DEAD)):
            return False
        return "notify" not in started or not self.in_hand()  # messages whose claim a dead process holds until its lease is over

    def in_hand(self, *queues: str) -> int:
        """How many messages the consumers of these queues (of all) hold."""
        lines = self.servers.rabbit.ctl("list_queues", "-p", self.vhost, "name", "messages_unacknowledged").splitlines()
        held = dict(line.split("\t") for line in lines if line.count("\t") == 1)
        return sum(int(count) for queue, count in held.items() if count.isdigit() and (queue in queues or not queues))

    def _unpublished(self) -> int:
        tables = ("outbox", "stuck", "scheduled")
        return self.number(f"select {' + '.join(f'(select count(*) from orderbus.{table})' for table in tables)}")

    def _facts(self) -> Facts:
        started = {role.role for role in self.roles}
        ready = self.ready()
        letters = self.letters()
        effects = self.execute("select n, which from effect")
        source = self.execute("select n, key, seq, does from source")
        return Facts(
            committed={n: Source(key, seq, PARKED.get(does)) for n, key, seq, does in source},
            placed=[n for n, which in effects if which == "placed"],
            applied=[n for n, which in effects if which == "applied"],
            later=[n for n, which in effects if which == "later"],
            trail=[(key, seq, n) for key, seq, n in self.execute("select key, seq, n from trail order by id")]
            if "trail" in started
            else None,
            noted=self.noted() if "notify" in started else None,
            letters=letters,
            unpublished=self._unpublished(),
            unhandled=sum(count for queue, count in ready.items() if not queue.endswith(DEAD)),
            handled=dict(self.execute(HANDLED)),
            strangers=self.strangers,
            most_repeated=self.most_repeated,
            least_repeated=self.least_repeated,
        )


async def _on_channel(url: str, call: Callable[[aiormq.abc.AbstractChannel], Awaitable[object]]) -> None:
    connection = await aiormq.connect(url)
    try:
        await call(await connection.channel())
    finally:
        await connection.close()


async def _ready(url: str, queues: Sequence[str]) -> dict[str, int]:
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        found = {}
        for queue in queues:
            declared = await channel.queue_declare(queue, passive=True)
            found[queue] = declared.message_count or 0
        return found
    finally:
        await connection.close()


async def _letters(url: str, counts: dict[str, int]) -> list[Letter]:
    """All messages of the dead letter queues, which are looked at and left there."""
    connection = await aiormq.connect(url)
    try:
        channel = await connection.channel()
        letters = []
        for queue, count in counts.items():
            for _ in range(count):
                message = await channel.basic_get(queue)
                reason = reason_of(message.header.properties.headers or {})
                letters.append(Letter(Place(queue, reason), number_of(message.body)))
        return letters
    finally:
        await connection.close()


def reason_of(headers: Mapping[str, Any]) -> str:
    """Why a letter was parked, by us or by the broker."""
    deaths = headers.get("x-death") or [{}]
    return str(headers.get("ob-reason") or str(deaths[0].get("reason", "")).replace("_", "-"))


def number_of(body: bytes) -> int | None:
    """The `n` of an event of the run; None for a stranger's message."""
    try:
        n = msgspec.json.decode(body, type=dict[str, Any])["n"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError):
        return None
    return n if isinstance(n, int) else None
