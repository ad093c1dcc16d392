"""What the API needs of HTTP: bodies read under a cap and a time limit, answers written with the fewest steps.

RSGI is granian's own interface (https://github.com/emmett-framework/granian/blob/master/docs/spec/RSGI.md). It has no limits
of its own: `await protocol()` took a body of 30 MiB, so bodies are read chunk by chunk.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from services.orders_api.problem import PROBLEM_JSON, Problem

Headers = list[tuple[str, str]]

JSON_HEADERS: Headers = [("content-type", "application/json")]

encode = msgspec.json.Encoder().encode


class Limits(msgspec.Struct, frozen=True):
    """ORDERS_API_BODY_BYTES and ORDERS_API_BODY_SECONDS: the largest body, and how long it may take to arrive."""

    body_bytes: int = 1_048_576
    body_seconds: float = 10.0


async def read_body(scope: Any, protocol: Any, limits: Limits) -> bytes:
    """The body of a request. Raises Problem 413 over the cap, 408 over the time, 400 where its length is no number."""
    declared = scope.headers.get("content-length")
    if declared is not None:
        if not declared.isdigit():
            raise Problem(400, "Content-Length is not a number")
        if int(declared) > limits.body_bytes:
            raise _too_large(limits)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in protocol:
                size += len(chunk)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
    except TimeoutError:
        raise Problem(
            408, f"the body did not arrive within {limits.body_seconds:g} s", headers=[("connection", "close")]
        ) from None
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def answer(protocol: Any, status: int, value: Any, headers: Headers = JSON_HEADERS) -> None:
    """Send a value as JSON."""
    protocol.response_bytes(status, headers, encode(value))


def refuse(protocol: Any, problem: Problem) -> None:
    """Send problem details."""
    protocol.response_bytes(problem.status, [("content-type", PROBLEM_JSON), *problem.headers], encode(problem.details))


def _too_large(limits: Limits) -> Problem:
    return Problem(413, f"the body is larger than {limits.body_bytes} bytes", headers=[("connection", "close")])
