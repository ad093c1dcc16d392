"""Awaiting aiormq: with a time limit, and without its habit of raising CancelledError when nobody cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
from aiormq.exceptions import AMQPError

from orderbus.errors import UnavailableError

T = TypeVar("T")

GRACE_S = 2.0
"""How long a cancelled call may take to clean up behind itself."""

CALL_ERRORS = (AMQPError, OSError, EOFError, RuntimeError, StopAsyncIteration)
"""What aiormq raises when a call can't be made or fails; its ChannelInvalidStateError is a RuntimeError. StopAsyncIteration is its
reader's word (7.2.4) for a server that has hung up before the handshake's next frame was asked for."""


async def within(limit_s: float, call: Coroutine[Any, Any, T], what: str, *, on_giving_up: Callable[[str], None]) -> T:
    """The result of an aiormq call. Raises what it raises, or UnavailableError after `limit_s`.

    aiormq closes the channel of a call that is cancelled, so `on_giving_up` runs first: no frame may follow on it.
    """
    task = asyncio.get_running_loop().create_task(call)
    try:
        await asyncio.wait({task}, timeout=limit_s)
    finally:
        if not task.done():
            on_giving_up(f"{what} took longer than {limit_s:g} s, or was cancelled")
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task}, timeout=GRACE_S)
    if not task.done() or task.cancelled():
        raise UnavailableError(f"no answer within {limit_s:g} s")
    try:
        return task.result()
    except Exception as failure:
        if type(failure) is Exception:  # aiormq (7.2.4) has nothing else to say where the server hung up between two frames
            raise ConnectionError("the server closed the connection") from failure
        raise
