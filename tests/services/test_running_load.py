"""The load of `compose/`'s profile, against services that run already and have seen other orders."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from rich.console import Console

from services.demo.processes import Child, wait_until_ready
from tests.faults.world import ROOT
from tests.load import running
from tests.load.__main__ import broken
from tests.servers import free_port

ORDER = {
    "customer_id": "00000000-0000-0000-0000-000000000001",
    "lines": [{"sku": "article-00001", "quantity": 1, "unit_cents": 1_000}],
}
QUEUES = [{"name": "payment.orders.placed.dlq", "messages": 7}, {"name": "payment.orders.placed", "messages": 5}]
LIMIT_S = 60.0


@pytest.fixture
def api_url(shop_database_url: str, tmp_path: Path) -> Iterator[str]:
    """The six services in one process, on the broker inside it."""
    port = free_port()
    environment = {
        "ORDERS_API_PORT": str(port),
        "ORDERBUS_BROKER_URL": f"memory://{secrets.token_hex(4)}",
        "ORDERBUS_DATABASE_URL": shop_database_url,
    }
    child = Child("together", ["-m", "services.demo.together"], environment, tmp_path)
    child.start()
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/ready", [child])
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was asked of the broker's management plugin, which answers with QUEUES."""
    paths: list[str] = []

    class Management(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(f"{self.headers['authorization']} {self.path}")
            body = json.dumps(QUEUES).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Management) as server:
        monkeypatch.setattr(running, "MANAGEMENT_PORT", server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield paths
        server.shutdown()
        thread.join()


@pytest.mark.servers
def test_only_what_the_load_has_ordered_and_parked_is_counted(
    api_url: str, asked: list[str], shop_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORDERBUS_BROKER_URL", "amqp://guest:s%2Fcret@127.0.0.2:5672,127.0.0.1/")
    monkeypatch.setenv("ORDERBUS_DATABASE_URL", shop_database_url)
    monkeypatch.setattr(running, "BUILD", tmp_path)
    assert httpx.post(f"{api_url}/orders", json=ORDER, timeout=LIMIT_S).status_code == 201
    with psycopg.connect(shop_database_url) as connection:
        connection.execute("update orders set placed_at = placed_at - interval '1 hour'")

    figures = running.measure_running(
        api_url,
        Console(stderr=True),
        rate=30,
        seconds=2,
        seed=1,
        locustfile=ROOT / "tests" / "load" / "locustfile.py",
        shape={"LOAD_PROFILE": "steady", "LOAD_SECONDS": "2"},
        report=tmp_path / "load-steady.html",
    )

    with psycopg.connect(shop_database_url) as connection:
        row = connection.execute("select count(*) from orders").fetchone()
    assert row is not None
    assert 10 <= figures.orders_accepted <= figures.orders_completed == row[0] - 1
    assert figures.e2e_p99_ms < 1_800_000
    assert figures.dlq_ratio == 0
    assert [line for line in broken(figures) if "p99" not in line] == []  # how quick it is, is the machine's affair
    assert "<html" in (tmp_path / "load-steady.html").read_text().lower()
    assert asked == ["Basic Z3Vlc3Q6cy9jcmV0 /api/queues/%2F?columns=name,messages"] * 2


def test_without_its_servers_it_says_which_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORDERBUS_BROKER_URL", raising=False)
    with pytest.raises(SystemExit, match=r"does not say what is parked: .*refused"):
        running.dead_letters("amqp://guest:guest@127.0.0.2/")
    with pytest.raises(SystemExit, match="needs ORDERBUS_BROKER_URL"):
        running.measure_running(
            "http://127.0.0.1:9", Console(), rate=1, seconds=5, seed=1, locustfile=ROOT, shape={}, report=ROOT
        )
