"""The API as an RSGI application: a route is a line in a table, a refusal is a Problem."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from orderbus import Bus, UnavailableError, new_id
from services.orders_api import idempotency, openapi, orders
from services.orders_api.http import JSON_HEADERS, Limits, answer, encode, read_body, refuse
from services.orders_api.problem import Problem

log = logging.getLogger("orders_api")

ROUTES = {"/orders": ("POST", "GET"), "/health": ("GET",), "/ready": ("GET",), "/openapi.json": ("GET",), "/docs": ("GET",)}
ORDER = "/orders/"


class App:
    """Called by granian for each request."""

    def __init__(self, bus: Bus, limits: Limits) -> None:
        self._bus = bus
        self._limits = limits
        self._document = encode(openapi.document())
        self._page = openapi.page()
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None
        self.draining = False

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        if scope.proto != "http":
            protocol.close(403)
            return
        self._in_flight += 1
        try:
            await self._route(scope, protocol)
        except Problem as problem:
            refuse(protocol, problem)
        except UnavailableError as error:
            log.warning("%s %s: %s", scope.method, scope.path, error)
            refuse(protocol, Problem(503, "the database can't take the request now; try again", headers=[("retry-after", "1")]))
        except Exception:  # whatever it is, the client gets an answer and the log the story
            log.exception("%s %s failed", scope.method, scope.path)
            refuse(protocol, Problem(500, "something went wrong on our side; it is in the log"))
        finally:
            self._in_flight -= 1
            if self._idle is not None and not self._in_flight and not self._idle.done():
                self._idle.set_result(None)

    async def idle(self) -> None:
        """Wait until no request is in flight."""
        self._idle = asyncio.get_running_loop().create_future()
        if self._in_flight:
            await self._idle

    async def _route(self, scope: Any, protocol: Any) -> None:
        method, path = scope.method, scope.path
        if path == "/orders" and method == "POST":
            await self._place(scope, protocol)
            return
        allowed = ROUTES.get(path) or (("GET",) if path.startswith(ORDER) else None)
        if allowed is None:
            raise Problem(404, f"there is nothing at {path[:200]}; see /docs")
        if method not in allowed and not (method == "HEAD" and "GET" in allowed):
            raise Problem(405, f"{path[:200]} takes {', '.join(allowed)}", headers=[("allow", ", ".join(allowed))])
        if path.startswith(ORDER):
            answer(protocol, 200, await orders.get(_uuid(path[len(ORDER) :], "the order's id")))
        else:
            await _GET[path](self, scope, protocol)

    async def _place(self, scope: Any, protocol: Any) -> None:
        kind = scope.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "the body must be application/json", headers=[("accept-post", "application/json")])
        header = scope.headers.get("idempotency-key")
        key = None if header is None else idempotency.read_key(header)
        body = await read_body(scope, protocol, self._limits)
        order = orders.read_order(body)
        order_id = new_id()
        if key is None:
            placed = await orders.place(order_id, order, None)
            answer(protocol, 201, placed, [*JSON_HEADERS, ("location", f"/orders/{placed.order_id}")])
            return
        placed, repeated = await idempotency.once(key, body, lambda stored: orders.place(order_id, order, stored))
        headers = [*JSON_HEADERS, ("location", f"/orders/{placed.order_id}")]
        answer(protocol, 201, placed, [*headers, ("idempotency-replayed", "true")] if repeated else headers)

    async def _list(self, scope: Any, protocol: Any) -> None:
        query = parse_qs(scope.query_string, keep_blank_values=True, max_num_fields=20)
        for name in query:
            if name not in ("customer", "limit", "after"):
                raise Problem(400, f"there is no parameter {name[:80]!r}; there are customer, limit and after")
        if "customer" not in query:
            raise Problem(400, "the parameter `customer` is missing; give a customer's id")
        text = query.get("limit", ["50"])[-1]
        if not (text.isascii() and text.isdigit() and len(text) <= 6 and 1 <= int(text) <= orders.MOST_LISTED):
            raise Problem(400, f"`limit` must be a whole number from 1 to {orders.MOST_LISTED}")
        customer = _uuid(query["customer"][-1], "`customer`")
        answer(protocol, 200, await orders.of_customer(customer, int(text), query.get("after", [None])[-1]))

    async def _health(self, scope: Any, protocol: Any) -> None:
        answer(protocol, 200, openapi.Health("alive"))

    async def _ready(self, scope: Any, protocol: Any) -> None:
        if self.draining or self._bus.draining:
            answer(protocol, 503, openapi.Health("draining"))
        else:
            answer(protocol, 200, openapi.Health("ready"))

    async def _openapi(self, scope: Any, protocol: Any) -> None:
        protocol.response_bytes(200, JSON_HEADERS, self._document)

    async def _docs(self, scope: Any, protocol: Any) -> None:
        protocol.response_bytes(200, [("content-type", "text/html; charset=utf-8")], self._page)


_GET: dict[str, Callable[[App, Any, Any], Awaitable[None]]] = {
    "/orders": App._list,
    "/health": App._health,
    "/ready": App._ready,
    "/openapi.json": App._openapi,
    "/docs": App._docs,
}


def _uuid(text: str, what: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise Problem(400, f"{what} is not a UUID: {text[:60]!r}") from None
