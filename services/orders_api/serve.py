"""Serving: granian's embedded server on the bus's own loop, and a stop that drops no request."""

from __future__ import annotations

import asyncio
import logging
import signal

import anyio
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

from orderbus import Bus
from services.orders_api.app import App
from services.orders_api.http import Limits
from services.shared.settings import from_environment

log = logging.getLogger("orders_api")

STOP_S = 5.0
NOTICE_S = 0.2
"""Between the readiness probe's no and the end of the listener, so that a balancer looks away first."""


async def serve(bus: Bus, host: str, port: int, *, limits: Limits | None = None, stop: anyio.Event | None = None) -> None:
    """Serve until `stop` is set, or SIGTERM or SIGINT comes where it is not given. Leaving `async with bus` drains the bus afterwards.

    First readiness says no, then requests in flight finish, then the listener ends.
    """
    app = App(bus, limits or from_environment(Limits, "ORDERS_API_"))
    server = Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=1024,
        backpressure=1024,
        log_enabled=False,
    )
    serving = asyncio.create_task(server.serve(), name="orders-api")
    log.info("the Orders API listens on http://%s:%d", host, port)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_ended, serving)
            if stop is None:
                await _signalled()
            else:
                await stop.wait()
            tasks.cancel_scope.cancel()
        app.draining = True
        await anyio.sleep(NOTICE_S)
        with anyio.move_on_after(STOP_S):
            await app.idle()
    finally:
        server.stop()  # type: ignore[no-untyped-call]
        with anyio.move_on_after(STOP_S, shield=True):
            await asyncio.wait([serving])
        serving.cancel()


async def _ended(serving: asyncio.Task[None]) -> None:
    await asyncio.wait([serving])
    raise RuntimeError("the HTTP server ended by itself; is the port taken?") from serving.exception()


async def _signalled() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s: draining", signal.Signals(number).name)
            return
