"""Readiness, and a stop that drops no request and is held up by no client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import anyio
import httpx
import psycopg
import pytest

from orderbus import UsageError
from services.orders_api import bus
from services.orders_api.http import Limits
from services.orders_api.serve import serve
from tests.servers import free_port
from tests.services.orders_api.served import LIMIT_S, ORDER, Served, holding, served
from tests.services.shop import until

pytestmark = pytest.mark.anyio


async def test_readiness_says_no_while_the_api_still_serves(environment: pytest.MonkeyPatch, shop_database_url: str) -> None:
    async with bus, served(shop_database_url, Limits(notice_seconds=3.0)) as api:
        before = await api.client.get("/ready")
        api.stop.set()
        await anyio.wait_all_tasks_blocked()
        during, health, order = await api.client.get("/ready"), await api.client.get("/health"), await api.place()

        assert (before.status_code, before.json()) == (200, {"status": "ready"})
        assert (during.status_code, during.json()) == (503, {"status": "draining"})
        assert (health.status_code, order.status_code) == (200, 201)


async def test_a_request_in_flight_is_finished_and_no_new_one_begun(
    environment: pytest.MonkeyPatch, shop_database_url: str
) -> None:
    async with bus, served(shop_database_url, Limits(notice_seconds=0.0, stop_seconds=LIMIT_S)) as api:
        async with asyncio.TaskGroup() as tasks:
            async with holding(shop_database_url, "orders"):
                order = tasks.create_task(api.place())
                await api.until_blocked(1)
                api.stop.set()
                await until(lambda: _refused(api))

        assert order.result().status_code == 201
        await api.stopped.wait()


async def test_what_takes_too_long_is_cut_off_with_an_answer(environment: pytest.MonkeyPatch, shop_database_url: str) -> None:
    async with bus, served(shop_database_url, Limits(notice_seconds=0.0, stop_seconds=0.05)) as api:
        async with asyncio.TaskGroup() as tasks:
            async with holding(shop_database_url, "orders"):
                order = tasks.create_task(api.place())
                await api.until_blocked(1)
                api.stop.set()
                await api.stopped.wait()

        assert (order.result().status_code, order.result().headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(
    "half",
    [b"GET /health HTTP/1.1\r\nHo", b"POST /orders HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"],
    ids=["half a head", "half a body"],
)
async def test_a_client_that_says_half_holds_up_no_stop(
    environment: pytest.MonkeyPatch, shop_database_url: str, half: bytes
) -> None:
    patient = Limits(notice_seconds=0.0, stop_seconds=0.05, head_seconds=600.0, body_seconds=600.0)
    async with bus, served(shop_database_url, patient) as api:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(half)
        await api.client.get("/health")
        api.stop.set()

        with anyio.fail_after(LIMIT_S):
            await api.stopped.wait()
        writer.close()


async def test_while_the_database_is_away_the_api_says_so_and_takes_orders_again_after(
    api: Served, postgres_url: str, shop_database_url: str
) -> None:
    name = shop_database_url.rpartition("/")[2]
    async with await psycopg.AsyncConnection.connect(postgres_url, autocommit=True) as server:
        await server.execute(f"alter database {name} allow_connections false")
        await server.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        ready, order, health = await api.client.get("/ready"), await api.place(), await api.client.get("/health")
        await server.execute(f"alter database {name} allow_connections true")

    assert (ready.status_code, ready.json()) == (503, {"status": "no database"})
    assert (order.status_code, order.headers["retry-after"]) == (503, "1")
    assert order.headers["content-type"] == "application/problem+json"
    assert health.status_code == 200
    assert (await api.client.get("/ready")).status_code == 200
    assert (await api.place()).status_code == 201


async def test_a_port_that_is_taken_is_an_error_that_says_what_to_set(api: Served) -> None:
    with pytest.raises(UsageError, match="ORDERS_API_PORT"):
        await serve(bus, "127.0.0.1", api.port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_process_ends_at_a_signal_and_prints_its_receipt(
    environment: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.orders_api"),
        env={**os.environ, "ORDERS_API_PORT": str(port)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        await until(lambda: _answers(client))
        placed = await client.post("/orders", json=ORDER)
        process.send_signal(number)
        async with asyncio.timeout(LIMIT_S):
            stdout, stderr = await process.communicate()

    assert (placed.status_code, process.returncode) == (201, 0), stderr.decode()
    *logged, receipt = [json.loads(line) for line in stdout.splitlines()]
    assert (receipt["event"], receipt["group"], receipt["clean"]) == ("drained", "orders-api", True)
    assert receipt["stats"]["emitted"] == 1
    assert stderr == b""
    assert {line["service.name"] for line in logged} == {"orders-api"}
    assert all(line["message"] for line in logged)


async def _refused(api: Served) -> tuple[bool, object]:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    except ConnectionRefusedError:
        return True, "refused"
    writer.close()
    return False, "accepted"


async def _answers(client: httpx.AsyncClient) -> tuple[bool, Any]:
    try:
        return (await client.get("/ready")).status_code == 200, "an answer"
    except httpx.TransportError as error:
        return False, error
