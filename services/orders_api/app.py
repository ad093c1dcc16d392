"""The API as an RSGI application: a route is a line in a table, a refusal is a Problem."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from orderbus import Bus, UnavailableError, new_id
from services.orders_api import idempotency, openapi, orders
from services.orders_api.http import JSON_HEADERS, Limits, answer, encode, read_body, refuse
from services.orders_api.problem import Mistake, Problem
from services.orders_api.telemetry import Requests, Watched
from services.orders_api.validation import read_order
from services.shared.logs import bind_order

log = logging.getLogger("orders_api")

ROUTES = {"/orders": ("POST", "GET"), "/health": ("GET",), "/ready": ("GET",), "/openapi.json": ("GET",), "/docs": ("GET",)}
ORDER = "/orders/"
DATABASE_S = 2.0


class App:
    """Called by granian for each request. `keys.run()` must run beside it; `draining` turns /ready to no."""

    def __init__(self, bus: Bus, limits: Limits) -> None:
        self.keys = idempotency.keys_of_bus()
        self.draining = False
        self.listening = asyncio.Event()
        self.in_flight: set[asyncio.Task[Any]] = set()
        self._bus = bus
        self._limits = limits
        self._requests = Requests()
        self._document = encode(openapi.document())
        self._page = openapi.page()

    def __rsgi_init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """granian 2.8 calls it in the same step of the loop as it begins to listen."""
        loop.call_soon(self.listening.set)

    async def __rsgi__(self, scope: Any, protocol: Any) -> None:
        if not self._requests.records:
            await self._answer(scope, protocol)
            return
        watched = Watched(protocol)
        with self._requests.request(scope, _route_of(scope.path), watched):
            await self._answer(scope, watched)

    async def _answer(self, scope: Any, protocol: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.in_flight.add(task)
        try:
            await self._route(scope, protocol)
        except Problem as problem:
            refuse(protocol, problem)
        except UnavailableError as error:
            log.warning("%s %s: %s", scope.method, scope.path, error)
            refuse(protocol, _unavailable("the database can't take the request now; try again"))
        except asyncio.CancelledError:
            refuse(protocol, _unavailable("the service stopped before this was done; it may have been"))
            raise
        except Exception:  # whatever it is, the client gets an answer and the log the story
            log.exception("%s %s failed", scope.method, scope.path)
            refuse(protocol, Problem(500, "something went wrong on our side; it is in the log"))
        finally:
            self.in_flight.discard(task)

    async def _route(self, scope: Any, protocol: Any) -> None:
        method, path = scope.method, scope.path
        if path == "/orders" and method == "POST":
            await self._place(scope, protocol)
            return
        methods = ROUTES.get(path) or (("GET",) if path.startswith(ORDER) else None)
        if methods is None:
            raise Problem(404, f"there is nothing at {path[:200]}; see /docs")
        if method not in methods and not (method == "HEAD" and "GET" in methods):
            allow = ", ".join([*methods, "HEAD", "OPTIONS"])
            if method == "OPTIONS":
                protocol.response_empty(204, [("allow", allow)])
                return
            raise Problem(405, f"{path[:200]} takes {allow}", headers=[("allow", allow)])
        if path.startswith(ORDER):
            order_id = _order_id(path[len(ORDER) :])
            bind_order(order_id)
            answer(protocol, 200, await orders.get(order_id))
        else:
            await _GET[path](self, scope, protocol)

    async def _place(self, scope: Any, protocol: Any) -> None:
        headers = scope.headers
        kind = headers.get("content-type", "")
        if kind != "application/json" and kind.partition(";")[0].strip().lower() != "application/json":
            raise Problem(415, "the body must be application/json", headers=[("accept-post", "application/json")])
        if headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "the body must not be compressed", headers=[("accept-encoding", "identity")])
        # granian leaves a value out that is not ASCII: an unreadable key must not become none at all.
        key = idempotency.read_key(headers.get_all("idempotency-key")) if "idempotency-key" in headers else None
        body = await read_body(scope, protocol, self._limits)
        order = read_order(body)
        order_id = new_id()
        bind_order(order_id)
        if key is None:
            placed, repeated = await orders.place(order_id, order, None), False
        else:
            placed, repeated = await self.keys.once(key, body, lambda row: orders.place(order_id, order, row))
        extra = [("location", f"/orders/{placed.order_id}"), *([("idempotency-replayed", "true")] if repeated else [])]
        answer(protocol, 201, placed, JSON_HEADERS + extra)

    async def _list(self, scope: Any, protocol: Any) -> None:
        answer(protocol, 200, await orders.of_customer(*_read_query(scope.query_string)))

    async def _health(self, scope: Any, protocol: Any) -> None:
        answer(protocol, 200, openapi.Health("alive"))

    async def _ready(self, scope: Any, protocol: Any) -> None:
        """No while it drains, and while the database is away: a balancer may know a process that reaches it."""
        if self.draining or self._bus.draining:
            answer(protocol, 503, openapi.Health("draining"))
            return
        try:
            async with asyncio.timeout(DATABASE_S), self._bus.transaction() as tx:
                await tx.fetch_one("select 1")
        except (UnavailableError, TimeoutError):
            answer(protocol, 503, openapi.Health("no database"))
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


def _route_of(path: str) -> str:
    """Under which name a path is counted."""
    if path in ROUTES:
        return path
    return f"{ORDER}{{order_id}}" if path.startswith(ORDER) else "other"


def _read_query(query: str) -> tuple[UUID, int, UUID | None]:
    """The customer, how many, and after which. Raises Problem 422 that names every mistake."""
    try:
        given = parse_qs(query, keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Problem(400, "the query has too many parameters") from None
    mistakes = []
    for name, values in given.items():
        if name not in ("customer", "limit", "after"):
            mistakes.append(Mistake("there is no such parameter; there are customer, limit and after", parameter=name[:80]))
        elif len(values) > 1:
            mistakes.append(Mistake("is given more than once", parameter=name))
    customer = _uuid(given.get("customer", [""])[0])
    if customer is None:
        mistakes.append(Mistake("must be given, and a UUID", parameter="customer"))
    limit = given.get("limit", ["50"])[0]
    if not (re.fullmatch("[0-9]{1,6}", limit) and 1 <= int(limit) <= orders.MOST_LISTED):
        mistakes.append(Mistake(f"must be a whole number from 1 to {orders.MOST_LISTED}", parameter="limit"))
    after = _uuid(given["after"][0]) if "after" in given else None
    if "after" in given and after is None:
        mistakes.append(Mistake("must be the `next` of the page before", parameter="after"))
    if mistakes or customer is None:
        raise Problem(422, "the query is not valid; see errors", errors=mistakes)
    return customer, int(limit), after


def _order_id(text: str) -> UUID:
    found = _uuid(text)
    if found is None:
        raise Problem(422, "the order's id is not a UUID", errors=[Mistake("must be a UUID", parameter="order_id")])
    return found


def _uuid(text: str) -> UUID | None:
    """Only as it is usually written: `UUID` itself takes braces, `urn:uuid:` and misplaced hyphens too."""
    return UUID(text) if _UUID.fullmatch(text) else None


_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def _unavailable(detail: str) -> Problem:
    return Problem(503, detail, headers=[("retry-after", "1")])
