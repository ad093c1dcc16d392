"""Idempotency-Key, after draft-ietf-httpapi-idempotency-key-header: the same request under the same key is done once.

Redis (or the claims in the process) is the fast path: 409 while the first is under way, 422 for another body, the stored answer
when it is done. The truth is a unique row in the order's own transaction: without Redis it is slower, never wrong.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from psycopg.errors import UniqueViolation

from orderbus import UnavailableError
from services.orders_api.orders import PlacedOrder, placed_under
from services.orders_api.problem import Problem
from services.orders_api.service import bus

log = logging.getLogger("orders_api.idempotency")

LEASE_MS = 30_000
KEEP_MS = 24 * 3_600_000
KEY = re.compile(r'"([\x20-\x21\x23-\x5b\x5d-\x7e]{1,200})"|([A-Za-z0-9_:/+=.-]{1,200})')

Place = Callable[[tuple[str, str] | None], Awaitable[PlacedOrder]]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(PlacedOrder).decode


def read_key(header: str) -> str:
    """The key in the header: a quoted string (RFC 8941), or a bare token. Raises Problem 400 for anything else."""
    match = KEY.fullmatch(header.strip())
    if match is None:
        raise Problem(400, 'Idempotency-Key must be a quoted string of 1 to 200 printable ASCII characters, such as "8e03978e"')
    return match[1] or match[2]


async def once(key: str, body: bytes, place: Place) -> tuple[PlacedOrder, bool]:
    """Place an order under a key; whether the answer is that of an earlier request. Raises Problem 409 and 422."""
    fingerprint = hashlib.blake2b(body, digest_size=16).hexdigest()
    name, token = f"orders-api:{key}", secrets.token_hex(8)
    claimed = await _claim(name, fingerprint, token)
    if isinstance(claimed, PlacedOrder):
        return claimed, True
    try:
        placed, repeated = await _place_or_find(key, fingerprint, place)
    except BaseException:
        if claimed:
            await _quietly(bus.claims.release([name], token))
        raise
    if claimed:
        await _quietly(bus.claims.complete([(name, _encode(placed))], token, KEEP_MS))
    return placed, repeated


async def _claim(name: str, fingerprint: str, token: str) -> PlacedOrder | bool:
    """The stored answer, True when the key is ours now, False when the claims' keeper is away."""
    try:
        (answer,) = await bus.claims.claim([(name, fingerprint)], token, LEASE_MS)
    except UnavailableError as error:
        log.warning("idempotency keys go to the database: %s", error)
        return False
    state = answer.state.value
    if state == "in-progress":
        raise Problem(409, "a request with this Idempotency-Key is being processed; try again later", headers=[("retry-after", "1")])
    if state == "mismatch":
        raise _other_body()
    return _decode(answer.answer) if state == "done" else True


async def _place_or_find(key: str, fingerprint: str, place: Place) -> tuple[PlacedOrder, bool]:
    try:
        return await place((key, fingerprint)), False
    except UniqueViolation:
        stored = await placed_under(key)
        if stored is None:
            raise UnavailableError("the idempotency key is held by a transaction that is not visible yet") from None
        if stored[0] != fingerprint:
            raise _other_body() from None
        return stored[1], True


async def _quietly(call: Awaitable[Any]) -> None:
    try:
        await call
    except UnavailableError as error:
        log.warning("an idempotency key was not written to the fast path: %s", error)


def _other_body() -> Problem:
    return Problem(422, "this Idempotency-Key was used before with another body; use a new key")
