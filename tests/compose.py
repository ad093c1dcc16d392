"""`make compose-test`: the compose stack's profiles core, observe, load and cluster, really run on a local Docker engine.

The images of the servers are stand-ins out of Debian's packages (compose/standins/), those of the services and of the load are built by
compose/Dockerfile from wheels. Orders go through; payment is killed and comes back; what waited is finished; Prometheus has seen all
of them; the load has its verdict; two nodes join the broker, the first is killed, and orders go on; all is taken down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tests.programs import ROOT
from tests.servers import free_port

BUILD = ROOT / "build" / "compose"
COMPOSE = ROOT / "compose"
SUITE, PYTHON = "trixie", "3.13"
SERVERS = ("python", "postgres", "rabbitmq", "redis", "prometheus")
PROFILES = ("core", "observe", "load", "cluster")
NODES = ("rabbitmq", "rabbitmq-2", "rabbitmq-3")
ORDERS = 200
LOAD = {"LOAD_PROFILE": "ramp", "LOAD_RATE": "30", "LOAD_SECONDS": "15"}
LIMIT_S = 120.0


class Failed(RuntimeError):
    """The text is all that there is to say."""


def main() -> int:
    if missing := _missing():
        print(f"SKIPPED: {missing}")
        return 1 if os.environ.get("CI") else 0
    began = time.monotonic()
    try:
        environment = _settings()
        _build(environment)
        _say(f"images are there, {time.monotonic() - began:.0f} s")
        with _stack(environment):
            _try_out(environment)
            _try_out_load(environment)
            _try_out_cluster(environment)
    except Failed as error:
        print(f"FAILED: {error}")
        return 1
    print(f"passed, {time.monotonic() - began:.0f} s")
    return 0


def _missing() -> str | None:
    """What this machine lacks."""
    if shutil.which("docker") is None:
        return "there is no docker; install it (Debian: apt-get install docker.io docker-compose)"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "no Docker engine answers; start dockerd, or set DOCKER_HOST"
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode and not shutil.which(
        "docker-compose"
    ):
        return "neither 'docker compose' nor docker-compose is installed (Debian: apt-get install docker-compose)"
    if shutil.which("debootstrap") is None or os.geteuid():
        return "the stand-in images need debootstrap, and root to run it"
    return None


def _settings() -> dict[str, str]:
    """compose/.env is the user's; this run has one of its own, in the environment, which goes before it."""
    images = {f"{name.upper()}_IMAGE": f"orderbus-standin-{name}:{SUITE}" for name in SERVERS}
    return {
        **os.environ,
        **images,
        "COMPOSE_PROJECT_NAME": f"orderbus-test-{os.getpid()}",
        **LOAD,
        "ORDERBUS_IMAGE": "orderbus-services:test",
        "LOAD_IMAGE": "orderbus-load:test",
        "POSTGRES_PASSWORD": "postgres-test",
        "RABBITMQ_PASSWORD": "rabbitmq-test",
        "RABBITMQ_COOKIE": "cookie-test",
        "RABBITMQ_HOSTS": ",".join(NODES),
        "REDIS_PASSWORD": "redis-test",
        "API_PORT": str(free_port()),
        "RABBITMQ_MANAGEMENT_PORT": str(free_port()),
        "PROMETHEUS_PORT": str(free_port()),
        "PIP_NO_INDEX": "1",
        "DOCKER_BUILDKIT": "0",
        "COMPOSE_DOCKER_CLI_BUILD": "0",
    }


def _build(environment: dict[str, str]) -> None:
    base = f"orderbus-standin-base:{SUITE}"
    if subprocess.run(["docker", "image", "inspect", base], capture_output=True, env=environment, check=False).returncode:
        root = BUILD / SUITE
        if not (root / "etc" / "debian_version").exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            _say(f"debootstrap {SUITE}")
            _run(["debootstrap", "--variant=minbase", SUITE, str(root)])
        _run(["sh", "-c", f"tar -C {root} -c . | docker import - {base}"], environment)
    for name in SERVERS:
        _say(f"stand-in for {name}")
        image = environment[f"{name.upper()}_IMAGE"]
        _run(["docker", "build", "-q", "-t", image, "--build-arg", f"BASE={base}", str(COMPOSE / "standins" / name)], environment)
    _say("wheels")
    wheels = COMPOSE / "wheels"
    packages = ["pip>=25.1", "setuptools>=77", ".[rabbitmq,postgres,redis,cli,uvloop,otel]"]
    _run(
        [
            *(sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "-d", str(wheels)),
            *("-c", "constraints.txt", "--only-binary=:all:", "--python-version", PYTHON),
            *packages,
            *("--group", "demo"),
        ]
    )
    _say("images of the services and of the load")
    _compose(environment, "build", "--quiet", "prepare", "load", profiles=PROFILES)


