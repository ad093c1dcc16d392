"""pipeline: the demo's six services under a rising load of orders, until a target breaks; what is reported is the highest rate held.

A rate is tried for TRY_S on servers that were emptied before, and again when it broke, since a busy machine hiccups; only what broke
twice is broken. The highest rate that was held is then held for HOLD_S, or the next lower one that can be; all figures but those of
what was lost or doubled are of this last run, and those are of every run of the search. `--scale` multiplies both times.

An order counts as completed when the database says so. CPU is in microseconds an order; the load generator's is told separately.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from uuid import UUID

import msgspec
import psycopg
from rich.console import Console

from bench import meter
from bench.ground import ground
from bench.knee import find_knee, hold
from bench.results import Round
from bench.running import Failed
from bench.workloads import Variant, Workload
from services.demo.audit import OUTBOXES
from services.demo.figures import Figures
from services.demo.processes import SERVER_NAMES, Child, ChildFailed, wait_until_ready, wait_until_said
from services.demo.run import Plan, Run
from services.demo.servers import Servers, embedded, make_scarce
from services.demo.shop import RUNNING, SERVICES, children, free_port, surroundings
from services.shared import database

TRY_S, HOLD_S = 15, 60
LEAST_S = 7
FIRST = {"orderbus": 800, "by-hand": 200}
"""The rate at which the search begins."""
TRIES = 2
WARM_S = 3
"""Seconds at the begin of the load that don't count for its completed rate: it takes one to start, and orders take some time."""
SEED = 1
READY_S = 60
STARTED = "FastStream app started successfully"
FOLDER = Path("build/bench-pipeline")
BY_HAND = Path(__file__).resolve().parent.parent / "by_hand_shop"


class Trial(msgspec.Struct, frozen=True):
    """One run of the demo at one rate; `completed_per_s` is without its first seconds and its end."""

    asked: int
    figures: Figures
    completed_per_s: float
    cpu_us: dict[str, float]
    peak_rss_mib: float

    @property
    def broken(self) -> list[str]:
        """The targets that were missed, in words."""
        f = self.figures
        missed = {
            f"API p99 {f.api_p99_ms:.0f} ms": f.api_p99_ms > 200,
            f"end to end p99 {f.e2e_p99_ms:.0f} ms": f.e2e_p99_ms > 2000,
            f"errors {f.error_ratio:.2%}": f.error_ratio > 0.001,
            f"dead letters {f.dlq_ratio:.2%}": f.dlq_ratio > 0.001,
            f"completed {self.completed_per_s:.0f}/s": self.completed_per_s < 0.98 * self.asked,
            f"lost {f.lost}": f.lost > 0,
            f"doubled {f.doubled}": f.doubled > 0,
            f"ghosts {f.ghosts}": f.ghosts > 0,
            f"oversold {f.oversold}": f.oversold > 0,
            f"money off {f.money_off}": f.money_off > 0,
        }
        return [words for words, is_missed in missed.items() if is_missed]


def measure(variant: Variant, peer: str, scale: float, tell: Callable[[str], None]) -> Round:
    """One search. Raises Failed where a service ends by itself, or where nothing is held."""
    seconds, hold_seconds = max(round(TRY_S * scale), LEAST_S), max(round(HOLD_S * scale), LEAST_S)
    trials: list[Trial] = []

    def held(rate: int, seconds: int = seconds) -> bool:
        for _ in range(TRIES):
            trials.append(trial(variant.name, peer, rate, seconds))
            broken = trials[-1].broken
            complaint = "" if trials[-1].figures.consistent else "! "
            tell(f"{complaint}pipeline, {variant.name}, {peer}: {rate}/s for {seconds} s: {', '.join(broken) or 'held'}")
            if not broken:
                return True
        return False

    knee = hold(find_knee(FIRST[peer], held), lambda rate: held(rate, hold_seconds))
    if not knee.held:
        raise Failed(f"it does not hold {knee.broke} orders a second: {', '.join(trials[-1].broken)}")
    return as_round(trials, knee.broke)


def as_round(trials: Sequence[Trial], broke: int | None) -> Round:
    """The last trial is what was held; what none of them may do is summed over all."""
    last = trials[-1]
    f, cpu = last.figures, last.cpu_us
    return Round(
        seconds=f.seconds,
        count=f.orders_completed,
        messages_per_s=last.completed_per_s,
        client_cpu_us=sum(us for name, us in cpu.items() if name not in (*SERVER_NAMES, "load")),
        server_cpu_us=sum(us for name, us in cpu.items() if name in SERVER_NAMES),
        peak_rss_mib=last.peak_rss_mib,
        p50_ms=f.api_p50_ms,
        p99_ms=f.api_p99_ms,
        lost=sum(one.figures.lost for one in trials),
        doubled=sum(one.figures.doubled for one in trials),
        left=0,
        more={
            "asked": last.asked,
            "broke_at": broke or 0,  # 0: it never broke
            "e2e_p50_ms": f.e2e_p50_ms,
            "e2e_p99_ms": f.e2e_p99_ms,
            "errors_percent": f.error_ratio * 100,
            "dead_letters_percent": f.dlq_ratio * 100,
            "ghosts": sum(one.figures.ghosts for one in trials),
            "oversold": sum(one.figures.oversold for one in trials),
            "money_off": sum(one.figures.money_off for one in trials),
            "load_cpu_us": cpu.get("load", 0.0),
        },
    )


