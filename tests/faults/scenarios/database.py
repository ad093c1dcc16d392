"""PostgreSQL restarted, killed, full, locked, out of connections, failed over, and of another version."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import psycopg

from tests.faults.scenario import scenario
from tests.faults.servers import PostgresServer, Server, postgres_binaries
from tests.faults.world import Broken, World

BACKENDS = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
SMALL_MIB = 64
ON_SMALL_DISK = ("source", "effect", "trail", "orderbus.outbox")
GAUGES = 8
LEFT_OPEN_S = 120.0
LEFT_OPEN_RATE = 200.0
"""Events a second, so that all that it keeps from being vacuumed stays a matter of minutes."""


@scenario("database-restarted", quick=True)
def restarted(world: World) -> None:
    """A fast shutdown: transactions are rolled back, connections closed."""
    world.begin()
    world.servers.postgres.stop()
    world.pause(0.1, 2.0)
    world.servers.postgres.start()
    world.mended()


@scenario("database-killed")
def killed(world: World) -> None:
    """SIGKILL to the server and all its processes; it recovers from its log."""
    world.begin()
    world.servers.postgres.kill()
    world.pause(0.1, 1.0)
    world.servers.postgres.start()
    world.mended()


@scenario("database-frozen")
def frozen(world: World) -> None:
    """SIGSTOP to the server and all its processes: no open connection is answered, and no new one."""
    world.begin()
    world.servers.postgres.freeze()
    world.pause(3.0, 6.0)
    world.servers.postgres.thaw()
    world.mended()


@scenario("backends-terminated-again-and-again")
def terminated(world: World) -> None:
    world.begin()
    for _ in range(15):
        world.execute(BACKENDS)
        world.pause(0.05, 0.6)
    world.mended()


@scenario("connections-all-taken")
def taken(world: World) -> None:
    """Nobody gets a connection any more, not even who starts now; those that there were are gone."""
    world.begin()
    with ExitStack() as stack, session(world) as first:
        newcomer = world.start("relay-b", is_awaited=False)

        def is_refused() -> bool:
            first.execute(f"{BACKENDS} and application_name <> 'taker'")
            with suppress(psycopg.OperationalError):
                while True:
                    stack.enter_context(psycopg.connect(world.database_url, application_name="taker"))
            return "too many clients" in world.role("service").log()

        world.until(is_refused, "the service to be refused")
        world.pause(1.0, 2.0)
    if not newcomer.runs:
        world.start("relay-b")
    world.mended()


@contextmanager
def session(world: World, **settings: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A superuser's, whose statements the scenario chooses."""
    with psycopg.connect(world.database_url, autocommit=True) as connection:
        for name, value in settings.items():
            connection.execute(f"set {name} = '{value}'")  # type: ignore[call-overload]
        yield connection


@scenario("deadlocks-with-handlers")
def deadlocks(world: World) -> None:
    """A session waits for the inbox while it holds what handlers wait for; PostgreSQL ends the handlers' transactions."""
    world.begin()
    before = _deadlocks(world)
    for _ in range(3):
        with session(world, deadlock_timeout="1h") as other, other.transaction():
            other.execute("lock table effect in share mode")
            world.until(lambda: _waiting(world) > 0, "handlers to wait for the lock")
            other.execute("lock table orderbus.inbox in share mode")
        world.flow(200)
    if _deadlocks(world) == before:
        raise Broken("there was no deadlock")
    world.mended()


def _waiting(world: World) -> int:
    return world.number(
        "select count(*) from pg_locks where not granted and database = (select oid from pg_database where datname = current_database())"
    )


def _deadlocks(world: World) -> int:
    return world.number("select deadlocks from pg_stat_database where datname = current_database()")


@scenario("table-locked-beyond-the-lock-timeout")
def locked(world: World) -> None:
    world.begin()
    with session(world) as other, other.transaction():
        other.execute("lock table effect in exclusive mode")
        world.until(lambda: "lock timeout" in world.role("service").log(), "a lock timeout")
    world.mended()