@contextmanager
def _stack(environment: dict[str, str]) -> Iterator[None]:
    began = time.monotonic()
    try:
        _compose(environment, "up", "-d", "--no-build")
        _run([str(COMPOSE / "scripts" / "wait.sh"), str(int(LIMIT_S))], environment)
        _say(f"up and healthy, {time.monotonic() - began:.0f} s")
        yield
    except Failed:
        for line in _compose(environment, "logs", "--no-color", "--tail", "15", profiles=PROFILES, is_checked=False).splitlines():
            print(line[:300])
        raise
    finally:
        _compose(environment, "down", "--volumes", "--remove-orphans", "--timeout", "30", profiles=PROFILES, is_checked=False)
        for wheel in (COMPOSE / "wheels").glob("*.whl"):
            wheel.unlink()
        _say("taken down")


def _try_out(environment: dict[str, str]) -> None:
    _say(_run([str(COMPOSE / "scripts" / "smoke.sh")], environment).strip())
    took = _orders(environment, ORDERS)
    _until_finished(environment, ORDERS + 1)
    _say(f"{ORDERS} orders accepted in {took:.1f} s, and all finished")

    payment = _compose(environment, "ps", "-q", "payment").strip()
    _run(["docker", "kill", payment], environment)
    _run(["docker", "update", "--restart=no", payment], environment)
    _orders(environment, ORDERS)
    waiting = ORDERS - (_finished(environment) - ORDERS - 1)
    if not waiting:
        raise Failed("payment was killed, and no order waits for it")
    _say(f"payment is killed; {ORDERS} more orders accepted, {waiting} wait")
    began = time.monotonic()
    _run(["docker", "start", payment], environment)
    _until_finished(environment, 2 * ORDERS + 1)
    _say(f"payment is started; all orders finished {time.monotonic() - began:.1f} s later")
    _until_scraped(environment, nodes=1, orders=2 * ORDERS + 1)
    _check_what_it_may(environment, payment)


def _try_out_load(environment: dict[str, str]) -> None:
    """Whether the thresholds are kept is the machine's affair; that nothing is lost, and that there is a report, is the stack's."""
    report = ROOT / "build" / f"load-{LOAD['LOAD_PROFILE']}.html"
    report.unlink(missing_ok=True)
    said = _run([str(COMPOSE / "scripts" / "load.sh")], environment, is_checked=False)
    verdict = said[said.find(f"\n{LOAD['LOAD_PROFILE']}: ") :]
    if "thresholds kept" not in verdict and "FAILED" not in verdict:
        raise Failed(f"the load has no verdict: {said[-2000:]}")
    if any(word in verdict for word in ("lost:", "doubled:", "ghosts:", "oversold:", "money_off:", "did not finish", "errors:")):
        raise Failed(verdict)
    if "<html" not in report.read_text().lower():
        raise Failed(f"there is no report in {report}")
    _say(said.strip())


def _try_out_cluster(environment: dict[str, str]) -> None:
    """Two nodes join one that has worked alone, get a member of each queue, and go on without it."""
    began = time.monotonic()
    _compose(environment, "up", "-d", "--no-build", *NODES[1:], profiles=PROFILES)
    _run([str(COMPOSE / "scripts" / "wait.sh"), str(int(LIMIT_S)), *NODES[1:]], environment)
    queues = _until_members(environment, len(NODES))
    _say(f"two nodes have joined, and all {queues} queues have a member on each of the three, {time.monotonic() - began:.0f} s")

    first = _compose(environment, "ps", "-q", NODES[0]).strip()
    finished = _finished(environment)
    _run(["docker", "update", "--restart=no", first], environment)
    began = time.monotonic()
    _run(["docker", "kill", first], environment)
    _orders(environment, ORDERS)
    _until_finished(environment, finished + ORDERS)
    _say(f"the first node is killed; {ORDERS} more orders accepted and finished, {time.monotonic() - began:.1f} s later")
    _run(["docker", "start", first], environment)
    _until_members(environment, len(NODES))
    _until_scraped(environment, nodes=len(NODES), orders=None)
    _say("it is started, and a member of all queues again")


