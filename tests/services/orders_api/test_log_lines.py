"""What goes wrong with an order is found in the log by the order's id."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import pytest

from services.shared.logs import set_up_logs
from tests.services.orders_api.served import Served, holding

pytestmark = pytest.mark.anyio

ID = UUID(int=7)
END_THE_BLOCKED = """\
select pg_terminate_backend(pid, 10000) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock'"""


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in told if line["log.logger"] == "orders_api" and line["log.level"] != "info"]


async def test_requests_that_fail_are_told_of_each_with_its_order(
    api: Served, shop_database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs("orders-api")
    async with asyncio.TaskGroup() as tasks:
        async with holding(shop_database_url, "orders"):
            failed = [tasks.create_task(api.place()) for _ in range(5)]
            await api.until_blocked(1)
            await api.change(END_THE_BLOCKED)

    told = lines(capsys)
    assert {one.result().status_code for one in failed} <= {503, 201}
    assert len({line["order.id"] for line in told}) == len(told) == sum(one.result().status_code == 503 for one in failed) > 0
    assert {line["message"].partition(":")[0] for line in told} == {"POST /orders"}


async def test_a_failed_look_at_an_order_is_told_of_with_its_id_and_the_next_request_without(
    api: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs("orders-api")
    await api.change("alter table orders rename to hidden")
    try:
        await api.client.get(f"/orders/{ID}")
        await api.client.get(f"/orders?customer={ID}")
    finally:
        await api.change("alter table hidden rename to orders")

    one, many = lines(capsys)
    assert one["order.id"] == str(ID)
    assert "order.id" not in many