GAUGE = f"""
create table gauge (id integer not null, part integer not null, count bigint not null) partition by list (part);
create table gauge_1 partition of gauge for values in (1);
create table gauge_2 partition of gauge for values in (2);
insert into gauge select n, 1, 0 from generate_series(1, {GAUGES}) n;
create function gauge() returns trigger language plpgsql as $$
begin
    update gauge set count = count + 1 where id = 1 + floor(random() * {GAUGES})::integer;
    return null;
end $$;
create trigger gauge after insert on effect for each statement execute function gauge()"""
MOVED = "moved to another partition due to concurrent update"


@scenario("serialization-failures")
def serializable(world: World) -> None:
    """Rows that handlers update move to another partition under them: that PostgreSQL calls a serialization failure (40001)."""
    world.execute(GAUGE)
    before = world.servers.postgres.log().count(MOVED)
    world.begin()
    for _ in range(5):
        with session(world) as other, other.transaction():
            other.execute("update gauge set part = 3 - part")
            world.until(lambda: _waiting(world) > 0, "handlers to wait for a row")
        world.flow(200)
    if world.servers.postgres.log().count(MOVED) == before:
        raise Broken("there was no serialization failure")
    world.mended()


@scenario("statement-timeouts")
def slow(world: World) -> None:
    """The server ends handlers' statements for their length: tries that count, as their policy says, until the lock is gone."""
    world.start(
        "service", ORDERBUS_DATABASE_URL=_with_option(world.environment["ORDERBUS_DATABASE_URL"], "statement_timeout=200")
    )
    world.begin("trail", "relay")
    with session(world) as other, other.transaction():
        other.execute("lock table effect in exclusive mode")
        world.until(lambda: "statement timeout" in world.role("service").log(), "a statement timeout")
    world.mended()


def _with_option(url: str, option: str) -> str:
    return f"{url}?options={quote(f'-c {option}')}"


@scenario("disk-full")
def disk_full(world: World) -> None:
    """The tables lie on a small disk, which somebody fills up."""
    with _small_disk(world) as disk:
        world.begin()
        with Path(disk, "filler").open("wb") as filler, suppress(OSError):
            while True:
                filler.write(bytes(1 << 16))
                filler.flush()
        world.until(lambda: any("No space left" in role.log() for role in world.roles), "the disk to be full")
        world.pause(1.0, 3.0)
        Path(disk, "filler").unlink()
        world.mended()
        world.flow()


@contextmanager
def _small_disk(world: World) -> Iterator[Path]:
    """A disk of its own, and a tablespace on it for some of the tables. Whatever happens to the scenario, the server is left without them."""
    name = f"small_{secrets.token_hex(4)}"
    disk = world.servers.folder / name
    disk.mkdir()
    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", str(disk)], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(disk)], check=False)
        (disk / "space").mkdir()
        shutil.chown(disk / "space", "postgres")
        world.execute(f"create tablespace {name} location '{disk / 'space'}'")
        stack.callback(world.again, f"drop tablespace {name}")
        for table in ON_SMALL_DISK:
            world.execute(f"alter table {table} set tablespace {name}")
            stack.callback(world.again, f"alter table {table} set tablespace pg_default")
        stack.callback(Path(disk, "filler").unlink, missing_ok=True)
        yield disk


@scenario("transaction-left-open-beside-a-busy-outbox")
def left_open(world: World) -> None:
    """It has written, so it has a transaction id, and it lasts for minutes: nobody waits for it, and nothing is skipped."""
    world.rate = min(world.rate, LEFT_OPEN_RATE)
    world.environment["FAULTS_RATE"] = str(world.rate)
    with session(world, idle_in_transaction_session_timeout="0") as other:
        other.execute("begin")
        other.execute("create table left_open ()")
        world.begin()
        until = time.monotonic() + LEFT_OPEN_S
        while time.monotonic() < until:
            world.flow(10 * int(world.rate))
            if world.lag() > 2 * world.rate:
                raise Broken(f"{world.lag()} events wait behind an open transaction")
        other.execute("rollback")
    world.mended()


