"""The load against services that run already, on servers that ORDERBUS_BROKER_URL and ORDERBUS_DATABASE_URL name."""

from __future__ import annotations

import base64
import json
import os
import urllib.request
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from rich.console import Console

from services.demo.__main__ import BUILD
from services.demo.figures import Figures
from services.demo.run import Plan, Run
from services.demo.servers import Servers

MANAGEMENT_PORT = 15672
LIMIT_S = 10.0


def measure_running(
    url: str, console: Console, *, rate: float, seconds: int, seed: int, locustfile: Path, shape: dict[str, str], report: Path
) -> Figures:
    """One run against the API at `url`. What was ordered or parked before is not counted. CPU is not measured: it is used elsewhere."""
    try:
        servers = RunningServers(
            broker_url=os.environ["ORDERBUS_BROKER_URL"],
            database_url=os.environ["ORDERBUS_DATABASE_URL"],
            redis_url=None,
            mode="running",
            parked_before=dead_letters(os.environ["ORDERBUS_BROKER_URL"]),
        )
    except KeyError as missing:
        raise SystemExit(f"load: --url needs {missing.args[0]}, the server of the services that run") from None
    folder = BUILD / "load-logs"
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        mode=servers.mode,
        rate=rate,
        seconds=seconds,
        kill="",
        seed=seed,
        url=url,
        database_url=servers.database_url,
        folder=folder,
        locustfile=locustfile,
        shape=shape,
        report=report,
    )
    run = Run(plan, (), servers, console)
    run.load()
    run.settle()
    figures = run.figures()
    run.close()
    for name, value in (
        ("orders", f"{figures.orders_accepted} accepted, {figures.accepted_per_s:.0f}/s; {figures.orders_completed} completed"),
        ("API", f"p50 {figures.api_p50_ms:.1f} ms, p99 {figures.api_p99_ms:.1f} ms; errors {figures.error_ratio:.3%}"),
        ("end to end", f"p50 {figures.e2e_p50_ms:.0f} ms, p99 {figures.e2e_p99_ms:.0f} ms; dead letters {figures.dlq_ratio:.3%}"),
    ):
        print(f"{name}: {value}")
    return figures


class RunningServers(Servers, frozen=True, kw_only=True):
    """Servers that others use, too: only what is parked from now on counts."""

    parked_before: int

    def parked(self) -> int:
        return max(dead_letters(self.broker_url) - self.parked_before, 0)


def dead_letters(broker_url: str) -> int:
    """Messages in dead letter queues, as the broker's management plugin counts them (every 5 s), on the first node that answers."""
    parts = urlsplit(broker_url)
    vhost = quote(unquote(parts.path[1:]) or "/", safe="")
    user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    authorization = f"Basic {base64.b64encode(user.encode()).decode()}"
    failures = []
    for node in parts.netloc.rpartition("@")[2].split(","):
        host = node.partition(":")[0]
        request = urllib.request.Request(
            f"http://{host}:{MANAGEMENT_PORT}/api/queues/{vhost}?columns=name,messages", headers={"authorization": authorization}
        )
        try:
            with urllib.request.urlopen(request, timeout=LIMIT_S) as response:  # noqa: S310 - the scheme is ours
                queues = json.load(response)
        except OSError as failure:
            failures.append(f"{host}: {failure}")
        else:
            return sum(int(queue.get("messages", 0)) for queue in queues if queue["name"].endswith(".dlq"))
    raise SystemExit(f"load: the broker's management plugin does not say what is parked: {'; '.join(failures)}")
