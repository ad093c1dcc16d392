"""Serving: granian's embedded server on the bus's own loop, and a stop within two seconds that drops no request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket

import anyio
from anyio.abc import TaskStatus
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from orderbus import Bus, UsageError
from services.orders_api.app import App
from services.orders_api.http import Limits
from services.shared.settings import from_environment

log = logging.getLogger("orders_api")

START_S = 10.0
CUT_S = 0.1


async def serve(
    bus: Bus,
    host: str,
    port: int,
    *,
    limits: Limits | None = None,
    stop: anyio.Event | None = None,
    task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set, or SIGTERM or SIGINT comes where it is not given. Leaving `async with bus` drains the bus afterwards.

    First readiness says no, then the listener ends and requests in flight finish. `task_status` is told when it listens.
    Raises UsageError for a port that is taken.
    """
    limits = limits or from_environment(Limits, "ORDERS_API_")
    _check_free(host, port)
    app = App(bus, limits)
    server = _server(app, host, port, limits)
    serving = asyncio.create_task(server.serve(), name="granian")  # in no group: `_stop` may have to leave it behind
    async with asyncio.TaskGroup() as tasks:
        keys, watch = tasks.create_task(app.keys.run()), tasks.create_task(_watch(serving))
        try:
            async with asyncio.timeout(START_S):
                await app.listening.wait()
            log.info("the Orders API listens on http://%s:%d", host, port)
            task_status.started()
            await (_signalled() if stop is None else stop.wait())
        finally:
            with anyio.CancelScope(shield=True):
                await _stop(app, server, serving, watch, limits)
                keys.cancel()


def _server(app: App, host: str, port: int, limits: Limits) -> Server:
    return Server(
        app,
        address=host,
        port=port,
        interface=Interfaces.RSGI,
        http=HTTPModes.http1,
        websockets=False,
        backlog=limits.connections,
        backpressure=limits.connections,
        http1_settings=HTTP1Settings(header_read_timeout=int(limits.head_seconds * 1000)),
        log_level=LogLevels.error,
        # Incremental: a whole configuration, granian's default, closes the handlers of everybody else in the process.
        log_dictconfig={"version": 1, "incremental": True, "handlers": {}, "loggers": {}},
    )


async def _watch(serving: asyncio.Task[None]) -> None:
    await asyncio.wait([serving])
    raise RuntimeError("the HTTP server ended by itself") from serving.exception()


async def _stop(app: App, server: Server, serving: asyncio.Task[None], watch: asyncio.Task[None], limits: Limits) -> None:
    """Say no, then finish, then cut off."""
    app.draining = True
    await asyncio.wait([serving], timeout=limits.notice_seconds)
    watch.cancel()
    server.stop()  # type: ignore[no-untyped-call]  # ends the listener and idle connections; requests in flight are answered
    await asyncio.wait([serving], timeout=limits.stop_seconds)
    if serving.done():
        return
    log.warning("the stop cuts off %d requests, and connections that sent half a head", len(app.in_flight))
    for request in app.in_flight:
        request.cancel()
    # Who sent half a head can't be sent away: granian waits for him until head_seconds are over. Cancelled, its task would make
    # granian 2.8 raise in the loop when he goes; left alone, it ends with him or with the loop.
    await asyncio.wait([serving], timeout=CUT_S)


async def _signalled() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("received %s: draining", signal.Signals(number).name)
            return


def _check_free(host: str, port: int) -> None:
    """granian listens with SO_REUSEPORT: beside another server it would get every second connection, and nobody would know."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"can't listen on {host}:{port}: {error.strerror}; set ORDERS_API_HOST and ORDERS_API_PORT"
            ) from error
