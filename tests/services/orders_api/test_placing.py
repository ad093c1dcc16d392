"""Placing orders and looking them up."""

from __future__ import annotations

from uuid import UUID

import msgspec
import pytest

from tests.services.orders_api.served import CUSTOMER, LINE, ORDER, Served

pytestmark = pytest.mark.anyio


async def test_an_order_is_stored_with_its_event_and_answered_with_its_place(api: Served) -> None:
    response = await api.place({"customer_id": CUSTOMER, "lines": [LINE, {"sku": "Ärmel/9", "quantity": 1, "unit_cents": 0}]})

    placed = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == f"/orders/{placed['order_id']}"
    assert (placed["status"], placed["total_cents"]) == ("pending", 1990)
    assert await api.rows("select order_id, total_cents, status from orders") == [(UUID(placed["order_id"]), 1990, "pending")]
    [(topic, key, body)] = await api.rows("select topic, key, body from orderbus.outbox")
    event = msgspec.json.decode(body)
    assert (topic, key) == ("orders.placed", placed["order_id"])
    assert (event["total_cents"], [line["sku"] for line in event["lines"]]) == (1990, ["article-00001", "Ärmel/9"])


async def test_a_new_order_shows_what_was_ordered_and_when_it_was_placed(api: Served) -> None:
    placed = (await api.place()).json()

    order = (await api.client.get(f"/orders/{placed['order_id']}")).json()

    assert order == {
        "order_id": placed["order_id"],
        "customer_id": CUSTOMER,
        "status": "pending",
        "reason": None,
        "total_cents": 1990,
        "lines": [LINE],
        "timeline": [{"what": "placed", "outcome": "accepted", "at": placed["placed_at"]}],
    }


async def test_the_timeline_is_told_in_the_order_in_which_it_happened(api: Served) -> None:
    order_id = (await api.place()).json()["order_id"]
    await api.change(
        "update orders set status = 'cancelled', reason = 'over-limit', stock = 'reserved', stock_at = placed_at + '1 s',"
        " payment = 'declined', payment_at = placed_at + '2 s', finished_at = placed_at + '2 s'"
    )

    order = (await api.client.get(f"/orders/{order_id}")).json()

    assert (order["status"], order["reason"]) == ("cancelled", "over-limit")
    assert [(step["what"], step["outcome"]) for step in order["timeline"]] == [
        ("placed", "accepted"),
        ("stock", "reserved"),
        ("payment", "declined"),
        ("finished", "cancelled"),
    ]


async def test_pages_show_each_order_of_the_customer_once_newest_first(api: Served) -> None:
    ids = [(await api.place()).json()["order_id"] for _ in range(5)]
    await api.place({**ORDER, "customer_id": str(UUID(int=2))})
    await api.change("update orders set placed_at = date_trunc('day', placed_at)")  # equal times: the id decides

    seen, query = [], {"customer": CUSTOMER, "limit": "2"}
    while True:
        page = (await api.client.get("/orders", params=query)).json()
        seen += [order["order_id"] for order in page["orders"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]

    assert seen == sorted(ids, reverse=True)


async def test_a_connection_is_kept_for_the_next_request(api: Served) -> None:
    answer = await api.say(
        b"GET /health HTTP/1.1\r\nHost: api\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n"
    )

    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("path", ["/orders?customer=" + CUSTOMER, "/health", "/ready", "/openapi.json", "/docs"])
async def test_head_answers_like_get_without_the_body(api: Served, path: str) -> None:
    head, get = await api.client.head(path), await api.client.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(get.content))
