"""FastAPI and orderbus: the bus lives as long as the app, a request has its transaction, and errors are problem details.

Needs `orderbus[fastapi]`.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from orderbus import Bus, MessageError, Tx, UnavailableError

__all__ = ["add_problem_details", "lifespan", "transaction"]

log = logging.getLogger("orderbus.ext.fastapi")

RETRY_AFTER_S = 5


def lifespan(*buses: Bus) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """`FastAPI(lifespan=lifespan(bus))`: opens the buses before the first request, drains them after the last, in reverse order.

    An app that has a lifespan of its own writes `async with bus:` there instead. What a bus raises when it is opened
    (SettingsError, UsageError, TopologyError, UnavailableError) ends the start of the app.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for bus in buses:
                await stack.enter_async_context(bus)
            yield

    return run


def transaction(bus: Bus) -> Any:
    """A dependency that gives a request its Tx: `tx: Annotated[Tx, transaction(bus)]`.

    It commits when the path operation has returned and before the response goes out, so that nobody is told of what
    then fails to commit; it rolls back when an exception leaves the operation, an HTTPException too. Returning a
    response of status 400 or more is a return: it commits. A request has one of a bus, also where several of its
    dependencies ask for it. Raises UnavailableError when the database is away.
    """

    # FastAPI would otherwise end the dependency after the response was sent.
    return Depends(_Transaction(bus), scope="function")


@dataclass(frozen=True)
class _Transaction:
    """Compares by its bus: those who ask for one in the same request, in whatever place, get the same."""

    bus: Bus

    async def __call__(self) -> AsyncIterator[Tx]:
        async with self.bus.transaction() as tx:
            yield tx


def add_problem_details(app: FastAPI) -> None:
    """Answer errors of orderbus, and requests that FastAPI finds invalid, with problem details (RFC 9457).

    UnavailableError: 503 with `Retry-After`; what and where is logged, and not told to the client. MessageError: 422, with its
    reason. A request of the wrong shape: 422, with `errors`, each with FastAPI's `loc` and `detail`. Other errors of
    orderbus are mistakes of the program: they stay a 500 with their traceback in the log.
    """
    app.add_exception_handler(UnavailableError, _unavailable)
    app.add_exception_handler(MessageError, _message)
    app.add_exception_handler(RequestValidationError, _invalid)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    log.warning("%s %s: %s", request.method, request.url.path, error)
    detail = "a server that this service needs is away; try again later"
    return _problem(503, detail, headers={"Retry-After": str(RETRY_AFTER_S)})


async def _message(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, MessageError)
    return _problem(422, str(error), reason=error.reason)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    mistakes = [{"loc": mistake["loc"], "detail": mistake["msg"]} for mistake in error.errors()]
    return _problem(422, "the request is not what this operation takes", errors=jsonable_encoder(mistakes))


def _problem(status: int, detail: str, headers: dict[str, str] | None = None, **more: Any) -> JSONResponse:
    title = (
        "Unprocessable Content" if status == 422 else HTTPStatus(status).phrase
    )  # as RFC 9110 has it, which Python 3.13 follows
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, **more}
    return JSONResponse(body, status, headers, media_type="application/problem+json")