def trial(variant: str, peer: str, rate: int, seconds: int) -> Trial:
    """Start a peer's services on emptied servers, send orders, wait until they have settled, stop, and count."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with _servers(variant) as servers:
        asyncio.run(database.prepare(servers.database_url))
        make_scarce(servers.database_url)
        if peer == "by-hand":
            processes = by_hand(servers, port)
        else:
            processes = children(variant == "servers", servers.environment() | surroundings(port), FOLDER)
        plan = Plan(
            mode=variant,
            rate=rate,
            seconds=seconds,
            kill="",
            seed=SEED,
            url=url,
            database_url=servers.database_url,
            folder=FOLDER,
            outboxes=("outbox",) if peer == "by-hand" else OUTBOXES,
        )
        with closing(Run(plan, processes, servers, Console(quiet=True))) as run:
            with ExitStack() as running:
                for child in processes:
                    child.start()
                    running.callback(child.stop)
                try:
                    wait_until_said(STARTED if peer == "by-hand" else RUNNING, processes[:-1])
                    wait_until_ready(f"{url}/ready", processes)
                    order_once(url)
                    run.load()
                    run.settle()
                except (ChildFailed, TimeoutError) as error:
                    raise Failed(f"at {rate} orders a second: {error}") from error
                peak = meter.peak_rss_mib(one for child in processes for one in meter.tree(child.pid))
            curves = run.curves()[1]
            completed_per_s = steady_per_s(curves["API latency, ms"]["p50"], curves["Orders per second"]["completed"])
            return Trial(rate, run.figures(), completed_per_s, run.cpu_us(), peak)


def order_once(url: str) -> None:
    """Place an order and see it finished: then all services are there. Raises TimeoutError."""
    body = {"customer_id": str(UUID(int=1)), "lines": [{"sku": database.sku(2), "quantity": 1, "unit_cents": 100}]}
    request = urllib.request.Request(f"{url}/orders", msgspec.json.encode(body), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=READY_S) as response:
        order_id = msgspec.json.decode(response.read())["order_id"]
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/orders/{order_id}", timeout=READY_S) as response:
            if msgspec.json.decode(response.read())["status"] != "pending":
                return
        time.sleep(0.1)
    raise TimeoutError(f"the first order was not finished within {READY_S:g} s")


def steady_per_s(latencies: Sequence[float | None], completed: Sequence[float | None]) -> float:
    """What was completed a second, without the first WARM_S and the last second in which there were requests, and without what
    came before and after them. By second, both: `latencies` is None where nothing was asked."""
    busy = [second for second, latency in enumerate(latencies) if latency is not None]
    counted = completed[busy[0] + WARM_S : busy[-1]] if busy else ()
    return sum(orders or 0 for orders in counted) / len(counted) if counted else 0.0


def by_hand(servers: Servers, port: int) -> list[Child]:
    """The services of bench/by_hand_shop, and the tables that they need besides."""
    with psycopg.connect(servers.database_url, autocommit=True) as connection:
        connection.execute((BY_HAND / "schema.sql").read_bytes())
    environment = surroundings(port) | {
        "SHOP_BROKER_URL": servers.broker_url,
        "SHOP_DATABASE_URL": servers.database_url,
        "SHOP_REDIS_URL": servers.redis_url or "",
        "SHOP_REDIS_PREFIX": servers.redis_prefix,
    }
    found = [Child(name, ["-m", f"bench.by_hand_shop.{name}"], environment, FOLDER) for name in SERVICES if name != "orders_api"]
    granian = ["--interface", "rsgi", "--http", "1", "--no-ws", "--loop", "uvloop", "--backlog", "2048", "--host", "127.0.0.1"]
    arguments = ["-m", "granian", *granian, "--port", str(port), "bench.by_hand_shop.orders_api:app"]
    return [*found, Child("orders_api", arguments, environment, FOLDER)]


@contextmanager
def _servers(variant: str) -> Iterator[Servers]:
    """Emptied ones for each trial: a backlog that one left behind would be the next one's."""
    if variant == "embedded":
        with embedded(FOLDER.with_name("bench-postgres")) as servers:
            yield servers
    else:
        with ground(frozenset({"RabbitMQ", "PostgreSQL", "Redis"})) as place:
            yield Servers(place.broker_url, place.database_url, place.redis_url, variant, place.redis_prefix)


WORKLOAD = Workload(
    name="pipeline",
    what="the whole demo at the highest rate that keeps its targets: API p99 200 ms, end to end p99 2 s, 98 % of the orders asked for",
    unit="order",
    peers=("orderbus", "by-hand"),
    variants=(Variant("servers", 0), Variant("embedded", 0, peers=("orderbus",))),
    servers=frozenset(),
    rounds=1,
    measure=measure,
)
