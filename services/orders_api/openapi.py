"""The OpenAPI 3.1 document, made from the types that the API decodes and encodes; and a page that shows it."""

from __future__ import annotations

from importlib import resources
from typing import Any, Literal

import msgspec

from services.orders_api.idempotency import BARE, QUOTED
from services.orders_api.orders import MOST_LISTED, NewOrder, Order, OrderList, PlacedOrder
from services.orders_api.problem import PROBLEM_JSON, TITLES, ProblemDetails


class Health(msgspec.Struct, frozen=True):
    """Whether the process lives, or is ready for traffic."""

    status: Literal["alive", "ready", "draining", "no database"]


def document() -> dict[str, Any]:
    """The whole document."""
    types = (NewOrder, PlacedOrder, Order, OrderList, ProblemDetails, Health)
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Orders API", "version": "1.0.0", "description": "Places orders, and tells what became of them."},
        "paths": {
            "/orders": {"post": _post(), "get": _list()},
            "/orders/{order_id}": {"get": _get()},
            "/health": {"get": _probe("Whether the process lives", (200,))},
            "/ready": {"get": _probe("Whether it takes requests; no while it drains", (200, 503))},
        },
        "components": {"schemas": components},
    }


def page() -> bytes:
    """/docs: shows the document, and needs nothing else."""
    return (resources.files("services.orders_api") / "docs.html").read_bytes()


def _post() -> dict[str, Any]:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": 'A quoted string such as "8e03978e". The same request under the same key is done once, within 24 hours.',
        "schema": {"type": "string", "pattern": f"^({QUOTED.pattern}|{BARE.pattern})$"},
    }
    placed = _json("Placed", PlacedOrder) | {"headers": {"Location": {"schema": {"type": "string"}}}}
    return {
        "operationId": "placeOrder",
        "summary": "Place an order",
        "parameters": [key],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(NewOrder)}}},
        "responses": {"201": placed, **_problems(400, 408, 409, 413, 415, 422, 500, 503)},
    }


def _list() -> dict[str, Any]:
    return {
        "operationId": "listOrders",
        "summary": "A customer's orders, newest first",
        "parameters": [
            _query("customer", {"type": "string", "format": "uuid"}, required=True),
            _query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": 50}),
            _query("after", {"type": "string", "format": "uuid"}),
        ],
        "responses": {"200": _json("A page", OrderList), **_problems(400, 422, 500, 503)},
    }


def _get() -> dict[str, Any]:
    order_id = {"name": "order_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
    return {
        "operationId": "getOrder",
        "summary": "An order and its timeline",
        "parameters": [order_id],
        "responses": {"200": _json("The order", Order), **_problems(404, 422, 500, 503)},
    }


def _probe(summary: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    return {"summary": summary, "responses": {str(status): _json(summary, Health) for status in statuses}}


def _query(name: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "schema": schema}


def _json(description: str, kind: type) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(kind)}}}


def _problems(*statuses: int) -> dict[str, Any]:
    content = {PROBLEM_JSON: {"schema": _ref(ProblemDetails)}}
    return {str(status): {"description": TITLES[status], "content": content} for status in statuses}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
