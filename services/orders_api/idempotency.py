"""Idempotency-Key, after draft-ietf-httpapi-idempotency-key-header: the same request under the same key is done once.

400 for a malformed key, 409 while the first request is under way, 422 for another body, the stored answer when it is done. The
truth is the unique row of `idempotency_key` in the order's own transaction. Redis (or the claims in the process) spares the
way there, and knows what other processes work on: without it everything stays right, and their 409 becomes a wait for the row.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from psycopg.errors import UniqueViolation

from orderbus import Tx, UnavailableError, UsageError
from orderbus.abc import ClaimAnswer, Claims, ClaimState
from services.orders_api.orders import PlacedOrder, placed_under
from services.orders_api.problem import Problem
from services.orders_api.service import bus
from services.orders_api.together import Together

log = logging.getLogger("orders_api.idempotency")

LEASE_MS = 30_000
"""How long a process that died keeps its keys in progress; longer than a commit may take."""
KEEP_S = 24 * 3600
CALL_S = 0.5
"""How long Redis may take; longer, and the way without it is the faster one."""
REST_S = 1.0
"""How long Redis is left alone after a failure, so that not every request waits out CALL_S."""
MOST_FORGOTTEN = 50_000

QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\]){1,200})"')
BARE = re.compile(r"[A-Za-z0-9_:/+=.-]{1,200}")

Place = Callable[[tuple[str, str]], Awaitable[PlacedOrder]]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(PlacedOrder).decode


def read_key(headers: Sequence[str]) -> str:
    """The key in the request's Idempotency-Key headers: a quoted string (RFC 9651), or a bare token, as many clients send it.

    Raises Problem 400 for anything else, and for several.

    >>> read_key(['"8e03978e"']), read_key(["8e03978e"])
    ('8e03978e', '8e03978e')
    """
    text = headers[0].strip() if len(headers) == 1 else ""
    if found := QUOTED.fullmatch(text):
        return re.sub(r"\\(.)", r"\1", found[1])
    if BARE.fullmatch(text):
        return text
    raise Problem(400, 'Idempotency-Key must be one quoted string of 1 to 200 printable ASCII characters, such as "8e03978e"')


class Keys:
    """The keys that this process works on, and what Redis knows of the others. `run` must run for as long as it is used."""

    def __init__(self, claims: Claims | None) -> None:
        self._claims = claims
        self._token = secrets.token_hex(8)  # one for the process, so that claims can share a call: `_busy` parts its requests
        self._busy: dict[str, str] = {}
        self._rest_until = 0.0
        self._claim = Together(self._claim_all)
        self._settle = Together(self._settle_all)

    async def once(self, key: str, body: bytes, place: Place) -> tuple[PlacedOrder, bool]:
        """Place an order under a key; whether the answer is that of an earlier request. Raises Problem 409 and 422."""
        fingerprint = hashlib.blake2b(body, digest_size=16).hexdigest()
        if key in self._busy:
            raise _in_progress() if self._busy[key] == fingerprint else _other_body()
        self._busy[key] = fingerprint
        answer: bytes | None = None
        try:
            claim = await self._claim((key, fingerprint))
            if claim is not None and claim.state is not ClaimState.GRANTED:
                return _stored(claim), True
            try:
                placed, repeated = await _place_or_find(key, fingerprint, place)
                answer = _encode(placed)
            finally:
                await self._settle((key, answer))
            return placed, repeated
        finally:
            del self._busy[key]

    async def run(self) -> None:
        """Carry claims to Redis and answers after them, many at a time."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._claim.run())
            tasks.create_task(self._settle.run())

    async def _claim_all(self, keys: Sequence[tuple[str, str]]) -> Sequence[ClaimAnswer | None]:
        """One answer each; None where Redis can't be asked."""
        if self._claims is not None and time.monotonic() >= self._rest_until:
            try:
                async with asyncio.timeout(CALL_S):
                    names = [(_name(key), fingerprint) for key, fingerprint in keys]
                    return await self._claims.claim(names, self._token, LEASE_MS)
            except (UnavailableError, TimeoutError) as error:
                self._rest(error)
        return [None] * len(keys)

    async def _settle_all(self, outcomes: Sequence[tuple[str, bytes | None]]) -> Sequence[None]:
        """Store the answers, and give up the keys of those that failed. What does not arrive, the row in the database knows."""
        if self._claims is not None and time.monotonic() >= self._rest_until:
            try:
                async with asyncio.timeout(CALL_S):
                    if done := [(_name(key), answer) for key, answer in outcomes if answer is not None]:
                        await self._claims.complete(done, self._token, KEEP_S * 1000)
                    if failed := [_name(key) for key, answer in outcomes if answer is None]:
                        await self._claims.release(failed, self._token)
            except (UnavailableError, TimeoutError) as error:
                self._rest(error)
        return [None] * len(outcomes)

    def _rest(self, error: Exception) -> None:
        self._rest_until = time.monotonic() + REST_S
        log.warning("idempotency keys go to the database alone for %g s: %s", REST_S, str(error) or f"no answer in {CALL_S:g} s")


def keys_of_bus() -> Keys:
    """For the open bus; one that has no Redis does without."""
    try:
        return Keys(bus.claims)
    except UsageError:
        log.warning("ORDERBUS_REDIS_URL is not set: idempotency keys go to the database alone")
        return Keys(None)


@bus.every(10.0)
async def forget_old(tx: Tx) -> None:
    """Forget keys after a day, so many at a time that no load outgrows it."""
    await tx.execute(_FORGET, (KEEP_S, MOST_FORGOTTEN))


async def _place_or_find(key: str, fingerprint: str, place: Place) -> tuple[PlacedOrder, bool]:
    try:
        return await place((key, fingerprint)), False
    except UniqueViolation:
        stored = await placed_under(key)
        if stored is None:  # forgotten between the two statements: the next try places it
            raise _in_progress() from None
        if stored[0] != fingerprint:
            raise _other_body() from None
        return stored[1], True


def _stored(claim: ClaimAnswer) -> PlacedOrder:
    if claim.state is ClaimState.DONE:
        return _decode(claim.answer)
    raise _in_progress() if claim.state is ClaimState.IN_PROGRESS else _other_body()


def _name(key: str) -> str:
    return f"orders-api:{key}"


def _in_progress() -> Problem:
    return Problem(409, "a request with this Idempotency-Key is under way; try again later", headers=[("retry-after", "1")])


def _other_body() -> Problem:
    return Problem(422, "this Idempotency-Key was used before with another body; use a new key")


_FORGET = """\
delete from idempotency_key where ctid = any (array (
    select ctid from idempotency_key where created_at < now() - make_interval(secs => %s)
    order by created_at limit %s for update skip locked))"""
