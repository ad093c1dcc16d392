"""One run of the demo: the load, the kill, the wait for the last order, and the figures."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.demo import curves, queues
from services.demo.audit import OUTBOXES, Audit, audit, end_to_end_ms, unsettled
from services.demo.curves import Curves
from services.demo.figures import Figures
from services.demo.processes import Child, CpuMeter
from services.demo.servers import Servers
from services.demo.watch import Watcher

SETTLE_S = 90.0
RESTART_AFTER_S = 1.0
MOST_USERS = 400


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    mode: str
    rate: float
    seconds: int
    kill: str
    seed: int
    url: str
    database_url: str
    folder: Path
    outboxes: tuple[str, ...] = OUTBOXES
    locustfile: Path = Path(__file__).with_name("load.py")
    shape: dict[str, str] = {}
    """What a locustfile with a shape of its own reads: then that says how many users there are, and when the load ends."""
    report: Path | None = None
    """Where locust writes its HTML."""
    away_s: float = RESTART_AFTER_S
    """How long the killed service stays away."""
    queues: tuple[str, ...] = ()
    """Whose depth is looked at once a second."""


class Load(msgspec.Struct):
    """What the load's process hands over (see load.py)."""

    accepted: list[str]
    requests: int
    failures: dict[str, int]
    mismatched: list[str]
    times_ms: dict[str, list[float]]
    answers: dict[str, dict[str, int]] = {}