def _until_members(environment: dict[str, str], count: int) -> int:
    """Until each queue has so many members, and all are there; how many queues there are."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        listing = ("rabbitmqctl", "-q", "list_queues", "--no-table-headers", "name", "members", "online")
        rows = [
            line.split("\t") for line in _compose(environment, "exec", "-T", NODES[1], *listing, profiles=PROFILES).splitlines()
        ]
        if rows and all([cell.count("@") for cell in row[1:]] == [count, count] for row in rows):
            return len(rows)
        if time.monotonic() > deadline:
            raise Failed(f"queues without {count} members: {rows}")
        time.sleep(1)


def _until_scraped(environment: dict[str, str], *, nodes: int, orders: int | None) -> None:
    """Prometheus finds the six services and the broker's nodes by itself, and has counted the orders, unless `orders` is None."""
    wanted = {"orderbus": 6, "rabbitmq": nodes, "rabbitmq-queues": nodes}
    deadline = time.monotonic() + LIMIT_S
    while True:
        up = {one["metric"]["job"]: int(one["value"][1]) for one in _asked(environment, "sum by (job) (up)")}
        finished = sum(int(one["value"][1]) for one in _asked(environment, "orders_finished_total"))
        if up == wanted and orders in (None, finished):
            _say(f"Prometheus scrapes {sum(up.values())} targets, and has counted {finished} finished orders")
            return
        if time.monotonic() > deadline:
            raise Failed(f"Prometheus scrapes {up} instead of {wanted}, and has counted {finished} instead of {orders}")
        time.sleep(1)


def _asked(environment: dict[str, str], query: str) -> list[Any]:
    url = f"http://127.0.0.1:{environment['PROMETHEUS_PORT']}/api/v1/query"
    try:
        found: list[Any] = httpx.get(url, params={"query": query}).json()["data"]["result"]
    except httpx.TransportError:  # it is still starting
        return []
    return found


def _check_what_it_may(environment: dict[str, str], container: str) -> None:
    """Not root, and nothing to write to."""
    uid = _run(["docker", "exec", container, "id", "-u"], environment).strip()
    write = subprocess.run(["docker", "exec", container, "touch", "/srv/x"], capture_output=True, env=environment, check=False)
    if uid == "0" or not write.returncode:
        raise Failed(f"payment runs as {uid}, and can write to its image: {not write.returncode}")
    _say(f"services run as user {uid} on a read-only image")


def _orders(environment: dict[str, str], count: int) -> float:
    began = time.monotonic()
    with httpx.Client(base_url=f"http://127.0.0.1:{environment['API_PORT']}", timeout=30) as client:
        for number in range(count):
            order = {
                "customer_id": f"00000000-0000-0000-0000-{number:012x}",
                "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1000}],
            }
            answer = client.post("/orders", json=order)
            if answer.status_code != 201:
                raise Failed(f"an order got {answer.status_code}: {answer.text[:200]}")
    return time.monotonic() - began


def _finished(environment: dict[str, str]) -> int:
    query = "select count(finished_at) from orders"
    return int(_compose(environment, "exec", "-T", "postgres", "psql", "-At", "-U", "orderbus", "-d", "orders", "-c", query))


def _until_finished(environment: dict[str, str], count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while (finished := _finished(environment)) < count:
        if time.monotonic() > deadline:
            raise Failed(f"{finished} of {count} orders are finished after {LIMIT_S:g} s")
        time.sleep(0.2)


def _compose(
    environment: dict[str, str], *arguments: str, profiles: tuple[str, ...] = PROFILES[:2], is_checked: bool = True
) -> str:
    program = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    chosen = [argument for profile in profiles for argument in ("--profile", profile)]
    return _run([*program, "-f", str(COMPOSE / "docker-compose.yml"), *chosen, *arguments], environment, is_checked=is_checked)


def _run(command: list[str], environment: dict[str, str] | None = None, *, is_checked: bool = True) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if is_checked and done.returncode:
        raise Failed(f"{' '.join(command[:6])} … ended with {done.returncode}:\n{(done.stderr or done.stdout)[-3000:]}")
    return done.stdout


def _say(text: Any) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
