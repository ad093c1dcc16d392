"""What the API needs of HTTP: bodies read under a cap and a time limit, answers written with the fewest steps.

RSGI is granian's own interface (https://github.com/emmett-framework/granian/blob/master/docs/spec/RSGI.md). It has no limits
of its own: `await protocol()` took a body of 30 MiB, so a body without a declared length is read chunk by chunk.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from services.orders_api.problem import PROBLEM_JSON, Problem

Headers = list[tuple[str, str]]

JSON_HEADERS: Headers = [("content-type", "application/json"), ("cache-control", "no-store")]

encode = msgspec.json.Encoder().encode


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a client may cost, and a stop. Each is `ORDERS_API_` + its name in the environment."""

    body_bytes: Annotated[int, Meta(ge=1024)] = 1_048_576
    """The largest body."""
    body_seconds: Annotated[float, Meta(gt=0)] = 10.0
    """How long a body may take to arrive."""
    head_seconds: Annotated[float, Meta(gt=0)] = 10.0
    """How long a request's head may take, and how long a kept-alive connection may rest."""
    connections: Annotated[int, Meta(ge=128)] = 2048
    """At most so many at once; others wait to be accepted."""
    notice_seconds: Annotated[float, Meta(ge=0)] = 0.3
    """How long a stop goes on serving after /ready says no, so that a balancer looks away first."""
    stop_seconds: Annotated[float, Meta(gt=0)] = 1.5
    """How long a stop then waits for requests in flight, before it cuts them off."""


async def read_body(scope: Any, protocol: Any, limits: Limits) -> bytes:
    """The body of a request. Raises Problem 413 over the cap (before reading, where Content-Length tells), 408 over the time."""
    declared = scope.headers.get("content-length")
    if declared is not None and int(declared) > limits.body_bytes:  # hyper lets only a 64-bit number through
        raise _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            if declared is not None:
                body: bytes = await protocol()  # hyper takes no more than was declared
                return body
            async for chunk in protocol:
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
    except TimeoutError:
        raise Problem(408, f"the body did not arrive within {limits.body_seconds:g} s", headers=[_CLOSE]) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def answer(protocol: Any, status: int, value: Any, headers: Headers = JSON_HEADERS) -> None:
    """Send a value as JSON."""
    protocol.response_bytes(status, headers, encode(value))


def refuse(protocol: Any, problem: Problem) -> None:
    """Send problem details."""
    headers = [("content-type", PROBLEM_JSON), ("cache-control", "no-store"), *problem.headers]
    protocol.response_bytes(problem.status, headers, encode(problem.details))


_CLOSE = ("connection", "close")


def _too_large(limits: Limits) -> Problem:
    return Problem(413, f"the body is larger than {limits.body_bytes} bytes", headers=[_CLOSE])