class Run:
    """Holds what is needed between the load and the figures."""

    def __init__(self, plan: Plan, children: Sequence[Child], servers: Servers, console: Console) -> None:
        self._plan = plan
        self._children = children
        self._servers = servers
        self._console = console
        self._connection: psycopg.Connection[Any] = psycopg.connect(plan.database_url, autocommit=True)
        self._since: datetime = self._connection.execute("select clock_timestamp()").fetchone()[0]  # type: ignore[index]  # it has a row
        """Orders from then on are this run's."""
        self._load: Load | None = None
        self._audit: Audit | None = None
        self._cpu_s: dict[str, float] = {}
        self._parked: int | None = None
        self._killed: set[str] = set()
        self._watcher = Watcher(self._connection)
        self._depths: queues.Depths = {}

    def load(self) -> None:
        """Send the orders, show how it goes, kill the chosen service at 40 % of the time and restart it a second later."""
        plan = self._plan
        output = plan.folder / "load.json"
        users = int(min(max(plan.rate / 10, 1), MOST_USERS))
        environment = {
            "DEMO_RATE": str(plan.rate),
            "DEMO_USERS": str(users),
            "DEMO_SEED": str(plan.seed),
            "DEMO_LOAD_OUTPUT": str(output),
            **plan.shape,
        }
        arguments = [
            "-m",
            "locust",
            "-f",
            str(plan.locustfile),
            "--headless",
            "--only-summary",
            "--host",
            plan.url,
        ]
        if not plan.shape:
            arguments += ["--users", str(users), "--spawn-rate", str(users), "--run-time", f"{plan.seconds}s"]
        if plan.report is not None:
            arguments += ["--html", str(plan.report)]
        arguments += ["--stop-timeout", "10"]
        arguments += ["--exit-code-on-error", "0", "--loglevel", "WARNING"]
        locust = Child("load", arguments, environment, plan.folder)
        meter = CpuMeter(self._children)
        with queues.watching(self._servers.broker_url, plan.queues) as watch:
            locust.start()
            meter.add(locust)
            self._watch(locust, meter, watch)
        self._depths = watch.depths if watch is not None else {}
        if not output.exists():
            locust.check()
        self._load = msgspec.json.decode(output.read_bytes(), type=Load)
        self._meter = meter

    def _watch(self, locust: Child, meter: CpuMeter, watch: queues.QueueWatch | None) -> None:
        plan = self._plan
        began = time.monotonic()
        kill_at, restart_at = (began + 0.4 * plan.seconds, 0.0) if plan.kill else (0.0, 0.0)
        victim = next((child for child in self._children if child.name == plan.kill), None)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            bar = progress.add_task("load", total=plan.seconds)
            while locust.running:
                now = time.monotonic()
                if victim is not None and kill_at and now >= kill_at:
                    victim.kill()
                    self._killed.add(victim.name)
                    self._console.print(f"[bold red]SIGKILL[/] {victim.name} at {now - began:.1f} s")
                    kill_at, restart_at = 0.0, now + plan.away_s
                if victim is not None and restart_at and now >= restart_at:
                    victim.start()
                    meter.add(victim)
                    self._console.print(f"[green]restarted[/] {victim.name} at {now - began:.1f} s")
                    restart_at = 0.0
                for child in self._children:
                    if child is not victim or (not restart_at):
                        child.check()
                meter.look()
                seen = self._watcher.look()
                if watch is not None:
                    watch.look()
                text = f"{seen.placed} placed, {seen.finished} finished"
                progress.update(bar, completed=min(now - began, plan.seconds), description=text)
                time.sleep(0.5)
        if victim is not None and restart_at:
            victim.start()
            meter.add(victim)

    def settle(self) -> None:
        """Wait until every order is finished and every compensation done, or the time is up; then count."""
        assert self._load is not None
        deadline = time.monotonic() + SETTLE_S
        while (left := unsettled(self._connection, self._plan.outboxes)) and time.monotonic() < deadline:
            for child in self._children:
                child.check()
            self._console.print(f"waiting for {left} to settle …")
            self._watcher.look()
            time.sleep(0.25)
        self._meter.look()
        self._cpu_s = self._meter.seconds()
        self._audit = audit(self._connection, self._load.accepted, self._since)
        self._parked = self._servers.parked()

    def close(self) -> None:
        self._connection.close()

    def example(self) -> str:
        """An order's own story, as the API tells it."""
        row = self._connection.execute(
            "select order_id from orders where finished_at is not null order by (status = 'confirmed') desc, placed_at desc limit 1"
        ).fetchone()
        if row is None:
            return "no order was finished"
        with urllib.request.urlopen(f"{self._plan.url}/orders/{row[0]}", timeout=5) as response:
            answer: bytes = response.read()
        return msgspec.json.format(answer, indent=2).decode()

    def figures(self) -> Figures:
        """After the services have stopped: their receipts are read too."""
        load, counted = self._load, self._audit
        assert load is not None
        assert counted is not None
        seconds = self._busy_seconds()
        times = [value for second in load.times_ms.values() for value in second]
        p50, p99 = end_to_end_ms(self._connection, self._since)
        retries, parked = self._from_receipts()
        parked = parked if self._parked is None else self._parked
        return Figures(
            mode=self._plan.mode + (f", {', '.join(sorted(self._killed))} killed" if self._killed else ""),
            seconds=round(seconds, 1),
            orders_accepted=len(load.accepted),
            orders_completed=counted.completed,
            accepted_per_s=round(len(load.accepted) / seconds, 1),
            completed_per_s=round(counted.completed / self._until_last_finished(), 1),
            api_p50_ms=round(curves.percentile(times, 0.5), 2),
            api_p99_ms=round(curves.percentile(times, 0.99), 2),
            e2e_p50_ms=round(p50, 1),
            e2e_p99_ms=round(p99, 1),
            error_ratio=sum(load.failures.values()) / max(load.requests, 1),
            dlq_ratio=parked / max(counted.orders, 1),
            retries=retries,
            lost=counted.lost,
            doubled=counted.doubled + len(load.mismatched),
            ghosts=counted.ghosts,
            oversold=counted.oversold,
            money_off=counted.money_off,
            cpu_us_per_order=round(sum(self._cpu_s.values()) / max(counted.orders, 1) * 1e6, 1),
        )

    def cpu_us(self) -> dict[str, float]:
        """Where the CPU went, in microseconds an order: by process, the busiest first."""
        orders = max(self._audit.orders, 1) if self._audit else 1
        return {name: seconds / orders * 1e6 for name, seconds in self._cpu_s.items()}

    def curves(self) -> tuple[list[int], dict[str, Curves]]:
        """By second: throughput, API latency, end-to-end latency."""
        rows = curves.speed_rows(self._connection)
        times = self._times_ms()
        seconds = curves.axis((int(row[0]) for row in rows), times)
        return seconds, curves.speed(seconds, rows, times)

    def charts(self) -> tuple[list[int], dict[str, Curves]]:
        """Everything for the page. After the services have stopped: what they wrote is read, and much is asked of the database."""
        assert self._load is not None
        seconds, found = self.curves()
        found |= curves.business(seconds, curves.finished_rows(self._connection))
        found |= curves.consumers(seconds, curves.handled_rows(self._connection))
        found |= curves.answers(seconds, {int(second): answers for second, answers in self._load.answers.items()})
        found |= curves.watched(seconds, self._watcher.samples, self._queue_depths())
        found |= curves.logged(seconds, {child.name: child.lines() for child in self._children})
        return seconds, found

    def _times_ms(self) -> dict[int, list[float]]:
        assert self._load is not None
        return {int(second): values for second, values in self._load.times_ms.items()}

    def _queue_depths(self) -> queues.Depths:
        return self._depths or queues.told(line for child in self._children for line in child.told("queues"))

    def _busy_seconds(self) -> float:
        return self._span("max(placed_at)")

    def _until_last_finished(self) -> float:
        return self._span("max(finished_at)")

    def _span(self, end: str) -> float:
        query = f"select extract(epoch from {end} - min(placed_at)) from orders where placed_at >= %s"  # noqa: S608 - of constants alone
        row = self._connection.execute(query, (self._since,)).fetchone()
        return max(float(row[0] or 0) if row else 0.0, 0.001)

    def _from_receipts(self) -> tuple[int, int]:
        retries = parked = 0
        for child in self._children:
            for receipt in child.receipts():
                stats = receipt.get("stats")
                if isinstance(stats, dict):
                    retries += int(stats["retried"])
                    parked += int(stats["parked"])
        return retries, parked
