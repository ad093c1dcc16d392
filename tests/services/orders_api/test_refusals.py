"""What is wrong is refused by name, costs little, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from services.orders_api import bus
from services.orders_api.http import Limits
from tests.services.orders_api.served import CUSTOMER, LINE, ORDER, Served, served

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
MEGABYTE = 1_048_576


def _lines(**changed: Any) -> dict[str, Any]:
    return {**ORDER, "lines": [{**LINE, **changed}]}


@pytest.mark.parametrize(
    ("order", "pointers"),
    [
        (_lines(quantity=-1), ["#/lines/0/quantity"]),
        (_lines(quantity=1001), ["#/lines/0/quantity"]),
        (_lines(quantity=1.5), ["#/lines/0/quantity"]),
        (_lines(quantity=2**80), ["#/lines/0/quantity"]),
        (_lines(unit_cents=10_000_001), ["#/lines/0/unit_cents"]),
        (_lines(sku=""), ["#/lines/0/sku"]),
        (_lines(sku="x" * 65), ["#/lines/0/sku"]),
        (_lines(sku="nothing\0"), ["#/lines/0/sku"]),
        (_lines(colour="red"), ["#/lines/0/colour"]),
        (ORDER | {"lines": []}, ["#/lines"]),
        (ORDER | {"lines": [LINE] * 101}, ["#/lines"]),
        (ORDER | {"customer_id": "me"}, ["#/customer_id"]),
        (ORDER | {"total_cents": 1, "a/b~": 1}, ["#/total_cents", "#/a~1b~0"]),
        ([ORDER], ["#"]),
        (
            {"lines": [{"sku": 1, "quantity": 0}, 7, LINE]},
            ["#/customer_id", "#/lines/0/sku", "#/lines/0/quantity", "#/lines/0/unit_cents", "#/lines/1"],
        ),
    ],
)
async def test_every_wrong_field_is_named_at_once(api: Served, order: object, pointers: list[str]) -> None:
    response = await api.place(order)

    problem = response.json()
    assert (response.status_code, response.headers["content-type"]) == (422, "application/problem+json")
    assert (problem["status"], problem["title"]) == (422, "Unprocessable Content")
    assert [mistake["pointer"] for mistake in problem["errors"]] == pointers
    assert all(mistake["detail"] for mistake in problem["errors"])
    assert await api.rows("select 1 from orders union all select 1 from orderbus.outbox") == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b'{"customer_id": 1, "lines": [',
        b'{"customer_id": "\xff"}x',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"lines": [{"sku": "\\ud800"}]}',
    ],
    ids=["nothing", "half", "a word", "wrong and half", "bytes", "nested", "half a surrogate pair"],
)
async def test_a_body_that_is_no_json_is_refused(api: Served, body: bytes) -> None:
    response = await api.client.post("/orders", content=body, headers=JSON)

    assert (response.status_code, response.headers["content-type"]) == (400, "application/problem+json")


@pytest.mark.parametrize(
    "headers",
    [{"Content-Type": "text/plain"}, {}, {**JSON, "Content-Encoding": "gzip"}],
    ids=["another type", "no type", "compressed"],
)
async def test_only_plain_json_is_read(api: Served, headers: dict[str, str]) -> None:
    response = await api.client.post("/orders", content=b"{}", headers=headers)

    assert response.status_code == 415


async def test_json_with_a_charset_is_json(api: Served) -> None:
    response = await api.client.post("/orders", content=b"{}", headers={"Content-Type": "Application/JSON; charset=utf-8"})

    assert response.status_code == 422


async def test_a_body_of_two_megabytes_is_refused_before_it_is_read(api: Served) -> None:
    head = f"POST /orders HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nContent-Length: {2 * MEGABYTE}\r\n\r\n"

    answer = await api.say(head.encode())

    assert answer.startswith(b"HTTP/1.1 413")


async def test_a_body_of_unknown_length_is_read_up_to_the_cap(api: Served) -> None:
    head = b"POST /orders HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = await api.say(head, b"%x\r\n%s\r\n" % (MEGABYTE + 1, b" " * (MEGABYTE + 1)))

    assert answer.startswith(b"HTTP/1.1 413")


async def test_a_body_as_large_as_the_cap_is_read(api: Served) -> None:
    response = await api.client.post("/orders", content=b" " * MEGABYTE, headers=JSON)

    assert response.status_code == 400


async def test_a_body_that_does_not_arrive_in_time_is_given_up(environment: pytest.MonkeyPatch, shop_database_url: str) -> None:
    async with bus, served(shop_database_url, Limits(body_seconds=0.05, notice_seconds=0.0)) as api:
        answer = await api.say(
            b"POST /orders HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n", b'{"customer'
        )

    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        ("", ["customer"]),
        ("customer=", ["customer"]),
        ("customer={00000000-0000-0000-0000-000000000001}", ["customer"]),
        (f"customer={CUSTOMER}&customer={CUSTOMER}", ["customer"]),
        (f"customer={CUSTOMER}&limit=0", ["limit"]),
        (f"customer={CUSTOMER}&limit=201", ["limit"]),
        (f"customer={CUSTOMER}&limit=%D9%A3", ["limit"]),
        (f"customer={CUSTOMER}&after=x", ["after"]),
        (f"customer={CUSTOMER}&page=2", ["page"]),
        ("limit=x&after=y", ["customer", "limit", "after"]),
    ],
)
async def test_every_wrong_parameter_is_named_at_once(api: Served, query: str, parameters: list[str]) -> None:
    response = await api.client.get(f"/orders?{query}")

    assert response.status_code == 422
    assert [mistake["parameter"] for mistake in response.json()["errors"]] == parameters


async def test_a_query_of_many_parameters_is_refused(api: Served) -> None:
    response = await api.client.get("/orders?" + "&".join(f"p{n}=1" for n in range(100)))

    assert response.status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("GET", "/orders/", 422, None),
        ("GET", "/orders/x", 422, None),
        ("GET", f"/orders/{CUSTOMER}", 404, None),
        ("GET", f"/orders/{CUSTOMER}/lines", 422, None),
        ("DELETE", "/orders", 405, "POST, GET, HEAD, OPTIONS"),
        ("POST", f"/orders/{CUSTOMER}", 405, "GET, HEAD, OPTIONS"),
        ("TRACE", "/health", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/orders", 204, "POST, GET, HEAD, OPTIONS"),
    ],
)
async def test_paths_and_methods_that_do_not_exist(api: Served, method: str, path: str, status: int, allow: str | None) -> None:
    response = await api.client.request(method, path)

    assert (response.status_code, response.headers.get("allow")) == (status, allow)
    assert status == 204 or response.json()["status"] == status