@scenario("failover-to-a-new-address")
def failover(world: World) -> None:
    """The primary is killed; its synchronous standby takes over at another address, to which the name then points."""
    primary = world.servers.postgres
    standby = _standby(primary, world.servers.folder / f"standby-{world.rng.randrange(10**9)}")
    proxy = world.proxy("database")
    try:
        standby.start()
        world.until(
            lambda: world.number("select count(*) from pg_stat_replication where sync_state = 'sync'") == 1,
            "the standby to be synchronous",
        )
        world.begin()
        primary.kill()
        world.pause(0.1, 1.0)
        with psycopg.connect(standby.url, autocommit=True) as connection:
            connection.execute("select pg_promote()")
            connection.execute("alter system reset synchronous_standby_names")
            connection.execute("select pg_reload_conf()")
        world.database_url = standby.url_of(world.database_name)
        proxy.target_port = standby.port
        world.mended()
        world.at_end(lambda: _back(primary, standby))
    except BaseException:
        _back(primary, standby)
        raise


def _standby(primary: PostgresServer, folder: Path) -> PostgresServer:
    folder.mkdir()
    shutil.chown(folder, "postgres") if os.geteuid() == 0 else None
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("alter system set synchronous_standby_names = '*'")
    copy = [
        f"{postgres_binaries()}/pg_basebackup",
        "-D",
        str(folder / "data"),
        "-R",
        "-X",
        "stream",
        "-c",
        "fast",
        "-d",
        primary.url,
    ]
    subprocess.run(copy, check=True, capture_output=True, user="postgres" if os.geteuid() == 0 else None, cwd=folder)
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("select pg_reload_conf()")
    return PostgresServer(folder, "standby", data=folder / "data")


def _back(primary: Server, standby: Server) -> None:
    """The old primary serves the next scenario."""
    standby.kill()
    assert isinstance(primary, PostgresServer)
    primary.start()
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("alter system reset synchronous_standby_names")
        connection.execute("select pg_reload_conf()")


@scenario("read-only-for-a-while")
def read_only(world: World) -> None:
    """What a failed-over primary says until the name points to the new one."""
    world.begin()
    world.execute(f"alter database {world.database_name} set default_transaction_read_only = on")
    world.execute(BACKENDS)
    world.until(lambda: "read-only transaction" in world.role("relay").log(), "writes to be refused")
    world.pause(1.0, 2.0)
    with session(world) as other:
        other.execute("set default_transaction_read_only = off")
        other.execute(f"alter database {world.database_name} reset default_transaction_read_only")
    world.execute(BACKENDS)
    world.mended()


@scenario("schema-one-version-ahead-or-behind")
def versions(world: World) -> None:
    """Who starts refuses it and says why, and what to do; who runs goes on."""
    world.begin()
    own = world.number("select max(version) from orderbus.schema_version")
    one_more = (
        f"insert into orderbus.schema_version (version) values ({own + 1})",
        f"delete from orderbus.schema_version where version > {own}",
    )
    one_less = (
        f"delete from orderbus.schema_version where version = {own}",
        f"insert into orderbus.schema_version (version) values ({own})",
    )
    for (change, back), word in ((one_more, "newer"), (one_less, "orderbus schema apply")):
        world.execute(change)
        newcomer = world.start("service-b", is_awaited=False)
        world.until(lambda: not newcomer.runs, "the newcomer to end")  # noqa: B023 - it is waited for here
        if word not in newcomer.log():
            raise Broken(f"the newcomer did not say {word!r}; see {newcomer.log_path}")
        world.flow()
        world.execute(back)
    world.start("service-b")
    world.mended()


@scenario("relay-alone-cut-off-from-the-database")
def cut_off(world: World) -> None:
    """It can't renew its leases, and must not publish on once they have run out; another one takes over."""
    world.start("relay")
    proxy = world.proxy("database")
    cut = world.start("relay-b")
    world.environment["ORDERBUS_DATABASE_URL"] = world.database_url
    world.begin("service", "trail")
    proxy.black_hole()
    time.sleep(0)
    world.flow(3000)
    proxy.pass_on()
    if not cut.runs:
        raise Broken(f"the relay that was cut off has ended; see {cut.log_path}")
    world.mended()
