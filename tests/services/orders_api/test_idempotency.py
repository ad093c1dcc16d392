"""One order per Idempotency-Key: with Redis, with claims kept in the process, and with Redis away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.orders_api import bus
from services.orders_api.idempotency import forget_old
from tests.services.orders_api.served import ORDER, Served, holding, served

pytestmark = pytest.mark.anyio

KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
OTHER = {**ORDER, "lines": [{"sku": "article-00002", "quantity": 1, "unit_cents": 1}]}
COUNTS = "select (select count(*) from orders), (select count(*) from idempotency_key), (select count(*) from orderbus.outbox)"


@pytest.fixture(params=["in the process", "redis", "no_redis"])
def claims(request: pytest.FixtureRequest, environment: pytest.MonkeyPatch) -> str:
    """Where claims are kept."""
    if request.param != "in the process":
        request.getfixturevalue(request.param)
    return str(request.param)


@pytest.fixture
async def claimed_api(claims: str, shop_database_url: str) -> AsyncIterator[Served]:
    async with bus, served(shop_database_url) as api:
        yield api


async def test_a_repeated_request_gets_the_first_answer(claimed_api: Served) -> None:
    first = await claimed_api.place(key=KEY)

    again = [await claimed_api.place(key=KEY) for _ in range(3)]

    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    assert {response.status_code for response in again} == {201}
    assert {response.content for response in again} == {first.content}
    assert {response.headers["location"] for response in again} == {first.headers["location"]}
    assert {response.headers["idempotency-replayed"] for response in again} == {"true"}
    assert await claimed_api.rows(COUNTS) == [(1, 1, 1)]


async def test_the_same_key_with_another_body_is_refused(claimed_api: Served) -> None:
    await claimed_api.place(key=KEY)

    response = await claimed_api.place(OTHER, key=KEY)

    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert (await claimed_api.place(key=KEY)).status_code == 201
    assert await claimed_api.rows(COUNTS) == [(1, 1, 1)]


async def test_while_the_first_request_is_under_way_the_second_is_told_so(claimed_api: Served, shop_database_url: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        async with holding(shop_database_url, "orders"):
            first = tasks.create_task(claimed_api.place(key=KEY))
            await claimed_api.until_blocked(1)
            second = await claimed_api.place(key=KEY)
            third = await claimed_api.place(OTHER, key=KEY)

    assert (second.status_code, second.headers["retry-after"]) == (409, "1")
    assert third.status_code == 422
    assert first.result().status_code == 201
    assert await claimed_api.rows(COUNTS) == [(1, 1, 1)]


async def test_another_process_is_told_so_too(redis: str, shop_database_url: str) -> None:
    async with bus, served(shop_database_url) as api, served(shop_database_url) as other:
        async with asyncio.TaskGroup() as tasks:
            async with holding(shop_database_url, "orders"):
                first = tasks.create_task(api.place(key=KEY))
                await api.until_blocked(1)
                second = await other.place(key=KEY)
        third = await other.place(key=KEY)

        assert (first.result().status_code, second.status_code, third.status_code) == (201, 409, 201)
        assert third.content == first.result().content
        assert await api.rows(COUNTS) == [(1, 1, 1)]


async def test_without_redis_the_second_process_waits_for_the_row(no_redis: None, shop_database_url: str) -> None:
    async with bus, served(shop_database_url) as api, served(shop_database_url) as other:
        async with asyncio.TaskGroup() as tasks:
            async with holding(shop_database_url, "orders"):
                first = tasks.create_task(api.place(key=KEY))
                await api.until_blocked(1)
                second = tasks.create_task(other.place(key=KEY))
                await api.until_blocked(2)

        assert (first.result().status_code, second.result().status_code) == (201, 201)
        assert first.result().content == second.result().content
        assert await api.rows(COUNTS) == [(1, 1, 1)]


async def test_a_repetition_among_others_costs_them_nothing(no_redis: None, api: Served, shop_database_url: str) -> None:
    await api.place(key=KEY)
    async with asyncio.TaskGroup() as tasks:
        async with holding(shop_database_url, "orders"):
            tasks.create_task(api.place())
            await api.until_blocked(1)
            others = [tasks.create_task(api.place()) for _ in range(5)]
            again = tasks.create_task(api.place(key=KEY))

    assert {task.result().status_code for task in (*others, again)} == {201}
    assert await api.rows(COUNTS) == [(7, 1, 7)]


async def test_a_key_whose_order_failed_may_be_used_again_at_once(claimed_api: Served, shop_database_url: str) -> None:
    async with asyncio.TaskGroup() as tasks:
        async with holding(shop_database_url, "orders"):
            failed = tasks.create_task(claimed_api.place(key=KEY))
            await claimed_api.until_blocked(1)
            await claimed_api.change(_END_THE_BLOCKED)
            await failed

    again = await claimed_api.place(key=KEY)

    assert (failed.result().status_code, failed.result().headers["retry-after"]) == (503, "1")
    assert again.status_code == 201
    assert await claimed_api.rows(COUNTS) == [(1, 1, 1)]


async def test_what_redis_forgot_the_row_still_knows(redis: str, redis_url: str, api: Served) -> None:
    first = await api.place(key=KEY)
    async with Redis.from_url(redis_url) as client:
        keys = [key async for key in client.scan_iter(f"{redis}*")]
        await client.delete(*keys)

    again, other = await api.place(key=KEY), await api.place(OTHER, key=KEY)

    assert len(keys) == 1
    assert (again.status_code, again.content) == (201, first.content)
    assert other.status_code == 422
    assert await api.rows(COUNTS) == [(1, 1, 1)]


async def test_keys_are_forgotten_after_a_day(api: Served) -> None:
    for key in ("old", "young"):
        await api.place(key=key)
    await api.change("update idempotency_key set created_at = now() - interval '25 hours' where key = 'old'")

    async with bus.transaction() as tx:
        await forget_old(tx)

    assert await api.rows("select key from idempotency_key") == [("young",)]
    assert await api.rows("select count(*) from orders") == [(2,)]


@pytest.mark.parametrize(
    "key", [b'"', b'"open', b'""', b"two words", b'"%s"' % (b"x" * 201), b'"a", "b"', b'"caf\xe9"', b'"a";b=1']
)
async def test_a_malformed_key_is_refused(api: Served, key: bytes) -> None:
    response = await api.client.post("/orders", json=ORDER, headers=[(b"Idempotency-Key", key)])

    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")
    assert await api.rows(COUNTS) == [(0, 0, 0)]


async def test_two_keys_for_one_request_are_refused(api: Served) -> None:
    response = await api.client.post("/orders", json=ORDER, headers=[("Idempotency-Key", '"a"'), ("Idempotency-Key", '"b"')])

    assert response.status_code == 400


async def test_a_bare_key_is_the_same_as_a_quoted_one(api: Served) -> None:
    first, again = await api.place(key="order-1"), await api.place(key='"order-1"')

    assert first.content == again.content


_END_THE_BLOCKED = (
    "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
)
