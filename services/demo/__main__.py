"""`python -m services.demo`: what `make demo` and `make demo-servers` run.

Exit code 0 when nothing was lost, doubled, a ghost or inconsistent; 1 when something was; a missed speed target is printed as missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from services.demo import queues
from services.demo.figures import Figures, save, show
from services.demo.page import write_page
from services.demo.processes import ChildFailed, wait_until_ready, wait_until_said
from services.demo.run import Plan, Run
from services.demo.servers import Servers, embedded, make_scarce, real
from services.demo.shop import RUNNING, SERVICES, children, free_port, surroundings
from services.shared import database

BUILD = Path("build")


def main() -> None:
    """Run the demo as the command line says."""
    options = _options()
    console = Console(stderr=True)
    servers: AbstractContextManager[Servers] = real() if options.servers else embedded(BUILD / "demo-postgres")
    console.print(f"servers: {'RabbitMQ, PostgreSQL, Redis' if options.servers else 'in-process broker, embedded PostgreSQL'}")
    kill = _chosen(options.kill, options.seed, console)
    with servers as found:
        figures = measure(
            found, console, rate=options.rate, seconds=options.seconds, kill=kill, seed=options.seed, port=options.port
        )
    sys.exit(0 if figures.consistent else 1)


def measure(
    found: Servers,
    console: Console,
    *,
    rate: float,
    seconds: int,
    seed: int,
    kill: str = "",
    port: int = 0,
    **more: Any,
) -> Figures:
    """One run on these servers; leaves build/demo.json and build/demo.html. `more` are further fields of the Plan."""
    folder = BUILD / "demo-logs"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    asyncio.run(database.prepare(found.database_url))
    make_scarce(found.database_url)
    port = port or free_port()
    environment = found.environment() | surroundings(port) | {queues.TELL: "yes"}
    processes = children(found.mode == "servers", environment, folder)
    plan = Plan(
        mode=found.mode,
        rate=rate,
        seconds=seconds,
        kill=kill,
        seed=seed,
        url=f"http://127.0.0.1:{port}",
        database_url=found.database_url,
        folder=folder,
        queues=queues.consumed(SERVICES),
        **more,
    )
    run = Run(plan, processes, found, console)
    try:
        for child in processes:
            child.start()
        wait_until_said(RUNNING, processes[:-1])
        wait_until_ready(f"{plan.url}/ready", processes)
        run.load()
        run.settle()
        timeline = run.example()
    except (ChildFailed, TimeoutError) as error:
        console.print(f"[bold red]the demo failed:[/] {error}", highlight=False)
        raise SystemExit(1) from None
    finally:
        for child in reversed(processes):
            child.stop()
    figures = run.figures()
    show(Console(), figures, plan.rate)
    print("CPU by process, µs/order:", ", ".join(f"{name} {us:.0f}" for name, us in run.cpu_us().items()))
    print(f"\nOne order's timeline:\n{timeline}")
    save(figures, BUILD / "demo.json")
    write_page(BUILD / "demo.html", figures, plan.rate, *run.charts(), timeline)
    console.print(f"figures: {BUILD / 'demo.json'}   curves: {BUILD / 'demo.html'}   logs: {folder}/")
    return figures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.demo", description=__doc__)
    parser.add_argument("--servers", action="store_true", help="one process per service, on RabbitMQ, PostgreSQL and Redis")
    parser.add_argument("--rate", type=float, default=1500, help="orders a second asked for (default %(default)s)")
    parser.add_argument("--seconds", type=int, default=20, help="how long the load runs (default %(default)s)")
    parser.add_argument("--kill", default="", help=f"kill a service mid-load: random, or one of {', '.join(SERVICES)}")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the load and of the random kill")
    parser.add_argument("--port", type=int, default=0, help="the API's port (default: a free one)")
    options = parser.parse_args()
    if not 1 <= options.rate <= 50_000 or not 2 <= options.seconds <= 3_600:
        parser.error("--rate is from 1 to 50000 orders a second, --seconds from 2 to 3600")
    if options.kill and options.kill not in (*SERVICES, "random"):
        parser.error(f"--kill: there is no service {options.kill!r}; there are {', '.join(SERVICES)}, or random")
    if options.kill and not options.servers:
        parser.error("--kill needs a process per service: use `make demo-servers KILL=…`")
    return options


def _chosen(kill: str, seed: int, console: Console) -> str:
    if kill != "random":
        return kill
    chosen = random.Random(seed).choice(SERVICES)
    console.print(f"the service to be killed, by seed {seed}: [bold]{chosen}[/]")
    return chosen


if __name__ == "__main__":
    main()
